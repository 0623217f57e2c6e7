"""Tile sizes of the kernels: by kernel, precision, architecture and width of the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mcl_kernels.backends.triton import padded_edge, product_constants, triton_version


class Tiles(NamedTuple):
    """Sizes of a kernel's tile, and the options of its launch."""

    rows: int
    columns: int
    features: int  # of rows and columns that one product multiplies
    warps: int
    stages: int
    gradients: int = 0  # features whose gradient a program of the backward kernel holds
    chunk: int = 0  # features of the gradient that one product sums


# By kernel, precision and architecture, the tiles for each maximal width; an entry holds for later architectures up to
# the next one. Each is the fastest-looking of those tried that compile without a spill on its architecture
# (`python -m benchmarks.gpu.static`):
# - forward: 128 rows read each key once per 128 queries. Wide rows are loaded in parts of 64 features, in three stages.
# - backward: as many features of the gradient as a program can hold, since each part computes the logits again: 64 x
#   512 sums take half of the registers, and all of the tensor memory of sm_100. One product sums a chunk of them, so
#   that its operands fit next to the sums; then as many columns as still fit.
# - fp32 rows are twice as large, and tf32x3 splits each operand in two and needs sums of its own: on sm_90 and sm_100
#   those fit next to 64 x 256. Forward and backward take features 16 at a time, so that their logits are the same.
ANY_WIDTH = 1 << 62
TABLE: dict[tuple[str, str, int], dict[int, Tiles]] = {
    ("forward", "half", 80): {
        128: Tiles(rows=128, columns=128, features=128, warps=8, stages=2),
        ANY_WIDTH: Tiles(rows=128, columns=128, features=64, warps=8, stages=3),
    },
    ("forward", "tf32", 80): {
        ANY_WIDTH: Tiles(rows=128, columns=64, features=32, warps=8, stages=2),
    },
    ("forward", "tf32x3", 80): {
        ANY_WIDTH: Tiles(rows=128, columns=64, features=16, warps=8, stages=2),
    },
    ("backward", "half", 80): {
        128: Tiles(rows=128, columns=32, features=128, gradients=128, chunk=64, warps=8, stages=2),
        256: Tiles(rows=64, columns=64, features=64, gradients=256, chunk=256, warps=8, stages=2),
        ANY_WIDTH: Tiles(rows=64, columns=32, features=64, gradients=512, chunk=128, warps=8, stages=2),
    },
    ("backward", "half", 90): {
        128: Tiles(rows=128, columns=64, features=128, gradients=128, chunk=64, warps=8, stages=2),
        256: Tiles(rows=64, columns=64, features=64, gradients=256, chunk=256, warps=8, stages=2),
        ANY_WIDTH: Tiles(rows=64, columns=32, features=64, gradients=512, chunk=256, warps=8, stages=2),
    },
    ("backward", "half", 100): {
        128: Tiles(rows=128, columns=64, features=128, gradients=128, chunk=64, warps=8, stages=2),
        256: Tiles(rows=64, columns=64, features=64, gradients=256, chunk=256, warps=8, stages=2),
        ANY_WIDTH: Tiles(rows=64, columns=32, features=64, gradients=512, chunk=512, warps=8, stages=2),
    },
    ("backward", "tf32", 80): {
        256: Tiles(rows=64, columns=32, features=32, gradients=256, chunk=256, warps=8, stages=2),
        ANY_WIDTH: Tiles(rows=64, columns=16, features=16, gradients=512, chunk=128, warps=8, stages=2),
    },
    ("backward", "tf32", 90): {
        256: Tiles(rows=64, columns=32, features=32, gradients=256, chunk=128, warps=8, stages=2),
        ANY_WIDTH: Tiles(rows=64, columns=32, features=32, gradients=512, chunk=64, warps=8, stages=2),
    },
    ("backward", "tf32", 100): {
        256: Tiles(rows=64, columns=32, features=32, gradients=256, chunk=256, warps=8, stages=2),
        ANY_WIDTH: Tiles(rows=64, columns=16, features=16, gradients=512, chunk=512, warps=8, stages=1),
    },
    ("backward", "tf32x3", 80): {
        256: Tiles(rows=64, columns=16, features=16, gradients=256, chunk=128, warps=8, stages=2),
        ANY_WIDTH: Tiles(rows=64, columns=8, features=16, gradients=512, chunk=128, warps=8, stages=2),
    },
    ("backward", "tf32x3", 90): {
        ANY_WIDTH: Tiles(rows=64, columns=16, features=16, gradients=256, chunk=32, warps=8, stages=1),
    },
    ("backward", "tf32x3", 100): {
        ANY_WIDTH: Tiles(rows=64, columns=16, features=16, gradients=256, chunk=256, warps=8, stages=2),
    },
}
# The cost of the interpreter is that of its calls: few and large tiles.
INTERPRETED = Tiles(rows=128, columns=256, features=1024, gradients=1024, chunk=512, warps=4, stages=1)


def choose_tiles(kernel: str, precision: str, width: int, capability: tuple[int, int] | None) -> Tiles:
    """Returns the tiles of a kernel ("forward" or "backward") for rows of `width` features.

    Precision is that of `product_precision`; "ieee", which checks use, takes the tiles of tf32x3, the nearest in size.
    Capability None stands for the interpreter.
    """
    tiles = INTERPRETED
    if capability is not None:
        tiles = _compiled_tiles(kernel, "tf32x3" if precision == "ieee" else precision, width, capability[0])
    edge = padded_edge(width)
    return tiles._replace(
        features=min(tiles.features, edge), gradients=min(tiles.gradients, edge), chunk=min(tiles.chunk, edge)
    )


def _compiled_tiles(kernel: str, precision: str, width: int, major: int) -> Tiles:
    # Compute capabilities above 10 are of chips with the tensor cores and the shared memory of sm_80.
    limit = 10 * major if major <= 10 else 80
    architecture = max(
        third for first, second, third in TABLE if (first, second) == (kernel, precision) and third <= limit
    )
    by_width = TABLE[kernel, precision, architecture]
    if precision == "tf32x3" and triton_version() < (3, 9):
        # Triton before 3.9 may fail to compile products of 8 columns: wide rows take the tiles of narrow ones.
        by_width = {ANY_WIDTH: next(iter(by_width.values()))}
    return next(tiles for max_width, tiles in by_width.items() if width <= max_width)


def tile_constants(kernel: str, precision: str, dtype: torch.dtype, width: int, tiles: Tiles) -> dict[str, Any]:
    """Returns the constants that a kernel is compiled for: types of its products and sizes of its tiles."""
    constants = {
        **product_constants(precision, dtype),
        "ROWS": tiles.rows, "COLUMNS": tiles.columns, "FEATURES": tiles.features, "ONE_PART": width <= tiles.features,
    }  # fmt: skip
    if kernel == "backward":
        # PARTS is a constant, or values derived from it would hold registers throughout.
        parts = -(-width // tiles.gradients)
        constants |= {"GRADIENTS": tiles.gradients, "CHUNK": tiles.chunk, "PARTS": parts}
    return constants
