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
def lowest_scores(
    rows, offsets, valid, centers, first, past, clusters, width, OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Returns each row's two lowest scores of the centres from `first` to `past`, the label of the lowest, and squares.

    The score of a centre is |c|^2 / 2 - <x, c>. The label is that of the first of equal scores, 0 if all are NaN. The
    squares are those of the row as it is multiplied, summed. Padded centres have an infinite score.
    """
    lowest = tl.full((ROWS,), float("inf"), ACCUMULATOR)
    second = tl.full((ROWS,), float("inf"), ACCUMULATOR)
    label = tl.zeros((ROWS,), tl.int32)
    squares = tl.zeros((ROWS,), ACCUMULATOR)
    for start in range(first, past, COLUMNS):
        center = start + tl.arange(0, COLUMNS)
        products, squares = multiply_centers(
            rows, offsets, valid, centers, center, clusters, width,
            OPERAND, ACCUMULATOR, PRECISION, ROWS, COLUMNS, FEATURES,
        )  # fmt: skip
        scores = tl.load(centers.half_norms + center)[None, :] - products
        lowest, second, label = update_lowest(lowest, second, label, scores, center, clusters)
    return lowest, second, label, squares


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
    return merge_lowest(lowest, second, label, tile_lowest, tile_second, tile_label)


@triton.jit
def merge_lowest(lowest, second, label, later_lowest, later_second, later_label):
    """Returns the two lowest scores of each row, and the label of the lowest, of earlier and later centres.

    Of equal scores the earlier one is the lowest.
    """
    second = tl.minimum(tl.minimum(second, later_second), tl.maximum(lowest, later_lowest))
    label = tl.where(later_lowest < lowest, later_label, label)
    return tl.minimum(later_lowest, lowest), second, label


@triton.jit
def decide(lowest, second, squares, limits, COSINE: tl.constexpr):
    """Returns whether each row's label is decided, and 1 / |x| for cosine (0 if undecided), else |x|^2.

    It is decided if rounding cannot have given the row another one: the gap between the two lowest scores is above the
    limit of rounding, see `score_limits`.
    """
    above = squares * tl.load(limits) + tl.load(limits + 1)
    bound = tl.load(limits + 2) + tl.load(limits + 3) * tl.sqrt(above)
    if not COSINE:
        bound = tl.minimum(bound, tl.load(limits + 4) * above + tl.load(limits + 5) * second)
    decided = second - lowest > bound + tl.load(limits + 6) + tl.load(limits + 7) * above
    inverse_norm = squares
    if COSINE:
        decided = decided & (squares > MIN_SQUARE) & (squares < MAX_SQUARE)
        inverse_norm = tl.where(decided, 1.0 / tl.sqrt(squares), 0.0)
    return decided, inverse_norm


@triton.jit
def finish_rows(
    centers, results, partial, rows, row, valid, label, decided, inverse_norm, width,
    COSINE: tl.constexpr, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Writes the results of ROWS rows, and adds the decided ones to the partial sums of the program.

    A row is loaded from the cache, for its distance and its cluster's sum.
    """
    offsets = row * rows.stride
    one_hot = label
    if partial is not None:
        program = tl.program_id(0).to(tl.int64)
        cluster = tl.arange(0, CLUSTERS)
        counts = partial.counts + program * CLUSTERS + cluster
        sums = partial.sums + program * width * CLUSTERS
        members = (label[:, None] == cluster[None, :]) & (valid & decided)[:, None]
        one_hot = members.to(tl.float16)
        tl.store(counts, tl.load(counts) + tl.sum(members.to(tl.int32), 0))
    center_offsets = label.to(tl.int64) * width
    distance = tl.zeros((ROWS,), ACCUMULATOR)
    for first in range(0, width, CHUNK):
        x = load_features(rows.x, offsets, valid, rows.step, width, first, CHUNK, ACCUMULATOR)
        if COSINE:
            x = x * inverse_norm[:, None]
        center = load_features(centers.points, center_offsets, valid, 1, width, first, CHUNK, ACCUMULATOR)
        distance += tl.sum((x - center) * (x - center), 1)
        if partial is not None:
            if not COSINE:
                x = relative_to(x, centers.offset, width, first, CHUNK)
            # 0 past the last row, where x is the offset, and for undecided rows: fp16 may hold neither.
            x = tl.where((valid & decided)[:, None], x, 0.0)
            add_to_sums(sums, x, one_hot, partial, width, first, CHUNK, CLUSTERS)
    if COSINE:
        distance = distance * 0.5
        tl.store(results.inverse_norms + row, inverse_norm, mask=valid)
    tl.store(results.undecided + row, decided == 0, mask=valid)
    tl.store(results.labels + row, label.to(tl.int64), mask=valid)
    tl.store(results.distances + row, distance, mask=valid)


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
