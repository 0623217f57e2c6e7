"""What the files of the hosts share."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mcl_kernels.distributed.group import all_gather, ranks_of


def require(distribution: str, least: str, extra: str | None = None) -> None:
    """Checks that a host is installed, and new enough; `extra` installs it, by default that of its name."""
    try:
        found = version(distribution)
    except PackageNotFoundError:
        found = "none"
    if found == "none" or _release(found) < _release(least):
        needed = f"{distribution} >= {least}"
        command = f"pip install 'mcl-kernels[{extra or distribution}]'"
        raise ImportError(f"this integration needs {needed}: found {found} ({command})")


def _release(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:2]]


def number(value: Any) -> Any:
    """A tensor of one number, of any shape, as [], which the losses take."""
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value


def gathered(values: Tensor) -> Tensor:
    """Labels of all ranks, in the order of the ranks, as many from each."""
    return all_gather(values.contiguous(), ranks_of(dist.group.WORLD))
