"""Sources of rows: a tensor or an array in memory, the file behind a memory map, or an iterable of chunks.

A pass reads the rows in order, in chunks; results are the same for any sizes of chunks. A file is read, not mapped,
because touched pages of a map count as resident memory. Of its two buffers one is filled while the caller computes with
the other.
"""

from __future__ import annotations

import io
import logging
import math
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mcl_kernels._validate import check_embeddings
from mcl_kernels.normalize import compute_dtype

CHUNK_BYTES = 1 << 26
CHUNK_MULTIPLE = 1024  # rows; chunks of a multiple of it are complete tiles for every implementation
COMPARED_ROWS = 4096  # rows copied at a time

Array = np.ndarray[Any, Any]
Extremes = Callable[[Tensor, "Tensor | None"], Tensor]

_log = logging.getLogger(__name__)


class Survey(NamedTuple):
    """Number of rows, and values of each column, [width] in the dtype of centres, which one read finds."""

    rows: int
    low: Tensor  # the smallest entry
    high: Tensor  # the largest
    nearest: Tensor  # the smallest nonzero distance to a given value; infinite without a value, or if all are equal

    def lacks_distances(self, middle: Tensor) -> bool:
        """Returns whether a column has a distance to its value in `middle` that this survey did not find."""
        has_distance = ~middle.isnan() & ((self.low != middle) | (self.high != middle))
        return bool((has_distance & self.nearest.isinf()).any())


def find_extremes(x: Tensor, middle: Tensor | None) -> Tensor:
    """Finds the smallest and the largest entry of each column, and its distance to `middle`, [3, D]: see `Survey`."""
    low, high = x.amin(0).to(compute_dtype(x)), x.amax(0).to(compute_dtype(x))
    nearest = torch.full_like(low, math.inf)
    columns = (~middle.isnan()).nonzero().squeeze(1) if middle is not None else ()
    if middle is not None and len(columns):
        for begin in range(0, len(x), COMPARED_ROWS):
            distances = (x[begin : begin + COMPARED_ROWS, columns] - middle[columns]).abs()
            distances = torch.where(distances > 0, distances, math.inf)
            nearest[columns] = torch.minimum(nearest[columns], distances.amin(0))
    return torch.stack((low, high, nearest))


class Rows:
    """Rows [N, width] of one dtype and device.

    Attributes:
        name: name of the argument, for errors.
        like: an empty tensor of the same width, dtype and device.
        n_rows: N; None for an iterable that was not read yet.
    """

    n_rows: int | None = None
    _surveyed: Survey | None = None

    def __init__(self, name: str, like: Tensor) -> None:
        check_embeddings(name, like)
        self.name, self.like = name, like[:0].detach()
        self.width, self.dtype, self.device = like.shape[1], like.dtype, like.device

    def chunks(self) -> Iterator[Tensor]:
        """Yields all rows in order; a chunk is valid until the next one is requested."""
        raise NotImplementedError

    def take(self, index: Tensor) -> Tensor:
        """Returns the rows at ascending positions."""
        taken, begin, index = [], 0, index.to(self.device)
        for chunk in self.chunks():
            here = index[(index >= begin) & (index < begin + len(chunk))]
            taken.append(chunk[here - begin])
            begin += len(chunk)
        return torch.cat(taken)

    def load(self) -> Tensor:
        """Returns all rows in memory."""
        return torch.cat([self.like, *(chunk.clone() for chunk in self.chunks())])

    def count(self, extremes: Extremes | None = None) -> int:
        """Number of rows; read from the data if it is not known, by a survey."""
        return self.survey(extremes).rows if self.n_rows is None else self.n_rows

    def survey(self, extremes: Extremes | None = None, middle: Tensor | None = None) -> Survey:
        """Reads all rows, unless an earlier survey found the same.

        Raises a ValueError that names the first row that is not finite.

        Args:
            extremes: finds the smallest and the largest entries of a chunk, NaN for a column that holds NaN, and the
                smallest distances. None: `find_extremes`.
            middle: [width], a value of each column whose nonzero distances are of interest, NaN for other columns.
        """
        if self._surveyed is None or (middle is not None and self._surveyed.lacks_distances(middle)):
            self._surveyed = self._survey(extremes or find_extremes, middle)
        return self._surveyed

    def _survey(self, extremes: Extremes, middle: Tensor | None) -> Survey:
        rows, low = 0, torch.full((self.width,), math.inf, dtype=compute_dtype(self.like), device=self.device)
        high, nearest = -low, low
        for chunk in self.chunks():
            if len(chunk):
                chunk_low, chunk_high, chunk_nearest = extremes(chunk, middle)
                # Both propagate NaN.
                low, high = torch.minimum(low, chunk_low), torch.maximum(high, chunk_high)
                nearest = torch.minimum(nearest, chunk_nearest)
                if not bool((high - low).isfinite().all()):
                    self.refuse_not_finite(chunk, rows)
            rows += len(chunk)
        return Survey(rows, low, high, nearest)

    def refuse_not_finite(self, chunk: Tensor, first: int) -> None:
        """Raises if a row of the chunk is not finite; the error names it. `first` is the position of the chunk."""
        for begin in range(0, len(chunk), CHUNK_MULTIPLE):
            bad = ~chunk[begin : begin + CHUNK_MULTIPLE].isfinite().all(1)
            if bool(bad.any()):
                row = first + begin + int(bad.nonzero()[0])
                raise ValueError(f"{self.name} must be finite: got NaN or infinity in row {row}")


class TensorRows(Rows):
    """Rows in memory, read as one chunk."""

    def __init__(self, name: str, x: Tensor) -> None:
        super().__init__(name, x)
        if x.is_meta:
            raise ValueError(f"{name} must hold values: got a tensor on the device meta")
        # Implementations need contiguous rows: one copy here instead of one in every pass.
        self.x = x.detach().contiguous() if x.stride(1) != 1 else x.detach()
        self.n_rows = len(x)

    def chunks(self) -> Iterator[Tensor]:
        yield self.x

    def load(self) -> Tensor:
        return self.x

    def take(self, index: Tensor) -> Tensor:
        return self.x[index.to(self.device)]


class FileRows(Rows):
    """Rows of a file: the first one begins at byte `position`, the others follow every `row_bytes`."""

    n_rows: int

    def __init__(
        self,
        name: str,
        path: str | os.PathLike[str],
        position: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        row_bytes: int | None = None,
    ) -> None:
        super().__init__(name, torch.empty(0, shape[1], dtype=dtype, device="cpu"))
        self.path, self.position, self.n_rows = path, position, shape[0]
        self.width_bytes = self.width * dtype.itemsize
        self.row_bytes = self.width_bytes if row_bytes is None else row_bytes
        available = max(os.stat(path).st_size - position, 0)
        if available < self._extent(self.n_rows):
            raise self._truncated(available // self.row_bytes)

    def chunks(self) -> Iterator[Tensor]:
        size = _chunk_rows(self.row_bytes)
        n_buffers, buffer_bytes = 2 if self.n_rows > size else 1, self._extent(min(size, self.n_rows))
        buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, device="cpu") for _ in range(n_buffers)]
        with open(self.path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as reader:

            def read(begin: int) -> Tensor:
                rows, buffer = min(size, self.n_rows - begin), buffers[begin // size % 2]
                self._read(file, begin, buffer.numpy().data[: self._extent(rows)])
                return buffer.as_strided((rows, self.width_bytes), (self.row_bytes, 1)).view(self.dtype)

            ahead = reader.submit(read, 0)
            for begin in range(0, max(self.n_rows, 1), size):  # a file without rows has one empty chunk
                chunk = ahead.result()
                _log.info("%s: row %s of %s", self.name, f"{begin:,}", f"{self.n_rows:,}")
                if begin + size < self.n_rows:
                    ahead = reader.submit(read, begin + size)
                yield chunk

    def take(self, index: Tensor) -> Tensor:
        taken = torch.empty(len(index), self.width_bytes, dtype=torch.uint8, device="cpu")
        with open(self.path, "rb", buffering=0) as file:
            for row, into in zip(index.tolist(), taken.numpy(), strict=True):
                self._read(file, row, into.data)
        return taken.view(self.dtype)

    def _read(self, file: io.FileIO, first: int, into: memoryview) -> None:
        """Fills the buffer with the bytes of the file from row `first` on."""
        filled, position = 0, self.position + first * self.row_bytes
        while filled < len(into):
            n_read = _read_at(file, position + filled, into[filled:])
            if not n_read:
                raise self._truncated(first + filled // self.row_bytes)
            filled += n_read

    def _extent(self, rows: int) -> int:
        """Number of bytes from the first to the last entry of that many rows."""
        return (rows - 1) * self.row_bytes + self.width_bytes if rows else 0

    def _truncated(self, row: int) -> ValueError:
        return ValueError(f"{self.name} ends in row {row} of {self.n_rows}: {os.fspath(self.path)} is truncated")


def _read_at(file: io.FileIO, position: int, into: memoryview) -> int:
    """Reads into the buffer from a position of the file; returns the number of bytes."""
    if hasattr(os, "preadv"):  # one system call instead of two; missing on Windows
        return os.preadv(file.fileno(), [into], position)
    file.seek(position)
    return file.readinto(into) or 0


class ChunkedRows(Rows):
    """Rows of an iterable of chunks, such as a DataLoader, that yields the same rows in every pass."""

    def __init__(self, name: str, x: Iterable[Any]) -> None:
        if iter(x) is x:
            raise TypeError(f"{name} must be iterable more than once: got {type(x).__name__}, which is read once")
        first = next(_checked_chunks(name, x), None)
        if first is None:
            raise ValueError(f"{name} must yield at least one chunk: got none")
        super().__init__(name, first)
        self.iterable = x
        self.first_row = first[0].clone()

    def chunks(self) -> Iterator[Tensor]:
        return self.chunks_of(_chunk_rows(self.width * self.dtype.itemsize))

    def chunks_of(self, size: int) -> Iterator[Tensor]:
        """Yields all rows in order in chunks of `size` rows, however the iterable is chunked."""
        buffer = torch.empty(size, self.width, dtype=self.dtype, device=self.device)
        filled = rows = 0
        for chunk in _checked_chunks(self.name, self.iterable, self.like):
            if rows == 0 and not torch.allclose(chunk[0], self.first_row, rtol=0, atol=0, equal_nan=True):
                raise ValueError(f"{self.name} must yield the same rows in every pass (no shuffling): row 0 differs")
            rows += len(chunk)
            while len(chunk):
                fitting = min(size - filled, len(chunk))
                buffer[filled : filled + fitting] = chunk[:fitting]
                chunk, filled = chunk[fitting:], filled + fitting
                if filled == size:
                    yield buffer
                    filled = 0
        if rows == 0 or self.n_rows not in (None, rows):
            earlier = self.n_rows or "at least one"
            raise ValueError(f"{self.name} must yield the same rows in every pass: got {rows} after {earlier}")
        self.n_rows = rows
        if filled:
            yield buffer[:filled]


def _checked_chunks(name: str, iterable: Iterable[Any], like: Tensor | None = None) -> Iterator[Tensor]:
    """Yields the chunks of an iterable as tensors; raises if one differs from `like` in width, dtype or device."""
    for number, chunk in enumerate(iterable):
        chunk_name = f"chunk {number} of {name}"
        if isinstance(chunk, (tuple, list)) and len(chunk) == 1:  # a DataLoader of a TensorDataset
            chunk = chunk[0]
        if not isinstance(chunk, (Tensor, np.ndarray)):
            raise TypeError(f"{chunk_name} must be a tensor or an array of rows: got {_described_chunk(name, chunk)}")
        rows = as_tensor(chunk_name, chunk)
        check_embeddings(chunk_name, rows)
        if len(rows) == 0:
            raise ValueError(f"{chunk_name} must have at least one row: got 0")
        if like is not None and (rows.shape[1], rows.dtype, rows.device) != (like.shape[1], like.dtype, like.device):
            raise ValueError(
                f"{chunk_name} must have {like.shape[1]} features of {like.dtype} on {like.device}, as the first one: "
                f"got {rows.shape[1]} of {rows.dtype} on {rows.device}"
            )
        yield rows.detach()


RowsLike = Tensor | Array | Iterable[Any] | Rows


def open_rows(name: str, x: object) -> Rows:
    """Opens an argument as a source of rows."""
    if isinstance(x, Rows):
        return x
    if isinstance(x, np.memmap) and x.mode != "c":
        mapped = getattr(x, "_mmap", None)  # None for the result of arithmetic, which is in memory
        if mapped is not None and x.filename is not None:
            return _open_map(name, x, x.filename, mapped)
    if isinstance(x, (Tensor, np.ndarray)):
        return TensorRows(name, as_tensor(name, x))
    if hasattr(x, "to_numpy"):
        return TensorRows(name, as_tensor(name, _frame_array(name, x)))
    # Iterating over another library's array yields single rows, which are refused.
    conversions = {
        "toarray": f"{name}.toarray()",
        "__array__": f"numpy.asarray({name})",
    }
    use = next((f"; use {call}" for method, call in conversions.items() if hasattr(x, method)), "")
    if isinstance(x, Iterable) and not isinstance(x, (str, bytes, Mapping)) and not use:
        return ChunkedRows(name, x)
    raise TypeError(f"{name} must be a tensor, an array or an iterable of chunks of rows: got {type(x).__name__}{use}")


def _frame_array(name: str, frame: Any) -> Array:
    """Returns the rows of a DataFrame: floats as they are, other numbers as fp64."""
    values = np.asarray(frame.to_numpy())
    if values.dtype.kind == "f":
        return values
    # Columns of several types, or of pandas' own types, are objects.
    is_numeric = all(isinstance(value, Real) for value in values.flat) if values.dtype == object else False
    if not is_numeric and values.dtype.kind not in "biu":
        raise TypeError(f"{name} must have numeric columns without missing entries: got dtype {values.dtype}")
    return values.astype(np.float64)


def _described_chunk(name: str, chunk: object) -> str:
    """Text for an error: the type of a chunk that is not a tensor, and the remedy."""
    kind = type(chunk).__name__
    if isinstance(chunk, Mapping):
        return f"{kind} with the keys {list(chunk)}; give the rows alone"
    if isinstance(chunk, (tuple, list)) and any(isinstance(part, (Tensor, np.ndarray)) for part in chunk):
        return f"a {kind} of {len(chunk)}; give {name} alone, without labels"
    if isinstance(chunk, (tuple, list, Real)):
        return f"{kind}; for rows of numbers use torch.tensor({name})"
    return kind


def _chunk_rows(row_bytes: int) -> int:
    """Number of rows of a chunk."""
    rows = max(CHUNK_BYTES // row_bytes, 1)
    return rows if rows < CHUNK_MULTIPLE else rows // CHUNK_MULTIPLE * CHUNK_MULTIPLE


def _open_map(name: str, x: np.memmap[Any, Any], path: str, mapped: mmap.mmap) -> FileRows:
    """Opens the file of a memory map, or of a slice of a map whose rows are in ascending order."""
    like = as_tensor(name, np.empty((0, *x.shape[1:]), x.dtype))
    check_embeddings(name, torch.empty(x.shape, dtype=like.dtype, device="meta"))
    row_bytes, entry_bytes = x.strides
    width_bytes = x.shape[1] * x.itemsize
    if (entry_bytes != x.itemsize and x.shape[1] > 1) or (row_bytes < width_bytes and len(x) > 1):
        raise ValueError(
            f"{name} must be a memory map whose rows are contiguous: got strides {x.strides} in bytes; save the array "
            "in C order: np.save(path, np.ascontiguousarray(x))"
        )
    # A slice of a map keeps the `offset` of the map; the beginning of the slice follows from its address.
    mapped_from = x.offset - x.offset % mmap.ALLOCATIONGRANULARITY
    begin = x.__array_interface__["data"][0] - np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
    rows = FileRows(name, path, mapped_from + begin, x.shape, like.dtype, max(row_bytes, width_bytes))
    if len(x) and rows.take(torch.zeros(1, dtype=torch.int64, device="cpu")).numpy().tobytes() != x[:1].tobytes():
        raise ValueError(f"{name} must be a map of what {path} holds now: its first row is another one")
    return rows


def as_tensor(name: str, x: Any) -> Any:
    """Returns an array as a tensor that shares its memory; anything else unchanged."""
    if not isinstance(x, np.ndarray):
        return x
    if not x.dtype.isnative:
        raise TypeError(f"{name} must have the byte order of this machine: got {x.dtype.str}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # the tensor is only read
        try:
            return torch.from_numpy(np.ascontiguousarray(x))
        except TypeError:
            raise TypeError(f"{name} must hold integers or floating point numbers: got dtype {x.dtype}") from None
