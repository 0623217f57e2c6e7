"""Steps of the kernels on one tile of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from mcl_kernels.backends.triton_device import load_features, multiply

# v + TO_INTEGER - TO_INTEGER is v rounded to an integer, for |v| up to 2^22.
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)
# Scale factor from the remainder of a rounded integer, at most 1/2, to the next integer, at most 2^11.
REMAINDER_SCALE = tl.constexpr(2.0**12)
# Squared norms that are normalised: fp32 holds the squares of their entries too.
MIN_SQUARE, MAX_SQUARE = tl.constexpr(1e-30), tl.constexpr(1e30)


@triton.jit
def relative_to(x, offset, width, first, FEATURES: tl.constexpr):
    """Returns FEATURES features of rows, from `first` on, less those of the offset."""
    feature = first + tl.arange(0, FEATURES)
    return x - tl.load(offset + feature, mask=feature < width, other=0.0)[None, :]


@triton.jit
def nearest_centers(
    rows, offsets, valid, centers, clusters, width, COSINE: tl.constexpr, OPERAND: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """Returns each row's nearest centre, whether it is decided, and 1 / |x| for cosine (0 if undecided), else |x|^2.

    The nearest centre has the lowest score |c|^2 / 2 - <x, c>: the first one of equal scores, centre 0 if all are NaN.
    It is decided if rounding cannot have given the row another one. Padded centres have an infinite score.
    """
    lowest = tl.full((ROWS,), float("inf"), ACCUMULATOR)
    second = tl.full((ROWS,), float("inf"), ACCUMULATOR)
    label = tl.zeros((ROWS,), tl.int32)
    squares = tl.zeros((ROWS,), ACCUMULATOR)
    for start in range(0, clusters, COLUMNS):
        center = start + tl.arange(0, COLUMNS)
        products, squares = multiply_centers(
            rows, offsets, valid, centers, center, clusters, width,
            OPERAND, ACCUMULATOR, PRECISION, ROWS, COLUMNS, FEATURES,
        )  # fmt: skip
        scores = tl.load(centers.half_norms + center)[None, :] - products
        lowest, second, label = update_lowest(lowest, second, label, scores, center, clusters)
    decided = is_decided(lowest, second, squares, centers.limits, COSINE)
    inverse_norm = squares
    if COSINE:
        decided = decided & (squares > MIN_SQUARE) & (squares < MAX_SQUARE)
        inverse_norm = tl.where(decided, 1.0 / tl.sqrt(squares), 0.0)
    return label, decided, inverse_norm


@triton.jit
def multiply_centers(
    rows, offsets, valid, centers, center, clusters, width, OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Returns the products <x, c> of a tile [ROWS, COLUMNS], and the sum of the squares of each row.

    Rows are relative to the offset if centres have one part, else as they are.
    """
    center_offsets, center_valid = center.to(tl.int64) * width, center < clusters
    squares = tl.zeros((ROWS,), ACCUMULATOR)
    products = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    for first in range(0, width, FEATURES):
        x = load_features(rows.x, offsets, valid, rows.step, width, first, FEATURES, OPERAND)
        if centers.low is None:
            x = relative_to(x, centers.offset, width, first, FEATURES)
        part = load_features(centers.high, center_offsets, center_valid, 1, width, first, FEATURES, OPERAND)
        products = multiply(x, tl.trans(part), products, PRECISION)
        if centers.low is not None:
            part = load_features(centers.low, center_offsets, center_valid, 1, width, first, FEATURES, OPERAND)
            products = multiply(x, tl.trans(part), products, PRECISION)
        wide = x.to(ACCUMULATOR)
        squares += tl.sum(wide * wide, 1)
    return products, squares


@triton.jit
def update_lowest(lowest, second, label, scores, center, clusters):
    """Updates the two lowest scores of each row, and the label of the lowest, by a tile of scores; returns them."""
    tile_lowest = tl.min(scores, 1)
    tile_label = tl.min(tl.where(scores == tile_lowest[:, None], center[None, :], clusters), 1)
    tile_second = tl.min(tl.where(center[None, :] == tile_label[:, None], float("inf"), scores), 1)
    second = tl.minimum(tl.minimum(second, tile_second), tl.maximum(lowest, tile_lowest))
    label = tl.where(tile_lowest < lowest, tile_label, label)
    return tl.minimum(tile_lowest, lowest), second, label


@triton.jit
def is_decided(lowest, second, squares, limits, COSINE: tl.constexpr):
    """Returns whether the gap between the two lowest scores is above the limit of rounding: see `score_limits`."""
    above = squares * tl.load(limits) + tl.load(limits + 1)
    bound = tl.load(limits + 2) + tl.load(limits + 3) * tl.sqrt(above)
    if not COSINE:
        bound = tl.minimum(bound, tl.load(limits + 4) * above + tl.load(limits + 5) * second)
    return second - lowest > bound + tl.load(limits + 6) + tl.load(limits + 7) * above


@triton.jit
def add_to_sums(sums, x, one_hot, partial, width, first, CHUNK: tl.constexpr, CLUSTERS: tl.constexpr):
    """Adds CHUNK features of the rows, from `first` on, to the sum of each row's cluster: [CHUNK, CLUSTERS] at `sums`.

    An entry, at most 2^e in its column, is split into three integers of at most 2^11, which fp16 holds: multiples of
    2^(e - 11), 2^(e - 23) and 2^(e - 35). Each is multiplied with the one-hot labels. Sums of ROWS such integers fit
    the 24 bits of fp32, so that tensor cores round nothing.
    """
    none = tl.zeros((CHUNK, CLUSTERS), tl.float32)
    column = first + tl.arange(0, CHUNK)
    remainder = x * tl.load(partial.first_scale + column, mask=column < width, other=0.0)[None, :]
    last = tl.load(partial.last_rounding + column, mask=column < width, other=0.0)[None, :]
    integer = (remainder + TO_INTEGER) - TO_INTEGER
    remainder = (remainder - integer) * REMAINDER_SCALE
    total = multiply(tl.trans(integer.to(tl.float16)), one_hot, none, "tf32").to(tl.float64)
    integer = (remainder + TO_INTEGER) - TO_INTEGER
    remainder = (remainder - integer) * REMAINDER_SCALE
    total = total * REMAINDER_SCALE + multiply(tl.trans(integer.to(tl.float16)), one_hot, none, "tf32").to(tl.float64)
    integer = (remainder + last) - last
    total = total * REMAINDER_SCALE + multiply(tl.trans(integer.to(tl.float16)), one_hot, none, "tf32").to(tl.float64)
    feature = column[:, None]
    at = sums + feature * CLUSTERS + tl.arange(0, CLUSTERS)[None, :]
    tl.store(at, tl.load(at, mask=feature < width, other=0.0) + total, mask=feature < width)
