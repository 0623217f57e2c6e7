"""What the implementations for GPUs have in common: what rows are multiplied with, and what makes their sums exact.

Sums of few centres are added up in the pass that finds the labels, by each program for itself. For those of many, rows
are sorted by label, and cut into pieces of one cluster each. Neither needs an atomic addition.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels.kmeans.centers import Centers

# Centres, and numbers of them all, whose sums a program adds up: those of all programs fit a cache.
MOST_SUMMED, MOST_NUMBERS = 32, 1 << 14
PROGRAMS = 2  # of a multiprocessor
INTERPRETED_PROGRAMS = 2  # on a CPU
PIECE_ROWS = 256  # their entries' integers add up in 32 bits
ENTRY_BITS = 35  # of an fp32 entry

# What a number of a product may lose, twice: of fp32 in three products of tf32, of centres in two of 16 bits.
LOST = {"ieee": 0.0, "fp32": 0.0, "tf32x3": 2.0**-19}
LOST_OF_HALF = {torch.bfloat16: 2.0**-15, torch.float16: 2.0**-20}
LOST_BELOW_FP16 = 2.0**-34  # of the largest centre


class Factors(NamedTuple):
    """What rows are multiplied with, relative to the offset: <x - o, c> is <x, c> - <o, c>."""

    relative: Tensor  # [K, D]
    high: Tensor  # [K, D] as they are multiplied: where rows are of 16 bits, in two parts of their dtype
    low: Tensor
    half_norms: Tensor  # [K], |c|^2 / 2 where not cosine, and <o, c> where rows are multiplied as they are
    unit: Tensor  # fp64 [], what scores are multiplied with


class Pieces(NamedTuple):
    """Rows of one cluster each, at most PIECE_ROWS: N / PIECE_ROWS + K of them, those behind the last are empty."""

    order: Tensor  # int64 [N], rows sorted by label
    begin: Tensor  # int64 [pieces], in that order
    end: Tensor
    first: Tensor  # int64 [K], of a cluster's pieces
    last: Tensor
    counts: Tensor  # int64 [K]


def make_factors(x: Tensor, centers: Centers, half: bool, columns: int = 1) -> Factors:
    """`half`: rows are multiplied as they are. Half norms are padded to whole tiles of columns by infinity."""
    offset, relative = centers.offset, centers.points - centers.offset
    wide = relative.double()
    half_norms = wide.square().sum(1) / 2 if not centers.cosine else wide.new_zeros(len(wide))
    high = low = relative
    unit = wide.new_ones(())
    if half:
        half_norms += wide @ offset.double()
        # Scores may be scaled: by the power of 2 that brings what becomes fp16 into its range.
        largest = relative.abs().amax().clamp(min=torch.finfo(relative.dtype).tiny)
        unit = (12 - largest.log2().ceil()).clamp(-126, 126).exp2()
        high = (relative * unit).to(x.dtype)
        low = (relative * unit - high).to(x.dtype)
        half_norms *= unit
    padding = -len(relative) % columns
    half_norms = F.pad(half_norms, (0, padding), value=math.inf).to(relative.dtype)
    return Factors(relative, high, low, half_norms, unit)


def score_limits(x: Tensor, centers: Centers, factors: Factors, precision: str) -> Tensor:
    """How far the second lowest score s of a row has to be above the lowest, or rounding could give it another label.

    With the numbers l of the result, [8] in the dtype of scores, and the sum t of the squares that are multiplied:

        X^2 = l0 t + l1,    limit = min(l2 + l3 X, l4 X^2 + l5 s) + l6 + l7 X^2

    X is at least |x|, and the error of a score e |c| (|c| / 2 + X), where |c| is at most the largest norm of a centre,
    and at most |x| + |x - c|, with |x - c|^2 = |x|^2 + 2 s: one far centre takes no digits from the others. For cosine
    |c| is 1, and l4 and l5 are not used.
    """
    half, limits, width = precision == "half", torch.finfo(centers.points.dtype), x.shape[1]
    lost = LOST_OF_HALF[x.dtype] if half else LOST[precision]
    largest = factors.relative.double().square().sum(1).amax().sqrt()
    one, zero = torch.ones_like(largest), torch.zeros_like(largest)
    # Tensor cores cut off where others round.
    error = 2 * (lost + 2 * (width + 8) * limits.eps) * factors.unit
    below = factors.unit * (LOST_BELOW_FP16 * math.sqrt(width) if half and x.dtype == torch.float16 else 0.0)
    squares = (2 * one, 2 * centers.offset.double().square().sum()) if half else (one, zero)
    of_centers = (zero if centers.cosine else error * largest.square() / 2, error * largest)
    of_scores = (4 * error, 3 * error / factors.unit)
    least = (8 * width * limits.tiny + below * largest.square(), below)
    return torch.stack((*squares, *of_centers, *of_scores, *least)).to(centers.points.dtype)


def fixed_point(centers: Centers, first_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 entries as integers: by column the factor of the first, what rounds the last, and the unit of the last.

    The first integer has `first_bits`, all together have ENTRY_BITS. Of more than 2^17 rows, fp64 sums of whole units
    might be rounded: then the last is a multiple of a power of 2.
    """
    bound = centers.largest.frexp().exponent.clamp(min=first_bits - 126)  # 2^bound is above every entry
    of_sums = centers.rounding[0].frexp().exponent - 1 - 52  # 2^of_sums is the unit of `Centers.rounded`
    multiple = (of_sums - (bound - ENTRY_BITS)).clamp(0, 12)
    scale, last_integer = _power_of_2(first_bits - bound), 1.5 * _power_of_2(23 + multiple)
    return scale.float(), last_integer.float(), _power_of_2(bound - ENTRY_BITS)


def _power_of_2(exponent: Tensor) -> Tensor:
    """fp64 with the bits of it: a GPU's pow may round."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def programs_at_a_time(device: torch.device) -> int:
    """How many programs add up sums of their own."""
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def cut_into_pieces(labels: Tensor, clusters: int) -> Pieces:
    """The rows of each of so many clusters, in pieces; on the device, without waiting for it."""
    labels, order = labels.int().sort()
    end = torch.searchsorted(labels, torch.arange(clusters, dtype=labels.dtype, device=labels.device), right=True)
    counts = end.diff(prepend=end.new_zeros(1))
    of_cluster = (counts + PIECE_ROWS - 1) // PIECE_ROWS
    last = of_cluster.cumsum(0)
    first = last - of_cluster
    piece = torch.arange(len(labels) // PIECE_ROWS + clusters, device=labels.device)
    cluster = torch.searchsorted(last, piece, right=True).clamp(max=clusters - 1)
    begin = (end - counts)[cluster] + (piece - first[cluster]) * PIECE_ROWS
    return Pieces(order, begin, torch.minimum(begin + PIECE_ROWS, end[cluster]), first, last, counts)
