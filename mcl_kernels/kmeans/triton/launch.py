"""One pass over the data as Triton kernels: on CUDA tensors, or on the CPU's under TRITON_INTERPRET=1.

    euclidean   label_i = argmin_k |x_i - c_k|^2,   distance_i = |x_i - c_label|^2
    cosine      label_i = argmax_k <x_i, c_k>,      distance_i = |x_i - c_label|^2 / 2, x_i divided by its norm

The argmin is taken of |c|^2 / 2 - <x, c> by tiles of rows against tiles of centres, by a running minimum: no N x K
scores. Rows are relative to the offset, and for products of half precision as they are, with centres as the sum of two
numbers of that precision. Few centres: the sums of a tile's rows are a product with its one-hot labels, while the rows
are in the cache. Many: rows are sorted by label, and read once more. Sums are exact, and no add is atomic.

Memory beyond inputs and outputs. Few centres: their fp64 sums for each program that runs at a time. Many: the order and
the norms of the rows, and fp64 sums of every 256 rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcl_kernels.backends.triton import (
    compute_capability,
    current_device,
    padded_edge,
    product_constants,
    product_precision,
)
from mcl_kernels.kmeans import gpu_common as gpu_pass
from mcl_kernels.kmeans.centers import Centers, settle
from mcl_kernels.kmeans.gpu_common import MAX_SUMMED_CENTERS, MAX_SUMMED_ELEMENTS

PIECE_TILE = {"ROWS": 16, "CHUNK": 128}
JOIN_TILE = {"ROWS": 16, "CHUNK": 64}
FIRST_BITS = 11  # of the first of an entry's three integers


class Tiles(NamedTuple):
    """The sizes of a kernel's tile and how it is run."""

    rows: int  # at most 8192: sums of so many integers of 2^11 are exact
    columns: int
    features: int  # of both sides that are multiplied at a time
    chunk: int  # features whose sums are one product
    warps: int
    stages: int


# By precision and architecture (oldest first): the tiles for at most so many centres. Each is the fastest-looking of
# those tried that compile without a spill on that architecture (`python -m benchmarks.gpu_static k-means`).
# - Few centres: memory is what a pass waits for. Of 64 rows, read in whole lines, several programs' worth stay in the
#   cache until they are read again, and what they need of the registers leaves room for another program.
# - Many: products are what counts. 128 x 128 of them, less where operands split in registers would spill.
_MOST = 1 << 62
_FEW, _FEW_HALF = (MAX_SUMMED_CENTERS, Tiles(64, 32, 32, 64, 8, 2)), (MAX_SUMMED_CENTERS, Tiles(64, 32, 64, 64, 8, 2))
TABLE: dict[tuple[str, int], tuple[tuple[int, Tiles], ...]] = {
    ("half", 80): ((MAX_SUMMED_CENTERS, Tiles(64, 32, 64, 32, 8, 2)), (_MOST, Tiles(128, 128, 32, 32, 8, 2))),
    ("half", 90): (_FEW_HALF, (_MOST, Tiles(128, 128, 64, 32, 8, 3))),
    ("tf32x3", 80): (_FEW, (_MOST, Tiles(128, 64, 16, 32, 8, 2))),
    ("tf32x3", 90): (_FEW, (_MOST, Tiles(128, 128, 32, 32, 8, 2))),
}
INTERPRETED = Tiles(1024, 256, 1024, 1024, 4, 1)  # few and large: its cost is that of calls


def choose_tiles(precision: str, width: int, clusters: int, capability: tuple[int, int] | None) -> Tiles:
    """For rows of `width` numbers and so many centres. The same with sums and without: labels must not differ.

    Precision is "half" or "tf32x3"; capability None is the interpreter's.
    """
    tiles = INTERPRETED
    if capability is not None:
        architecture = 10 * capability[0]
        newest = max(each for of, each in TABLE if of == precision and each <= architecture)
        tiles = next(tiles for most, tiles in TABLE[precision, newest] if clusters <= most)
    whole = padded_edge(width)
    return tiles._replace(
        columns=min(tiles.columns, padded_edge(clusters)),
        features=min(tiles.features, whole),
        chunk=min(tiles.chunk, whole),
    )


def tile_constants(
    precision: str, dtype: torch.dtype, width: int, clusters: int, cosine: bool, with_sums: bool, tiles: Tiles
) -> dict[str, Any]:
    """What the kernel is compiled for, beside its options."""
    few = with_sums and sums_few(precision, width, clusters)
    return {
        "COSINE": cosine, "HALF": precision == "half", **product_constants(precision, dtype),
        "ROWS": tiles.rows, "COLUMNS": tiles.columns, "FEATURES": tiles.features, "CHUNK": tiles.chunk,
        "CLUSTERS": padded_edge(clusters) if few else 0,
    }  # fmt: skip


def sums_few(precision: str, width: int, clusters: int) -> bool:
    """Whether sums are a product with the one-hot labels, which is of fp32 entries; else rows are sorted by label."""
    clusters = padded_edge(clusters)
    return precision != "ieee" and clusters <= MAX_SUMMED_CENTERS and clusters * width <= MAX_SUMMED_ELEMENTS


def assign(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, int64 [N], and the distance to it, [N] in the dtype of the centres."""
    labels, distances, _, _, _ = _assign(x, centers, False)
    return labels, distances


def assign_and_sum(x: Tensor, centers: Centers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign`, and in the same pass the sum of each centre's rows relative to the offset, and their number."""
    labels, distances, index, inverse_norms, of_few = _assign(x, centers, True)
    added, number = centers.sum_rows(x[index], labels[index])
    if of_few is not None:
        sums, counts = of_few
        return labels, distances, sums + added[0], counts + number
    sums, counts = _sum_by_label(x, centers, labels, inverse_norms)
    return labels, distances, sums + added[0] if centers.cosine else sums, counts


def _assign(
    x: Tensor, centers: Centers, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Labels, distances, the rows that were undecided, for cosine 1 / |x_i| of the others, and the sums and counts of
    few centres, of the others alone."""
    from mcl_kernels.kmeans.triton.steps import assign_kernel

    points, (n, width) = centers.points, x.shape
    precision = product_precision(x, x, points)
    # Three products: by a single one of tf32 every fourth row would stay undecided (counted on normal data).
    precision = "tf32x3" if precision == "tf32" else precision
    capability = compute_capability(x.device)
    # fp64 is for checks, and for rows in the range of none other: it takes the tiles of what is nearest in size.
    tiles = choose_tiles("tf32x3" if precision == "ieee" else precision, width, len(points), capability)
    constants = tile_constants(precision, x.dtype, width, len(points), centers.cosine, with_sums, tiles)
    labels, distances = torch.empty(n, dtype=torch.int64, device=x.device), points.new_empty(n)
    undecided = torch.empty(n, dtype=torch.bool, device=x.device)
    inverse_norms = points.new_empty(n if centers.cosine else 0)
    programs, clusters = -(-n // tiles.rows), constants["CLUSTERS"]
    if clusters:
        programs = min(programs, gpu_pass.programs_at_a_time(x.device))
    counts = torch.zeros(programs, clusters, dtype=torch.int64, device=x.device)
    sums = torch.zeros(programs, width, clusters, dtype=torch.float64, device=x.device)
    scale, last_integer, unit = gpu_pass.fixed_point(centers, FIRST_BITS)
    if n:
        factors = gpu_pass.make_factors(x, centers, precision == "half", tiles.columns)
        limits = gpu_pass.score_limits(x, centers, factors, precision)
        with current_device(x):
            assign_kernel[(programs,)](
                x, centers.offset, points, factors.high, factors.low, factors.half_norms, limits,
                labels, distances, inverse_norms, undecided, sums, counts, scale, last_integer,
                x.stride(0), x.stride(1), n, len(points), width, **constants,
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
    index = settle(x, centers, labels, distances, undecided)
    if not clusters:
        return labels, distances, index, inverse_norms, None
    of_few = sums.sum(0).T[: len(points)] * unit, counts.sum(0)[: len(points)]
    return labels, distances, index, inverse_norms, of_few


def _sum_by_label(x: Tensor, centers: Centers, labels: Tensor, inverse_norms: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts of many centres."""
    import triton.language as tl

    from mcl_kernels.kmeans.triton.steps import join_kernel, piece_kernel

    width, k = x.shape[1], len(centers.points)
    pieces = gpu_pass.cut_into_pieces(labels, k)
    of_pieces = torch.empty(len(pieces.begin), width, dtype=torch.float64, device=x.device)
    sums = torch.empty(k, width, dtype=torch.float64, device=x.device)
    wide = tl.float64 if centers.points.dtype == torch.float64 else tl.float32
    interpreted = {"ROWS": 32, "CHUNK": min(1024, padded_edge(width))}
    piece_tile, join_tile = (PIECE_TILE, JOIN_TILE) if x.is_cuda else (interpreted, interpreted)
    with current_device(x):
        piece_kernel[(len(pieces.begin), -(-width // piece_tile["CHUNK"]))](
            x, pieces.order, inverse_norms, centers.offset, centers.rounding[0], pieces.begin, pieces.end, of_pieces,
            x.stride(0), x.stride(1), width, COSINE=centers.cosine, ACCUMULATOR=wide, **piece_tile,
        )  # fmt: skip
        join_kernel[(k, -(-width // join_tile["CHUNK"]))](
            of_pieces, pieces.first, pieces.last, sums, width, **join_tile
        )
    return sums, pieces.counts
