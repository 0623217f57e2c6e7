"""The kernels of a pass of k-means: nearest centres with the sums of few, and the sums of many.

What is summed comes out exact, in any order of rows. Few centres: an entry, at most 2^e in its column, is split into
three integers of at most 2^11 that fp16 holds, as multiples of 2^(e - 11), 2^(e - 23) and 2^(e - 35). Each is
multiplied with the one-hot labels; sums of ROWS such integers fit the 24 bits of fp32, so that tensor cores round
nothing. Many centres: an entry is rounded to a multiple of its column's number that fp64 sums without rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mcl_kernels.backends.triton_device import load_features, multiply

# v + TO_INTEGER - TO_INTEGER is v as a whole number, for |v| up to 2^22.
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)
SMALLEST_SQUARE, LARGEST_SQUARE = tl.constexpr(1e-30), tl.constexpr(1e30)  # whose entries' squares fp32 holds, too
NEXT = tl.constexpr(2.0**12)  # of an integer's half, which is what the one before it left, to the next one's 2^11


@triton.jit
def relative_to(rows, offset, width, first, FEATURES: tl.constexpr):
    """Features first .. of rows, less those of the offset."""
    feature = first + tl.arange(0, FEATURES)
    return rows - tl.load(offset + feature, mask=feature < width, other=0.0)[None, :]


@triton.jit
def nearest_centers(
    x, row_at, valid, x_step, offset, high, low, half_norms, limits, clusters, width,
    COSINE: tl.constexpr, HALF: tl.constexpr, OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """For each row the centre of the lowest |c|^2 / 2 - <x, c>; where rounding could not give it another one; and for
    cosine 1 / |x|, 0 where it is undecided.

    Of equal scores the first. Never one behind the last, whose score is infinite, nor where all are NaN: then it is 0.
    """
    lowest = tl.full((ROWS,), float("inf"), ACCUMULATOR)
    second = tl.full((ROWS,), float("inf"), ACCUMULATOR)
    label = tl.zeros((ROWS,), tl.int32)
    squares = tl.zeros((ROWS,), ACCUMULATOR)
    for start in range(0, clusters, COLUMNS):
        center = start + tl.arange(0, COLUMNS)
        center_at, center_valid = center.to(tl.int64) * width, center < clusters
        products = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
        squares = tl.zeros((ROWS,), ACCUMULATOR)
        for first in range(0, width, FEATURES):
            part = load_features(x, row_at, valid, x_step, width, first, FEATURES, OPERAND)
            if not HALF:
                part = relative_to(part, offset, width, first, FEATURES)
            columns = load_features(high, center_at, center_valid, 1, width, first, FEATURES, OPERAND)
            products = multiply(part, tl.trans(columns), products, PRECISION)
            if HALF:
                columns = load_features(low, center_at, center_valid, 1, width, first, FEATURES, OPERAND)
                products = multiply(part, tl.trans(columns), products, PRECISION)
            wide = part.to(ACCUMULATOR)
            squares += tl.sum(wide * wide, 1)
        scores = tl.load(half_norms + center)[None, :] - products
        of_tile = tl.min(scores, 1)
        first_of_equal = tl.min(tl.where(scores == of_tile[:, None], center[None, :], clusters), 1)
        next_of_tile = tl.min(tl.where(center[None, :] == first_of_equal[:, None], float("inf"), scores), 1)
        second = tl.minimum(tl.minimum(second, next_of_tile), tl.maximum(lowest, of_tile))
        label = tl.where(of_tile < lowest, first_of_equal, label)
        lowest = tl.minimum(of_tile, lowest)
    # See `gpu_pass.score_limits`.
    above = squares * tl.load(limits) + tl.load(limits + 1)
    bound = tl.load(limits + 2) + tl.load(limits + 3) * tl.sqrt(above)
    if not COSINE:
        bound = tl.minimum(bound, tl.load(limits + 4) * above + tl.load(limits + 5) * second)
    decided = second - lowest > bound + tl.load(limits + 6) + tl.load(limits + 7) * above
    inverse_norm = squares
    if COSINE:
        decided = decided & (squares > SMALLEST_SQUARE) & (squares < LARGEST_SQUARE)
        inverse_norm = tl.where(decided, 1.0 / tl.sqrt(squares), 0.0)
    return label, decided, inverse_norm


@triton.jit
def add_to_sums(sums, rows, one_hot, scale, last_integer, width, first, CHUNK: tl.constexpr, CLUSTERS: tl.constexpr):
    """Features first .. of each cluster's rows, as multiples of the last integer's unit."""
    none = tl.zeros((CHUNK, CLUSTERS), tl.float32)
    column = first + tl.arange(0, CHUNK)
    left = rows * tl.load(scale + column, mask=column < width, other=0.0)[None, :]
    last = tl.load(last_integer + column, mask=column < width, other=0.0)[None, :]
    integer = (left + TO_INTEGER) - TO_INTEGER
    left = (left - integer) * NEXT
    total = multiply(tl.trans(integer.to(tl.float16)), one_hot, none, "tf32").to(tl.float64)
    integer = (left + TO_INTEGER) - TO_INTEGER
    left = (left - integer) * NEXT
    total = total * NEXT + multiply(tl.trans(integer.to(tl.float16)), one_hot, none, "tf32").to(tl.float64)
    integer = (left + last) - last
    total = total * NEXT + multiply(tl.trans(integer.to(tl.float16)), one_hot, none, "tf32").to(tl.float64)
    feature = column[:, None]
    at = sums + feature * CLUSTERS + tl.arange(0, CLUSTERS)[None, :]
    tl.store(at, tl.load(at, mask=feature < width, other=0.0) + total, mask=feature < width)


@triton.jit(do_not_specialize=["n", "clusters"])
def assign_kernel(
    x,  # [N, D]
    offset, points, high, low,  # [D]; [K, D], and relative to the offset in two parts as rows are multiplied with
    half_norms, limits,  # [K padded to tiles], infinity behind the last; [8], see `gpu_pass.score_limits`
    labels, distances, inverse_norms, undecided,  # int64 [N], [N], [N] where cosine, bool [N]
    sums, counts,  # of each program fp64 [D, CLUSTERS] in units of the last integer, int64 [CLUSTERS]
    scale, last_integer,  # fp32 [D]
    x_stride, x_step, n, clusters, width,
    COSINE: tl.constexpr, HALF: tl.constexpr, OPERAND: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, CHUNK: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS rows: the nearest centre of each, the distance to it, and with CLUSTERS sums of a program's rows
    that are decided.

    A row is loaded for its products, and from the cache for its distance and its cluster's sum.
    """
    program = tl.program_id(0).to(tl.int64)
    cluster = tl.arange(0, CLUSTERS if CLUSTERS else 1)
    counts_at = counts + program * CLUSTERS + cluster
    sums_of_program = sums + program * width * CLUSTERS
    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        valid = row < n
        row_at = row * x_stride
        label, decided, inverse_norm = nearest_centers(
            x, row_at, valid, x_step, offset, high, low, half_norms, limits, clusters, width,
            COSINE, HALF, OPERAND, ACCUMULATOR, PRECISION, ROWS, COLUMNS, FEATURES,
        )  # fmt: skip
        one_hot = label
        if CLUSTERS:
            of_cluster = (label[:, None] == cluster[None, :]) & (valid & decided)[:, None]
            one_hot = of_cluster.to(tl.float16)
            tl.store(counts_at, tl.load(counts_at) + tl.sum(of_cluster.to(tl.int32), 0))
        center_at = label.to(tl.int64) * width
        distance = tl.zeros((ROWS,), ACCUMULATOR)
        for first in range(0, width, CHUNK):
            rows = load_features(x, row_at, valid, x_step, width, first, CHUNK, ACCUMULATOR)
            if COSINE:
                rows = rows * inverse_norm[:, None]
            center = load_features(points, center_at, valid, 1, width, first, CHUNK, ACCUMULATOR)
            distance += tl.sum((rows - center) * (rows - center), 1)
            if CLUSTERS:
                if not COSINE:
                    rows = relative_to(rows, offset, width, first, CHUNK)
                # Behind the last row is the offset, which fp16 need not hold; nor need it hold an undecided row.
                rows = tl.where((valid & decided)[:, None], rows, 0.0)
                add_to_sums(sums_of_program, rows, one_hot, scale, last_integer, width, first, CHUNK, CLUSTERS)
        if COSINE:
            distance = distance * 0.5
            tl.store(inverse_norms + row, inverse_norm, mask=valid)
        tl.store(undecided + row, decided == 0, mask=valid)
        tl.store(labels + row, label.to(tl.int64), mask=valid)
        tl.store(distances + row, distance, mask=valid)
        if CLUSTERS:
            # What a thread stored another one may load in the next tile.
            tl.debug_barrier()


@triton.jit
def piece_kernel(
    x, order, inverse_norms,  # [N, D]; int64 [N], sorted by label; [N] where cosine
    offset, rounding,  # [D], fp64 [D]
    begin, end,  # int64 [pieces], in sorted order
    sums,  # fp64 [pieces, D]
    x_stride, x_step, width,
    COSINE: tl.constexpr, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sum of a piece's rows, all of one cluster: ROWS at a time, CHUNK of their features."""
    piece = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    exact = tl.load(rounding + feature, mask=feature < width, other=0.0)[None, :]
    last = tl.load(end + piece)
    total = tl.zeros((CHUNK,), tl.float64)
    for first in range(tl.load(begin + piece), last, ROWS):
        sorted_row = first + tl.arange(0, ROWS)
        valid = sorted_row < last
        row = tl.load(order + sorted_row, mask=valid, other=0)
        rows = load_features(x, row * x_stride, valid, x_step, width, tl.program_id(1) * CHUNK, CHUNK, ACCUMULATOR)
        if COSINE:
            rows = rows * tl.load(inverse_norms + row, mask=valid, other=0.0)[:, None]
        rows = relative_to(rows, offset, width, tl.program_id(1) * CHUNK, CHUNK).to(tl.float64)
        total += tl.sum(tl.where(valid[:, None], (rows + exact) - exact, 0.0), 0)
    tl.store(sums + piece * width + feature, total, mask=feature < width)


@triton.jit
def join_kernel(
    pieces,  # fp64 [pieces, D]
    begin, end,  # int64 [K], of the pieces of a cluster
    sums,  # fp64 [K, D]
    width,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sum of a cluster's pieces."""
    cluster = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    last = tl.load(end + cluster)
    total = tl.zeros((CHUNK,), tl.float64)
    for first in range(tl.load(begin + cluster), last, ROWS):
        piece = first + tl.arange(0, ROWS)
        at = pieces + piece[:, None] * width + feature[None, :]
        total += tl.sum(tl.load(at, mask=(piece < last)[:, None] & (feature < width)[None, :], other=0.0), 0)
    tl.store(sums + cluster * width + feature, total, mask=feature < width)
