"""Input files of the commands, features and labels: read in chunks or mapped, checked first, never unpickled."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mcl_kernels._durable import open_regular, sha256_of
from mcl_kernels._validate import as_integer_vector
from mcl_kernels.kmeans.rows import FileRows, Rows, as_tensor, open_rows
from mcl_kernels.stages.stored_labels import StoredLabels

SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")


def open_features(path: Path, tensor: str | None) -> Rows:
    """Rows of a .npy, .pt or .safetensors file; `tensor` is the name of the tensor, if there are several."""
    if path.suffix == ".safetensors":
        return _open_safetensors(path, tensor)
    if path.suffix not in (".npy", ".pt"):
        raise ValueError(f"FEATURES must be a .npy, .pt or .safetensors file: got {path}")
    loaded = _load(path)
    if isinstance(loaded, dict):
        loaded = loaded[_choose(path, list(loaded), tensor)]
    elif tensor is not None:
        raise ValueError(f"--tensor is for files of several tensors: {path} holds one")
    if not isinstance(loaded, (Tensor, np.ndarray)):
        raise TypeError(f"{path} must hold a tensor or an array: got {type(loaded).__name__}")
    if isinstance(loaded, Tensor):
        _check_tensor(path, loaded)
        if loaded.ndim == 2 and not _has_contiguous_rows(loaded):
            raise ValueError(
                f"{path} must hold a tensor whose rows are contiguous: got shape {list(loaded.shape)} with strides "
                f"{loaded.stride()}; save a copy: torch.save(x.clone(memory_format=torch.contiguous_format), path)"
            )
    if loaded.ndim == 2:
        _check_not_empty(path, loaded.shape)
    return open_rows(str(path), loaded)


def open_labels(path: Path, n: int) -> StoredLabels:
    """Maps a file of n labels: cluster ids of one earlier stage, or pseudo labels of several."""
    if path.suffix not in (".npy", ".pt"):
        raise ValueError(f"--previous must be .npy or .pt files: got {path}")
    loaded = as_tensor(str(path), _load(path))
    if isinstance(loaded, Tensor):
        _check_tensor(path, loaded)
    as_integer_vector(str(path), torch.empty_like(loaded, device="meta") if isinstance(loaded, Tensor) else loaded)
    if len(loaded) != n:
        raise ValueError(f"{path} must have one label per row of FEATURES: got {len(loaded)} labels for {n} rows")
    _check_summary(path)
    return StoredLabels(loaded)


def summary_of(labels: Path) -> Path:
    """Path of the summary that describes a file of labels."""
    return labels.with_name(f"{labels.name}.json")


def _check_summary(path: Path) -> None:
    """Raises if the summary next to the labels describes others: a run was killed between the two renames."""
    summary = summary_of(path)
    try:
        with open_regular(summary) as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return  # labels need no summary, and a file of this name may have another purpose
    digest = content.get("sha256") if isinstance(content, dict) else None
    if isinstance(digest, str) and digest != sha256_of(path):
        raise ValueError(
            f"{path} is not the file that {summary} describes: their SHA-256 differ, since a run ended between the "
            f"two, or one was replaced; run that stage again, or delete {summary} to use the labels as they are"
        )


def _open_safetensors(path: Path, tensor: str | None) -> FileRows:
    """Rows of a tensor of the file, which are read in place; bfloat16 is supported."""
    from safetensors import SafetensorError, safe_open

    with open_regular(path) as file:
        try:
            with safe_open(path, "np") as opened:  # checks header, shapes and offsets
                name = _choose(path, list(opened.keys()), tensor)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        header_bytes = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_bytes))[name]
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise TypeError(f"{name} of {path} must be one of {', '.join(SAFETENSORS_DTYPES)}: got {entry['dtype']}")
    if len(entry["shape"]) != 2:
        raise ValueError(f"{name} of {path} must have shape [rows, features]: got {entry['shape']}")
    _check_not_empty(path, entry["shape"])
    position = 8 + header_bytes + entry["data_offsets"][0]
    return FileRows(str(path), path, position, tuple(entry["shape"]), dtype)


def _load(path: Path) -> Any:
    """Content of a .npy or .pt file, memory mapped; no objects are unpickled."""
    with open_regular(path) as file:
        if path.suffix == ".npy":
            return _map_npy(path, file)
        if file.read(4) != b"PK\3\4":
            raise ValueError(
                f"{path} cannot be read: it is not an archive of torch.save; write it with torch.save(x, path)"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file may cause any
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        if found := re.search(r"\bGLOBAL ([\w.]+)", str(error)):
            raise TypeError(
                f"{path} holds {found[1]}, and nothing but tensors is unpickled: save a tensor, "
                "torch.save(torch.as_tensor(x), path)"
            ) from None
        raise _unreadable(path, error) from None
    except Exception as error:  # a damaged archive can raise anything
        raise _unreadable(path, error) from None


def _map_npy(path: Path, file: BinaryIO) -> Any:
    """Maps the array of a .npy file, after comparing its header with the size of the file."""
    header = np.lib.format
    begin = file.read(header.MAGIC_LEN)
    if begin[:6] != header.MAGIC_PREFIX:
        raise ValueError(
            f"{path} cannot be read: it is not a .npy file, since it begins with {begin!r}; write it with "
            "np.save(path, array)"
        )
    try:
        read_header = {b"\1\0": header.read_array_header_1_0, b"\2\0": header.read_array_header_2_0}[begin[6:]]
        shape, fortran_order, dtype = read_header(file)
    except KeyError:
        raise ValueError(f"{path} cannot be read: version {list(begin[6:])} of the format") from None
    except Exception as error:  # a damaged header can raise anything
        raise _unreadable(path, error) from None
    if dtype.hasobject:
        raise TypeError(
            f"{path} holds Python objects, and nothing is unpickled: save an array of numbers, "
            "np.save(path, np.asarray(x, dtype=np.float32))"
        )
    needed, available = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - file.tell()
    if min(shape, default=1) < 0:
        raise ValueError(f"{path} is damaged: its header gives shape {list(shape)}")
    if needed > available:
        raise ValueError(
            f"{path} is truncated: shape {list(shape)} of {dtype} takes {needed:,} bytes, and it holds {available:,}"
        )
    if needed == 0:
        _check_not_empty(path, shape)
    try:
        return np.memmap(path, dtype, "r", file.tell(), tuple(map(int, shape)), "F" if fortran_order else "C")
    except (ValueError, OverflowError) as error:
        raise _unreadable(path, error) from None


def _check_tensor(path: Path, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_quantized or x.is_nested:
        raise TypeError(f"{path} must hold a dense tensor: got {x.layout}; save x.to_dense()")
    if x.device.type != "cpu":
        raise ValueError(f"{path} must hold a tensor with data: got one on the device {x.device}")


def _has_contiguous_rows(x: Tensor) -> bool:
    """Returns whether the elements of each row are adjacent, and rows do not overlap."""
    rows, width = x.shape
    return (width <= 1 or x.stride(1) == 1) and (rows <= 1 or x.stride(0) >= width)


def _check_not_empty(path: Path, shape: Sequence[int]) -> None:
    if math.prod(shape) == 0:
        raise ValueError(f"{path} must not be empty: got shape {list(shape)}")


def _unreadable(path: Path, error: Exception) -> ValueError:
    """Error that names the file, with the first line of what its parser raised."""
    text = _TERMINAL_CODES.sub("", str(error)).strip()
    return ValueError(f"{path} cannot be read: {text.splitlines()[0] if text else type(error).__name__}")


def _choose(path: Path, names: Sequence[str], tensor: str | None) -> str:
    """Name of the tensor to read: the one of `--tensor`, or the only one in the file."""
    if not names:
        raise ValueError(f"{path} must hold a tensor: got none")
    if tensor is None and len(names) == 1:
        return names[0]
    if tensor is None or tensor not in names:
        raise ValueError(f"--tensor must be one of {', '.join(map(str, names))} in {path}: got {tensor}")
    return tensor
