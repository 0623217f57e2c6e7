"""Helpers of the implementations for GPUs: factors of the products, limits of rounding, exact sums.

With few centres, the pass that finds the labels also adds up rows: each program keeps private partial sums. With many
centres, rows are sorted by label and cut into pieces of one cluster each. Neither way needs an atomic addition.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels.kmeans.centers import Centers

# Up to this many centres (and K x D elements) each program keeps private partial sums; those of all programs fit in L2.
MAX_SUMMED_CENTERS, MAX_SUMMED_ELEMENTS = 32, 1 << 14
PROGRAMS = 2  # per multiprocessor
INTERPRETED_PROGRAMS = 2  # in total, in the interpreter on a CPU
MAX_ROUNDS = 4  # of programs that share the centres
PIECE_ROWS = 256  # sums of this many integers fit in 32 bits
ENTRY_BITS = 35  # bits of an fp32 entry in fixed point

# Twice the relative error of a factor: fp32 as three products of tf32, centres as two parts of 16 bits.
FACTOR_ERRORS = {"ieee": 0.0, "fp32": 0.0, "tf32x3": 2.0**-19}
HALF_FACTOR_ERRORS = {torch.bfloat16: 2.0**-15, torch.float16: 2.0**-20}
FP16_UNDERFLOW = 2.0**-34  # error of elements in the subnormal range of fp16, relative to the largest centre


class Factors(NamedTuple):
    """Centres relative to the offset o, as factors of the products with rows.

    A row of 16 bits is multiplied without subtracting the offset: <x - o, c> is <x, c> - <o, c>. Its centres are the
    sum of two parts of its dtype.
    """

    relative: Tensor  # [K, D], in the dtype of the centres
    high: Tensor  # [K, D], the first part, in the dtype of the products
    low: Tensor  # [K, D], the second part; equal to `high` if there is one part
    half_norms: Tensor  # [K padded to tiles], |c|^2 / 2 (0 for cosine), plus <o, c> for rows of 16 bits
    score_scale: Tensor  # fp64 [], factor of all scores


class Pieces(NamedTuple):
    """Pieces of at most PIECE_ROWS rows of one cluster; there are N / PIECE_ROWS + K, and the last ones are empty."""

    order: Tensor  # int64 [N], original row indices sorted by label
    begin: Tensor  # int64 [pieces], positions in `order`
    end: Tensor  # int64 [pieces]
    first: Tensor  # int64 [K], first piece of each cluster
    last: Tensor  # int64 [K], the piece after its last one
    counts: Tensor  # int64 [K], rows of each cluster


def make_factors(x: Tensor, centers: Centers, half: bool, columns: int = 1) -> Factors:
    """Computes the factors for rows like x; `half` is true for rows that are multiplied in 16 bits.

    Half norms are padded with infinity to a multiple of `columns`, the columns of a tile.
    """
    offset, relative = centers.offset, centers.points - centers.offset
    wide = relative.double()
    half_norms = wide.square().sum(1) / 2 if not centers.cosine else wide.new_zeros(len(wide))
    high = low = relative
    score_scale = wide.new_ones(())
    if half:
        half_norms += wide @ offset.double()
        # A power of 2 scales the centres into the range of fp16, and so the scores.
        largest = relative.abs().amax().clamp(min=torch.finfo(relative.dtype).tiny)
        score_scale = (12 - largest.log2().ceil()).clamp(-126, 126).exp2()
        high = (relative * score_scale).to(x.dtype)
        low = (relative * score_scale - high).to(x.dtype)
        half_norms *= score_scale
    padding = -len(relative) % columns
    half_norms = F.pad(half_norms, (0, padding), value=math.inf).to(relative.dtype)
    return Factors(relative, high, low, half_norms, score_scale)


def score_limits(x: Tensor, centers: Centers, factors: Factors, precision: str) -> Tensor:
    """Coefficients l of the gap between the two lowest scores of a row below which rounding could decide its label.

    Returns [8] in the dtype of scores. With the second lowest score s, and the sum t of the squares of the row as it is
    multiplied, the row is decided if the gap is above

        min(l2 + l3 X, l4 X^2 + l5 s) + l6 + l7 X^2,    X^2 = l0 t + l1

    X is at least |x|. The error of a score is e |c| (|c| / 2 + X). |c| is at most the largest norm of a centre; it is
    also at most |x| + |x - c|, where |x - c|^2 = |x|^2 + 2 s, so that one far centre does not raise the limit of rows
    near others. For cosine |c| is 1, and l4 and l5 are not used.
    """
    half, limits, width = precision == "half", torch.finfo(centers.points.dtype), x.shape[1]
    factor_error = HALF_FACTOR_ERRORS[x.dtype] if half else FACTOR_ERRORS[precision]
    largest = factors.relative.double().square().sum(1).amax().sqrt()
    one, zero = torch.ones_like(largest), torch.zeros_like(largest)
    # 2 (width + 8) eps, not half of it: tensor cores truncate sums instead of rounding them.
    error = 2 * (factor_error + 2 * (width + 8) * limits.eps) * factors.score_scale
    underflow = factors.score_scale * (FP16_UNDERFLOW * math.sqrt(width) if half and x.dtype == torch.float16 else 0.0)
    row_squares = (2 * one, 2 * centers.offset.double().square().sum()) if half else (one, zero)
    by_largest_norm = (zero if centers.cosine else error * largest.square() / 2, error * largest)
    by_score = (4 * error, 3 * error / factors.score_scale)
    floor = (8 * width * limits.tiny + underflow * largest.square(), underflow)
    return torch.stack((*row_squares, *by_largest_norm, *by_score, *floor)).to(centers.points.dtype)


def fixed_point(centers: Centers, first_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed-point format of fp32 entries, which are split into integers, by column: [D] each.

    Returns the scale factor of the first integer, fp32, the constant that rounds the last integer when it is added and
    subtracted, fp32, and the value of 1 in the last integer, fp64. The first integer has `first_bits` bits, all of them
    together have ENTRY_BITS. Sums of more than 2^17 such entries might be rounded in fp64: then the last integer is
    rounded to a multiple of a power of 2.
    """
    bound = centers.largest.frexp().exponent.clamp(min=first_bits - 126)  # 2^bound is above every entry
    sum_exponent = centers.rounding[0].frexp().exponent - 1 - 52  # `Centers.rounded` has multiples of 2^sum_exponent
    multiple = (sum_exponent - (bound - ENTRY_BITS)).clamp(0, 12)
    first_scale, last_rounding = _power_of_2(first_bits - bound), 1.5 * _power_of_2(23 + multiple)
    return first_scale.float(), last_rounding.float(), _power_of_2(bound - ENTRY_BITS)


def _power_of_2(exponent: Tensor) -> Tensor:
    """Returns 2^exponent in fp64, built from its bits: a GPU's pow may round."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def programs_at_a_time(device: torch.device) -> int:
    """Number of programs that keep private partial sums."""
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def choose_parts(row_tiles: int, center_tiles: int, at_a_time: int) -> int:
    """Number of parts of the centres, with a program for each part and tile of rows, of which `at_a_time` run.

    It is 1 if the tiles of rows alone fill the device. Else the programs run in as many rounds, up to MAX_ROUNDS, as
    give the least work to the busiest multiprocessor: several rounds of small parts where one leaves many without work.
    There are at most MAX_ROUNDS x `at_a_time` programs.
    """
    if not 0 < row_tiles < at_a_time:
        return 1
    by_rounds = {rounds: -(-center_tiles // (rounds * at_a_time // row_tiles)) for rounds in range(1, MAX_ROUNDS + 1)}
    rounds = min(by_rounds, key=lambda rounds: rounds * by_rounds[rounds])
    return -(-center_tiles // by_rounds[rounds])


def cut_into_pieces(labels: Tensor, clusters: int) -> Pieces:
    """Cuts the rows of each cluster into pieces, on the device, without waiting for it."""
    labels, order = labels.int().sort()
    end = torch.searchsorted(labels, torch.arange(clusters, dtype=labels.dtype, device=labels.device), right=True)
    counts = end.diff(prepend=end.new_zeros(1))
    piece_counts = (counts + PIECE_ROWS - 1) // PIECE_ROWS
    last = piece_counts.cumsum(0)
    first = last - piece_counts
    piece = torch.arange(len(labels) // PIECE_ROWS + clusters, device=labels.device)
    cluster = torch.searchsorted(last, piece, right=True).clamp(max=clusters - 1)
    begin = (end - counts)[cluster] + (piece - first[cluster]) * PIECE_ROWS
    return Pieces(order, begin, torch.minimum(begin + PIECE_ROWS, end[cluster]), first, last, counts)
