"""Tile sizes of the kernel that assigns rows: by precision, architecture and number of centres."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mcl_kernels.backends.triton import padded_edge, product_constants
from mcl_kernels.kmeans.gpu_common import MAX_SUMMED_CENTERS, MAX_SUMMED_ELEMENTS


class Tiles(NamedTuple):
    """Sizes of a kernel's tile, and the options of its launch."""

    rows: int  # at most 8192: fp32 sums of that many integers up to 2^11 are exact
    columns: int
    features: int  # of rows and centres that one product multiplies
    chunk: int  # features whose sums are one product
    warps: int
    stages: int


# Tiles by precision and architecture, and by the largest number of centres that they are for. An entry holds for later
# architectures up to the next one. Tiles were chosen by the resources that `python -m benchmarks.gpu.static k-means`
# reports: none spills on its architecture.
# - Few centres: the pass is bound by memory. The 64 rows of each of several programs, loaded in complete cache lines,
#   stay in the cache until they are read a second time, and registers leave room for another program.
# - Many centres: the pass is bound by products. Tiles are 128 x 128, or smaller where operands that are split in
#   registers would spill.
ANY_NUMBER = 1 << 62
TABLE: dict[tuple[str, int], dict[int, Tiles]] = {
    ("half", 80): {
        MAX_SUMMED_CENTERS: Tiles(rows=64, columns=32, features=64, chunk=32, warps=8, stages=2),
        ANY_NUMBER: Tiles(rows=128, columns=128, features=32, chunk=32, warps=8, stages=2),
    },
    ("half", 90): {
        MAX_SUMMED_CENTERS: Tiles(rows=64, columns=32, features=64, chunk=64, warps=8, stages=2),
        ANY_NUMBER: Tiles(rows=128, columns=128, features=64, chunk=32, warps=8, stages=3),
    },
    ("tf32x3", 80): {
        MAX_SUMMED_CENTERS: Tiles(rows=64, columns=32, features=32, chunk=64, warps=8, stages=2),
        ANY_NUMBER: Tiles(rows=128, columns=64, features=16, chunk=32, warps=8, stages=2),
    },
    ("tf32x3", 90): {
        MAX_SUMMED_CENTERS: Tiles(rows=64, columns=32, features=32, chunk=64, warps=8, stages=2),
        ANY_NUMBER: Tiles(rows=128, columns=128, features=32, chunk=32, warps=8, stages=2),
    },
}
# The interpreter's cost is per call, so its tiles are few and large.
INTERPRETED = Tiles(rows=1024, columns=256, features=1024, chunk=1024, warps=4, stages=1)


def choose_tiles(precision: str, width: int, clusters: int, capability: tuple[int, int] | None) -> Tiles:
    """Returns the tiles for rows of `width` features; the same with and without sums, so that labels are the same.

    Precision is "half", "tf32x3" or "ieee", which takes the tiles of tf32x3, the nearest in size. Capability None
    stands for the interpreter.
    """
    tiles = INTERPRETED
    if capability is not None:
        precision = "tf32x3" if precision == "ieee" else precision
        architectures = [architecture for known, architecture in TABLE if known == precision]
        architecture = max(known for known in architectures if known <= 10 * capability[0])
        by_clusters = TABLE[precision, architecture]
        tiles = next(tiles for max_clusters, tiles in by_clusters.items() if clusters <= max_clusters)
    edge = padded_edge(width)
    return tiles._replace(
        columns=min(tiles.columns, padded_edge(clusters)),
        features=min(tiles.features, edge),
        chunk=min(tiles.chunk, edge),
    )


def tile_constants(
    precision: str, dtype: torch.dtype, width: int, clusters: int, cosine: bool, with_sums: bool, tiles: Tiles
) -> dict[str, Any]:
    """Returns the constants that the kernel is compiled for: types of its products and sizes of its tiles."""
    sums = with_sums and sums_few(precision, width, clusters)
    return {
        "COSINE": cosine, **product_constants(precision, dtype),
        "ROWS": tiles.rows, "COLUMNS": tiles.columns, "FEATURES": tiles.features, "CHUNK": tiles.chunk,
        "CLUSTERS": padded_edge(clusters) if sums else 0,
    }  # fmt: skip


def sums_few(precision: str, width: int, clusters: int) -> bool:
    """Returns whether sums are products with the one-hot labels, of fp32 entries; else rows are sorted by label."""
    clusters = padded_edge(clusters)
    return precision != "ieee" and clusters <= MAX_SUMMED_CENTERS and clusters * width <= MAX_SUMMED_ELEMENTS
