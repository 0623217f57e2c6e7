"""Labels of a data set that behave as an int64 tensor, and are stored as int32 or in a memory map."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mcl_kernels._forked import use_one_thread_if_forked
from mcl_kernels.kmeans.rows import as_tensor

# Properties and methods that read no element.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "layout", "ndim", "requires_grad", "shape")),
    *(Tensor.__len__, Tensor.dim, Tensor.numel, Tensor.size),
}


class MappedFile(NamedTuple):
    """A file, with the properties that distinguish it from a later file of the same name."""

    path: Path
    size: int
    modified: int  # nanoseconds


class StoredLabels(Tensor):
    """An int64 vector whose elements are stored as integers of any width, in memory or mapped from a file.

    Indexing reads, widens and copies only the elements it returns. Every other operation first makes a plain int64
    tensor of all labels, so this works wherever a tensor does. Read-only. Other processes, such as the workers of a
    `DataLoader`, get no copy: they map the file again, or share the memory.

    Example:
        >>> labels = StoredLabels(torch.tensor([5, 0, 5], dtype=torch.int32))
        >>> labels.dtype, labels[[0, 1]], labels.bincount()
        (torch.int64, tensor([5, 0]), tensor([1, 0, 0, 0, 0, 2]))
    """

    stored: Tensor
    file: MappedFile | None

    @staticmethod
    def __new__(cls, stored: Tensor, file: MappedFile | None = None) -> StoredLabels:
        labels = stored.as_subclass(cls)
        labels.stored, labels.file = stored, file
        return labels

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        use_one_thread_if_forked()
        kwargs = kwargs or {}
        first = args[0] if args else None
        writes = func is Tensor.__setitem__ or (func.__name__.endswith("_") and not func.__name__.endswith("__"))
        if (writes and isinstance(first, cls)) or isinstance(kwargs.get("out"), cls):
            raise TypeError("labels are read-only: take a copy, labels.clone()")
        if func in _METADATA and isinstance(first, cls):
            same_shape = torch.zeros((), dtype=torch.int64, device=first.stored.device).expand(first.stored.shape)
            return func(same_shape, *args[1:], **kwargs)
        if func is Tensor.__getitem__ and isinstance(first, cls):
            return first.stored[_widened(args[1])].to(torch.int64, copy=True)
        return func(*_widened(args), **_widened(kwargs))


def map_labels(path: Path) -> StoredLabels:
    """Maps the labels of a .npy file; labels that are not read take no memory."""
    file = _file_at(path.absolute())
    return StoredLabels(as_tensor(str(path), np.load(path, mmap_mode="r", allow_pickle=False)), file)


def _file_at(path: Path) -> MappedFile:
    status = path.stat()
    return MappedFile(path, status.st_size, status.st_mtime_ns)


def _reduce(labels: StoredLabels) -> tuple[Callable[..., StoredLabels], tuple[Any, ...]]:
    """Pickles labels for another process: as the path of their file, or as a tensor in shared memory."""
    if labels.file is None:
        return StoredLabels, (labels.stored,)
    path = labels.file.path
    if not path.exists() or _file_at(path) != labels.file:
        raise RuntimeError(f"{path} was replaced or deleted: another process cannot map these labels; clone() them")
    return map_labels, (path,)


# Without this, pickling would send a temporary plain tensor, whose memory is freed before a spawned process opens it.
ForkingPickler.register(StoredLabels, _reduce)


def _widened(x: Any) -> Any:
    """Replaces stored labels by plain int64 tensors, in nested containers too."""
    return tree_map(lambda leaf: leaf.stored.to(torch.int64, copy=True) if isinstance(leaf, StoredLabels) else leaf, x)
