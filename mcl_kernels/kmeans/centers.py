"""Centres for a pass over the data, and the contract and the arithmetic that all implementations of a pass share.

    assign(x, centers)           labels int64 [N], distances [N] in the dtype of the centres
    assign_and_sum(x, centers)   the same, and for each centre the sum of its rows relative to the offset, fp64 [K, D],
                                 and their count, int64 [K]; with `follow` it takes `weights`, too
    follow(x, centers, labels)   optional, for iterations: distances, and the changes of sums and counts since an
                                 earlier pass with the same offset. The labels of that pass, int32 [N], -1 for none,
                                 are updated in place
    follow(x, centers, labels, bounds, shifts)
                                 optional: the same, but rows that keep their label, as the `Bounds` of that pass prove
                                 with the shifts of the centres, are not read, and have NaN for a distance. Without
                                 shifts all rows are read. The bounds are updated in place
    measure(x, centers, labels, bounds, shifts)
                                 optional, with `bounds`: updates labels and bounds alike, and returns all distances

`follow` takes `weights`, fp64 [N] or None: rows are summed times their weights, those of weight 0 are not counted, and
sums have a column more, the sums of the weights. Without `follow`, rows with weights are summed by `Centers.sum_rows`.

Sums are exact, so that adding up their changes gives the bits of a sum of all rows.

The nearest centre is found by a product: it has the lowest score |c|^2 / 2 - <x, c> relative to the offset. If the two
lowest scores are so close that rounding could decide, distances are computed from differences in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels.kmeans.summary import Summary, fits
from mcl_kernels.normalize import normalize_rows

SUMMED_ROWS = 1024  # rows copied at a time
COMPARED_ENTRIES = 1 << 22  # fp64 distances at a time
SERIAL_ELEMENTS = 1 << 14  # PyTorch sums this many elements in one thread
SURVEYED_CENTERS = 64
FEW_CENTERS = 16  # have one group: FEW of csrc/cpu
GROUPED_CENTERS, MAX_GROUPS = 32, 15  # centres of a group of bounds, unless there would be too many groups
DIRECTION_STEPS = 3  # of the power method
TINY = 1e-300  # below the squares of entries of fp32
NEAR = 2.0**-12  # squared distances of unit rows below it are affected by the rounding of the rows

quietly = np.errstate(over="ignore", invalid="ignore")  # sums may overflow, as in PyTorch


class Bounds(NamedTuple):
    """Bounds of the distances, not squared, of each row: to the centre of its label and to every other centre.

    With one group of centres they are Hamerly's (2010), with more those of Yinyang k-means (Ding et al. 2015), widened
    past rounding.
    """

    upper: Tensor  # fp32 [N], at least the distance to the centre of the label; infinite: unknown
    lower: Tensor  # fp32 [N, groups], at most the distance to any other centre of a group
    order: Tensor | None  # int32 [K], the centres in the order of the groups; None for a single group

    @classmethod
    def unknown(cls, rows: int, points: Tensor) -> Bounds:
        """Returns bounds that prove nothing, with groups of centres near `points`."""
        groups = min(-(-len(points) // GROUPED_CENTERS), MAX_GROUPS) if len(points) > FEW_CENTERS else 1
        upper = torch.full((rows,), math.inf, dtype=torch.float32, device=points.device)
        lower = torch.zeros(rows, groups, dtype=torch.float32, device=points.device)
        return cls(upper, lower, _near_together(points) if groups > 1 else None)

    def of(self, rows: slice) -> Bounds:
        """Returns the bounds of a chunk of rows."""
        return Bounds(self.upper[rows], self.lower[rows], self.order)


@quietly
def _near_together(points: Tensor) -> Tensor:
    """Orders centres so that near ones follow one another, int32 [K].

    They are halved again and again, along the direction in which they differ most.
    """
    order, parts = [], [np.arange(len(points))]
    x = in_fp64(points.cpu())
    x = x / max(np.abs(x).max(), TINY)
    while parts:
        part = parts.pop()
        if len(part) <= max(GROUPED_CENTERS // 2, len(points) // (4 * MAX_GROUPS)):
            order.append(part)
            continue
        relative = x[part] - x[part].mean(0)
        direction = relative[np.einsum("kd,kd->k", relative, relative).argmax()]
        for _ in range(DIRECTION_STEPS):
            direction = np.einsum("kd,k->d", relative, np.einsum("kd,d->k", relative, direction))
            direction /= max(np.abs(direction).max(), TINY)
        part = part[np.einsum("kd,d->k", relative, direction).argsort(kind="stable")]
        middle = -(-len(part) // GROUPED_CENTERS) * (GROUPED_CENTERS // 2)
        parts += [part[middle:], part[:middle]]
    return torch.from_numpy(np.concatenate(order).astype(np.int32)).to(points.device)


class Centers(NamedTuple):
    """Centres, and the offset to which rows are relative: data far from 0 lose no digits.

    Before entries relative to the offset are summed, they are rounded to multiples of 2^-52 times a bound of their
    column's sums. fp64 sums of these are exact: they have the same bits in any order of rows, and so for any number of
    threads and any chunks. If a column has entries far above its scale, this rounding would lose the digits of the
    others. The remainders of the rounding are then summed separately, on as many further levels as the scale needs.
    """

    points: Tensor  # [K, D] fp32 or fp64, of unit length for cosine
    offset: Tensor  # [D], 0 for cosine
    cosine: bool
    largest: Tensor  # fp64 [D], as in `Summary`; 0 if nothing is summed
    # fp64 [levels, columns], 1.5 * 2^e, where 2^e is a bound of the sums of a level's entries. Weighted sums have D + 1
    # columns, the last one of the weights.
    rounding: Tensor

    def rounded(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Returns rows as they are summed, times their weights if given, fp64 [levels, N, columns]."""
        x = x.to(self.points.dtype)  # as in the kernels
        left = (unit_rows(x) if self.cosine else x - self.offset).double()
        if weights is not None:
            left = F.pad(left, (0, 1), value=1.0) * weights.unsqueeze(1)
        levels = []
        for rounding in self.rounding:
            levels.append((left + rounding) - rounding)
            left = left - levels[-1]
        return torch.stack(levels)

    def sum_rows(self, x: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the sums [levels, K, columns] and the counts [K] of rows with known labels."""
        levels, columns = self.rounding.shape
        sums = self.offset.new_zeros(levels, len(self.points), columns, dtype=torch.float64)
        for start in range(0, len(x), SUMMED_ROWS):
            rows = slice(start, start + SUMMED_ROWS)
            sums.index_add_(1, labels[rows], self.rounded(x[rows], None if weights is None else weights[rows]))
        return sums, torch.bincount(labels if weights is None else labels[weights > 0], minlength=len(self.points))

    def split(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sums of rows, [levels, K, D], and of their weights, [K]: the counts if none were given."""
        width = self.points.shape[1]
        return sums[..., :width], sums[..., width].sum(0) if sums.shape[2] > width else counts

    def shifts(self, before: Centers) -> Tensor:
        """Bounds of the distances by which these centres moved from earlier ones, fp32 [K]."""
        shifts = squared_shifts(self.points, before.points).sqrt()
        if self.cosine:
            # Directions are those of rounded points. The distance to a centre without one is 1 by definition.
            shifts += torch.where(shifts > 0, 4 * torch.finfo(self.points.dtype).eps, 0.0)
            shifts[~(self.has_direction() & before.has_direction())] = math.inf
        bounds: Tensor = (shifts * (1 + 2.0**-20)).float()
        return bounds

    def has_direction(self) -> Tensor:
        """Returns whether a centre is not 0, bool [K]."""
        directions = torch.empty(len(self.points), dtype=torch.bool, device=self.points.device)
        for part in serial_parts(self.points):
            directions[part] = (self.points[part] != 0).any(1)
        return directions

    @quietly
    def along(self, sums: Tensor, counts: Tensor) -> Tensor:
        """2 <S_k, c_k> - n_k |c_k|^2 of the sums [levels, K, columns] and centres relative to the offset, fp64 [K].

        The squared distances of a centre's rows are the sum of their squares less this; for cosine halved.
        """
        sums, sizes = map(in_fp64, self.split(sums, counts))
        points = in_fp64(self.points) - in_fp64(self.offset)
        along = 2 * (sums.sum(0) * points).sum(1) - sizes * (points * points).sum(1)
        return torch.as_tensor(along / 2 if self.cosine else along, device=self.points.device)

    @quietly
    def means(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Returns the new centres [K, D], of unit length for cosine; a centre without rows does not move."""
        sums, sizes = map(in_fp64, self.split(sums, counts))
        is_empty = sizes == 0
        found = in_fp64(self.offset) + sums.sum(0) / (sizes + is_empty)[:, None]
        found[is_empty] = in_fp64(self.points)[is_empty]
        means, found = torch.empty_like(self.points), torch.as_tensor(found, device=self.points.device)
        for part in serial_parts(means):
            means[part] = normalize_rows(found[part]) if self.cosine else found[part]
        return means


def in_fp64(x: Tensor) -> Any:
    """Returns x in fp64 as a tensor, or if it is on a CPU as an array, with which NumPy computes in one thread.

    A parallel region costs little on idle cores, but milliseconds if another process has one of them.
    """
    return x.numpy().astype(np.float64, copy=False) if x.device.type == "cpu" else x.double()


def serial_parts(x: Tensor) -> Iterator[slice]:
    """Yields slices of rows so small that PyTorch computes each in one thread; one slice on a GPU."""
    step = max(SERIAL_ELEMENTS // x.shape[-1], 1) if x.device.type == "cpu" else max(x.shape[-2], 1)
    for begin in range(0, x.shape[-2], step):
        yield slice(begin, begin + step)


@quietly
def squared_shifts(points: Tensor, before: Tensor) -> Tensor:
    """|c_k - b_k|^2 of centres and earlier ones, fp64 [K]."""
    differences = in_fp64(points) - in_fp64(before)
    return torch.as_tensor((differences * differences).sum(1), device=points.device)


def undecided_rows(gap: Tensor, bound: Tensor, width: int) -> Tensor:
    """Returns whether rounding could give a row another label, bool [N].

    Args:
        gap: [N], the second lowest score of each row less the lowest.
        bound: [N], see `score_bound`; times the relative error of a product it is the error of a score.
        width: D. The error is that of a product of `width` rounded elements, doubled for safety, and the underflow of
            each of them.
    """
    limits = torch.finfo(gap.dtype)
    return ~(gap > 2 * ((width + 8) * limits.eps * bound + 4 * width * limits.tiny))


def score_bound(squares: Tensor, second: Tensor, largest: Tensor) -> Tensor:
    """Bound of |c| (|c| / 2 + |x|), [N], for the two centres c with the lowest scores of each row x.

    The norm of a centre is at most the largest one. It is also at most |x| + |x - c|, where |x - c|^2 = |x|^2 + 2 s for
    its score s, so that one far centre does not raise the bound of rows near others.

    Args:
        squares: |x|^2, [N].
        second: the second lowest score of each row, [N].
        largest: the largest norm of a centre, [].
    """
    return torch.minimum(largest.square() / 2 + largest * squares.sqrt(), 4 * squares + 3 * second)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b.T in the dtype of both, with the precision of fp32 whatever PyTorch's setting for fp32 products."""
    try:
        is_exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # raised after torch's newer setting (fp32_precision) was used
        is_exact = False
    if a.dtype == torch.float32 and not is_exact:
        return (a.double() @ b.double().T).float()
    return a @ b.T


def settle(x: Tensor, centers: Centers, labels: Tensor, distances: Tensor, undecided: Tensor) -> Tensor:
    """Sets labels and distances of the undecided rows, bool [N], in place; returns their indices.

    Distances are computed from differences in fp64; of equally near centres the first is taken. Cosine distances close
    to 0, which rounding affects, are recomputed from differences.
    """
    index = undecided.nonzero().squeeze(1)
    points = centers.points.double()
    points = unit_rows(points) if centers.cosine else points
    without_direction = (points == 0).all(1)
    for part in _parts(index, points):
        rows = x[part].double()
        rows = unit_rows(rows) if centers.cosine else rows
        all_distances = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist").square()
        if centers.cosine:
            has_no_direction = (rows == 0).all(1, keepdim=True) | without_direction
            all_distances = torch.where(has_no_direction, 1.0, all_distances / 2)
        labels[part] = all_distances.argmin(1)
        distances[part] = all_distances.gather(1, labels[part].unsqueeze(1)).squeeze(1).to(distances.dtype)
    if centers.cosine:
        distances[without_direction[labels]] = 1.0
        for part in _parts(((distances < NEAR) & ~undecided).nonzero().squeeze(1), points):
            differences = unit_rows(x[part].double()) - points[labels[part]]
            distances[part] = (differences.square().sum(1) / 2).to(distances.dtype)
    return index


def _parts(index: Tensor, points: Tensor) -> Iterator[Tensor]:
    """Yields an index of rows in parts that need little memory for fp64 distances to all points."""
    size = max(COMPARED_ENTRIES // max(points.shape), 1)
    for start in range(0, len(index), size):
        yield index[start : start + size]


def unit_rows(x: Tensor) -> Tensor:
    """Returns x_i / |x_i| for norms of any size; zero rows and rows of length 1 within rounding are unchanged."""
    largest = x.abs().amax(1, keepdim=True)
    scaled = x / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    is_unit = (norm * largest - 1).abs() < 4 * torch.finfo(x.dtype).eps
    return torch.where(is_unit, x, scaled / torch.where(norm > 0, norm, 1.0))


def prepare(points: Tensor, metric: str, summary: Summary | None = None, dtype: torch.dtype | None = None) -> Centers:
    """Returns centres for passes over data of that summary.

    Without a summary the passes have no sums, and products are in `dtype`: by default the dtype of the points, or fp64
    if their squares would leave its range.
    """
    cosine = metric == "cosine"
    if summary is not None:
        points = points.to(summary.dtype)
        points = unit_rows(points) if cosine else points
        return Centers(points, summary.offset, cosine, summary.largest, summary.rounding)
    middle = _evenly_spaced(points, SURVEYED_CENTERS).median(0).values
    offset = torch.zeros_like(middle) if cosine else middle
    if dtype is None:
        dtype, largest = points.dtype, float((points.double() - offset.double()).abs().max())
        dtype = dtype if cosine or largest == 0 or fits(largest, largest, len(middle), dtype) else torch.float64
    points, offset = points.to(dtype), offset.to(dtype)
    zeros = torch.zeros_like(offset, dtype=torch.float64)
    return Centers(unit_rows(points) if cosine else points, offset, cosine, zeros, zeros.unsqueeze(0))


def _evenly_spaced(x: Tensor, limit: int) -> Tensor:
    """Returns at most `limit` rows, evenly spaced."""
    return x[:: -(-len(x) // limit)] if len(x) > limit else x


def serial_sum(x: Tensor, weights: Tensor | None = None) -> float:
    """Sum of a vector in fp64, times weights if given, in the same order for any number of threads."""
    step = SERIAL_ELEMENTS if x.device.type == "cpu" else max(len(x), 1)
    sums = []
    for start in range(0, len(x), step):
        part = x[start : start + step]
        part = part if weights is None else part * weights[start : start + step]
        sums.append(float(part.sum(dtype=torch.float64)))
    return math.fsum(sums)
