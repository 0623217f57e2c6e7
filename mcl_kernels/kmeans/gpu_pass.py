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


class Factors(NamedTuple):
    """What rows are multiplied with, relative to the offset: <x - o, c> is <x, c> - <o, c>."""

    centers: Tensor  # [K, D]
    high: Tensor  # [K, D] as they are multiplied: where rows are of 16 bits, in two parts of their dtype
    low: Tensor
    half_norms: Tensor  # [K], |c|^2 / 2 where not cosine, and <o, c> where rows are multiplied as they are


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
    if half:
        half_norms += wide @ offset.double()
        # Scores may be scaled: by the power of 2 that brings what becomes fp16 into its range.
        largest = relative.abs().amax().clamp(min=torch.finfo(relative.dtype).tiny)
        unit = (12 - largest.log2().ceil()).clamp(-126, 126).exp2()
        high = (relative * unit).to(x.dtype)
        low = (relative * unit - high).to(x.dtype)
        half_norms *= unit
    padding = -len(relative) % columns
    return Factors(relative, high, low, F.pad(half_norms, (0, padding), value=math.inf).to(relative.dtype))


def fixed_point(centers: Centers, first_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 entries as integers: by column the factor of the first, what rounds the last, and the unit of the last.

    The first integer has `first_bits`, all together have ENTRY_BITS. Of more than 2^17 rows, fp64 sums of whole units
    might be rounded: then the last is a multiple of a power of 2.
    """
    bound = centers.largest.frexp().exponent.clamp(min=first_bits - 126)  # 2^bound is above every entry
    of_sums = centers.rounding.frexp().exponent - 1 - 52  # 2^of_sums is the unit of `Centers.rounded`
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
