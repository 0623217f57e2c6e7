"""What a pass over the data has to know of the centres; implementations of a pass share this, and nothing else.

    assign(x, centers)           labels int64 [N], distances [N] in the dtype of the centres
    assign_and_sum(x, centers)   the same, and for each centre the sum of its rows relative to the offset, fp64 [K, D],
                                 and their number, int64 [K]
    follow(x, centers, labels)   where it is there, what iterations use: labels int32 [N] of an earlier pass with the
                                 same offset, -1 for none, become those of this one; returned are distances, and the
                                 changes of sums and numbers since

Since sums are exact, adding up their changes gives the bits of a sum of all rows.

The nearest centre is found by a product, the lowest score |c|^2 / 2 - <x, c> relative to the offset. Where the two
lowest are so close that rounding could have decided, distances are taken from differences in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mcl_kernels.normalize import normalize_rows

Array = np.ndarray[Any, np.dtype[np.float64]]

SUMMED_ROWS = 1024  # that are copied at a time
COMPARED_ENTRIES = 1 << 22  # distances in fp64 at a time
SERIAL = 1 << 14  # numbers that PyTorch sums by one thread
SURVEYED_ROWS = 256  # enough to tell the offset and the scale of each column
SURVEYED_CENTERS = 64
SCALE_BITS = 24  # of a column's scale, as many as fp32 has, are kept in sums
MIN_FAR, MAX_FAR = 2.0**8, 2.0**11  # entry over scale that one level always takes, of many rows, and that GPUs resolve
UNSEEN_BITS = 64  # below the largest entry, where the scale of a column is not known
MIN_EXPONENT = -960
SMALLEST_FP32 = 2.0**-40  # differences whose squares fp32 still resolves
NEAR = 2.0**-12  # a squared distance between rows of length 1 in which rounding of the rows shows


class Summary(NamedTuple):
    """Statistics of a whole data set, so that sums over it are exact whatever the chunks it comes in."""

    rows: int
    dtype: torch.dtype  # of products and distances: fp64 where squares leave the range of fp32
    offset: Tensor  # [D] in that dtype, about the middle of the data; 0 where cosine
    largest: Tensor  # fp64 [D], entry relative to the offset by magnitude, or above it
    rounding: Tensor  # fp64 [levels, D], see `Centers`


class Centers(NamedTuple):
    """Centres, and what rows are computed relative to: an offset of the data costs no digits.

    Before they are summed, entries relative to the offset are rounded to multiples of 2^-52 times a bound of their
    column's sums, so that fp64 sums of these are exact: the same bits in any order of rows, so for any number of
    threads and any chunks of the data. Where a column has entries far beyond its scale one level would lose the others:
    what rounding left is then summed by itself, on as many further levels as the scale asks for.
    """

    points: Tensor  # [K, D] fp32 or fp64, of unit length where cosine
    offset: Tensor  # [D], 0 where cosine
    cosine: bool
    largest: Tensor  # fp64 [D] as those of the summary; 0 where nothing is summed
    rounding: Tensor  # fp64 [levels, D], 1.5 * 2^e, where no sum of a level's entries is above 2^e

    def rounded(self, x: Tensor) -> Tensor:
        """Rows as they are summed, fp64 [levels, N, D]."""
        x = x.to(self.points.dtype)  # as kernels round them
        left = (unit_rows(x) if self.cosine else x - self.offset).double()
        levels = []
        for rounding in self.rounding:
            levels.append((left + rounding) - rounding)
            left = left - levels[-1]
        return torch.stack(levels)

    def sum_rows(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums [levels, K, D] and numbers of rows whose labels are known; exact sums may be added up in any order."""
        sums = self.offset.new_zeros(len(self.rounding), *self.points.shape, dtype=torch.float64)
        for start in range(0, len(x), SUMMED_ROWS):
            rows = slice(start, start + SUMMED_ROWS)
            sums.index_add_(1, labels[rows], self.rounded(x[rows]))
        return sums, torch.bincount(labels, minlength=len(self.points))

    def means(self, sums: Tensor, counts: Tensor) -> Tensor:
        """[K, D], of unit length where cosine; a centre without rows stays where it is."""
        means = self.offset.double() + sums.sum(0) / counts.clamp(min=1).unsqueeze(1)
        means = torch.where(counts.unsqueeze(1) > 0, means, self.points.double())
        return (normalize_rows(means) if self.cosine else means).to(self.points.dtype)


def undecided_rows(gap: Tensor, bound: Tensor, width: int) -> Tensor:
    """Where rounding could give a row another label, bool [N]: by how far its second lowest score is above the lowest.

    `bound` times the error of a product is the error of a score. A product of `width` numbers, each of them rounded,
    with as much again to spare; and what it loses below the normal numbers.
    """
    limits = torch.finfo(gap.dtype)
    return ~(gap > 2 * ((width + 8) * limits.eps * bound + 4 * width * limits.tiny))


def score_bound(squares: Tensor, second: Tensor, largest: Tensor) -> Tensor:
    """|c| (|c| / 2 + |x|), [N], or above it, of rows with these |x|^2 and the two centres of the lowest scores.

    The norm of a centre is at most the largest one, and at most |x| + |x - c|, where |x - c|^2 = |x|^2 + 2 s for its
    score s: one far centre takes no digits from the others.
    """
    return torch.minimum(largest.square() / 2 + largest * squares.sqrt(), 4 * squares + 3 * second)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product a @ b.T in the dtype of both, exact as fp32 is, whatever PyTorch's setting for fp32 products."""
    try:
        is_exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch does not answer once its newer switch was used
        is_exact = False
    if a.dtype == torch.float32 and not is_exact:
        return (a.double() @ b.double().T).float()
    return a @ b.T


def settle(x: Tensor, centers: Centers, labels: Tensor, distances: Tensor, undecided: Tensor) -> Tensor:
    """Gives the undecided rows, bool [N], their nearest centre, in place: from differences in fp64, of equally near
    ones the first. Cosine distances next to 0, in which rounding shows, are taken from differences, too.

    Returns the indices of the undecided rows.
    """
    index = undecided.nonzero().squeeze(1)
    points = centers.points.double()
    points = unit_rows(points) if centers.cosine else points
    without_direction = (points == 0).all(1)
    for part in _parts(index, points):
        rows = x[part].double()
        rows = unit_rows(rows) if centers.cosine else rows
        every = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist").square()
        if centers.cosine:
            every = torch.where((rows == 0).all(1, keepdim=True) | without_direction, 1.0, every / 2)
        labels[part] = every.argmin(1)
        distances[part] = every.gather(1, labels[part].unsqueeze(1)).squeeze(1).to(distances.dtype)
    if centers.cosine:
        distances[without_direction[labels]] = 1.0
        for part in _parts(((distances < NEAR) & ~undecided).nonzero().squeeze(1), points):
            differences = unit_rows(x[part].double()) - points[labels[part]]
            distances[part] = (differences.square().sum(1) / 2).to(distances.dtype)
    return index


def _parts(index: Tensor, points: Tensor) -> Iterator[Tensor]:
    """An index of rows in parts that take little memory in fp64, compared with all points."""
    size = max(COMPARED_ENTRIES // max(points.shape), 1)
    for start in range(0, len(index), size):
        yield index[start : start + size]


def unit_rows(x: Tensor) -> Tensor:
    """x_i / |x_i| for norms of any size; 0 for a zero row, and a row as it is whose length is 1 to rounding."""
    largest = x.abs().amax(1, keepdim=True)
    scaled = x / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    is_unit = (norm * largest - 1).abs() < 4 * torch.finfo(x.dtype).eps
    return torch.where(is_unit, x, scaled / torch.where(norm > 0, norm, 1.0))


def middle_and_scale(x: Tensor, metric: str, spread: Tensor) -> Tensor:
    """Median of each column, and of its distances to it that are not 0, [2, D]: some far rows change neither.

    For cosine 0 and the scale of entries. Scale 0 is that of a column in which no entries differ, such as those whose
    `spread` [D], largest entry less the least, is 0.
    """
    drawn = torch.randint(len(x), (SURVEYED_ROWS,), generator=torch.Generator().manual_seed(0), device="cpu")
    rows = x[drawn.to(x.device)].double().cpu().numpy()
    middle = np.partition(rows, len(rows) // 2, axis=0)[len(rows) // 2]
    if metric == "cosine":
        middle = np.zeros_like(middle)
    away = np.sort(np.ascontiguousarray(np.abs(rows - middle).T), axis=1)
    zeros = (away == 0).sum(1)
    scale = np.take_along_axis(away, (zeros + len(rows) - 1)[:, None] // 2, axis=1).squeeze(1)
    rare = (scale == 0) & (spread.cpu().numpy() > 0)  # entries: all rows are searched
    for column in np.flatnonzero(rare).tolist():
        others = np.abs(x[:, column].double().cpu().numpy() - middle[column])
        scale[column] = np.median(others[others > 0]) if others.any() else 0.0
    return torch.from_numpy(np.stack((middle, scale))).to(x.device)


def summarize(
    rows: int, low: Tensor, high: Tensor, middle_and_scale: Tensor, metric: str, init: Tensor | str = ""
) -> Summary:
    """Summary of so many rows between `low` and `high`, [D] each, and of given centres [K, D]."""
    middle, scale = middle_and_scale
    largest = torch.maximum(high.double() - middle.double(), middle.double() - low.double())
    farthest, dtype = float(largest.max()), middle.dtype
    if isinstance(init, Tensor):
        farthest = max(farthest, float((init.double() - middle.double()).abs().max()))
    if not _fits(farthest, float(scale.max()), len(middle), dtype):
        dtype = torch.float64
    if metric == "cosine":
        largest, scale = torch.ones_like(largest), torch.ones_like(largest)
    rounding = _levels(rows, largest.cpu().numpy(), scale.double().cpu().numpy())
    return Summary(rows, dtype, middle.to(dtype), largest, torch.from_numpy(rounding).to(middle.device))


def _fits(largest: float, scale: float, width: int, dtype: torch.dtype) -> bool:
    """Returns whether sums of `width` squares, and squares of usual differences, are in the range of a dtype."""
    if dtype == torch.float64:
        return True
    return largest <= math.sqrt(torch.finfo(dtype).max / (8 * width)) and (scale or largest or 1.0) >= SMALLEST_FP32


def _levels(rows: int, largest: Array, scale: Array) -> Array:
    """Numbers that round the entries of each level of sums, fp64 [levels, D]: see `Centers.rounding`."""
    scale = np.where(scale > 0, scale, np.ldexp(largest, -UNSEEN_BITS))
    far = largest > scale * min(max(2.0 ** (52 - SCALE_BITS) / rows, MIN_FAR), MAX_FAR)
    levels, bound = [], largest
    while True:
        exponents = np.maximum(np.frexp(bound * rows)[1], MIN_EXPONENT)
        levels.append(np.ldexp(1.5, exponents))
        unit = np.ldexp(1.0, exponents - 52)
        if not (far & (unit > np.ldexp(scale, -SCALE_BITS)) & (exponents > MIN_EXPONENT)).any():
            return np.stack(levels)
        bound = unit / 2


def prepare(points: Tensor, metric: str, summary: Summary | None = None, dtype: torch.dtype | None = None) -> Centers:
    """Centres for passes over data of that summary. Without one there are no sums, and the dtype is that of products:
    by default that of the points, or fp64 where their squares would leave its range."""
    cosine = metric == "cosine"
    if summary is not None:
        points = points.to(summary.dtype)
        points = unit_rows(points) if cosine else points
        return Centers(points, summary.offset, cosine, summary.largest, summary.rounding)
    middle = _spread(points, SURVEYED_CENTERS).median(0).values
    offset = torch.zeros_like(middle) if cosine else middle
    if dtype is None:
        dtype, largest = points.dtype, float((points.double() - offset.double()).abs().max())
        dtype = dtype if cosine or largest == 0 or _fits(largest, largest, len(middle), dtype) else torch.float64
    points, offset = points.to(dtype), offset.to(dtype)
    nothing = torch.zeros_like(offset, dtype=torch.float64)
    return Centers(unit_rows(points) if cosine else points, offset, cosine, nothing, nothing.unsqueeze(0))


def _spread(x: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    return x[:: -(-len(x) // most)] if len(x) > most else x


def serial_sum(x: Tensor) -> float:
    """Sum of a vector in fp64, in one order whatever the number of threads."""
    if x.device.type != "cpu":
        return float(x.sum(dtype=torch.float64))
    return math.fsum(float(x[start : start + SERIAL].sum(dtype=torch.float64)) for start in range(0, len(x), SERIAL))
