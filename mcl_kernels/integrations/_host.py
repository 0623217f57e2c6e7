"""Helpers for the modules of all hosts."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mcl_kernels.distributed.group import all_gather, ranks_of


def require(distribution: str, minimum: str, extra: str | None = None) -> None:
    """Raises an ImportError unless the host is installed and recent enough.

    Args:
        distribution: name of the host's package.
        minimum: oldest supported version.
        extra: extra of mcl-kernels that installs the host, by default of the same name.
    """
    try:
        found = version(distribution)
    except PackageNotFoundError:
        found = "none"
    if found == "none" or _release(found) < _release(minimum):
        needed = f"{distribution} >= {minimum}"
        command = f"pip install 'mcl-kernels[{extra or distribution}]'"
        raise ImportError(f"this integration needs {needed}: found {found} ({command})")


def _release(version_text: str) -> list[int]:
    """Major and minor version, to compare."""
    return [int(digits) for digits in re.findall(r"\d+", version_text)[:2]]


def as_scalar(value: Any) -> Any:
    """Returns a tensor of one element as a scalar tensor, which the losses accept; anything else unchanged."""
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value


def gathered(values: Tensor) -> Tensor:
    """Values of all ranks, equally many from each, in the order of the ranks."""
    return all_gather(values.contiguous(), ranks_of(dist.group.WORLD))
