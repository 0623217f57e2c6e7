"""Output files of the commands, labels, their summary and centres: checked before the clustering, replaced after it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mcl_kernels
from mcl_kernels._durable import check_writable, link_target, replaced_files, sha256_of, write_array
from mcl_kernels.cli.input_files import summary_of


def check_outputs(out: Path, centers: Path | None, inputs: Sequence[Path]) -> None:
    """Raises if labels, their summary or centres cannot be written. Creates missing directories.

    No output may be an input or another output, also through links.
    """
    if out.suffix not in (".npy", ".pt"):
        raise ValueError(f"--out must be a .npy or .pt file: got {out}")
    if centers is not None and centers.suffix != ".safetensors":
        raise ValueError(f"--centers must be a .safetensors file: got {centers}")
    outputs = {"--out": out, "the summary of --out": summary_of(out)}
    if centers is not None:
        outputs["--centers"] = centers
    used = dict.fromkeys(inputs, "one of the files that are read")
    for name, path in outputs.items():
        _check_target(name, path)
        for other, use in used.items():
            if _is_same(path, other):
                raise ValueError(f"{name} must not be {use}: got {path}")
        used[path] = name
    for name, path in outputs.items():
        check_writable(link_target(path).parent)
        _check_target(name, path)  # again: a name that is too long is detected once its directory exists


def write_labels(out: Path, labels: Tensor, summary: Mapping[str, Any], centers: tuple[Path, bytes] | None) -> None:
    """Writes labels, their summary with SHA-256 digests added, and the content of a file of centres, if given.

    All files are on disk before the first is renamed; the labels come first. If the summary is still that of older
    labels, a later reader detects it by the SHA-256.
    """
    paths = [out, summary_of(out), *([centers[0]] if centers else [])]
    for path in paths:
        link_target(path).parent.mkdir(parents=True, exist_ok=True)  # may have been removed during the clustering
    with replaced_files(*paths) as (labels_file, summary_file, *others):
        if out.suffix == ".pt":
            torch.save(labels, labels_file)
        else:
            write_array(labels_file, labels.numpy())
        labels_file.flush()
        digests = {"sha256": sha256_of(Path(labels_file.name))}
        if centers:
            others[0].write(centers[1])
            digests["centers_sha256"] = hashlib.sha256(centers[1]).hexdigest()
        summary_file.write(json.dumps({**summary, "versions": _versions(), **digests}, indent=2).encode())


def identity(path: Path) -> tuple[int, ...] | None:
    """Device, inode, size and time of a file, by which it differs from its replacement; None if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError for a name with a NUL
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def jsonable(value: Any) -> Any:
    """Value of an option, with paths as strings."""
    if isinstance(value, Path):
        return str(value)
    return [str(path) for path in value] if isinstance(value, (list, tuple)) else value


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def size_range(sizes: Tensor) -> str:
    """Text of the range of some sizes."""
    return f"{int(sizes.min()):,} to {int(sizes.max()):,}" if len(sizes) else "0"


def _versions() -> dict[str, str]:
    return {
        "mcl_kernels": mcl_kernels.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


def _check_target(name: str, path: Path) -> None:
    """Raises if a file cannot be renamed over the target of a path."""
    target = link_target(path)
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise OSError(error.errno, f"{name} cannot be written ({error.strerror})", str(path)) from None
    if stat.S_ISLNK(mode):
        raise ValueError(f"{name} must be a file: {path} is a loop of symbolic links")
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{name} must be a file: {path} is a directory")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} must be a regular file: got {path}")
    if str(target) in _mount_points():
        raise ValueError(f"{name} must be a file that can be replaced: {path} is mounted by itself; name another")
    if hasattr(os, "geteuid"):
        directory = target.parent.stat()
        allowed = (0, directory.st_uid, target.stat().st_uid)
        if directory.st_mode & stat.S_ISVTX and os.geteuid() not in allowed:
            raise PermissionError(f"{name} must be a file that can be replaced: {path} belongs to another user")


def _mount_points() -> list[str]:
    """Paths of mount points, which may be single files; empty on systems that do not list them."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    escaped = (line.split()[4] for line in lines)
    return [re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), path) for path in escaped]


def _is_same(a: Path, b: Path) -> bool:
    return link_target(a) == link_target(b) or (a.exists() and b.exists() and a.samefile(b))
