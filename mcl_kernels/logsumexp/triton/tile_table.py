"""Tile sizes of the kernels: by kernel, precision, architecture and width of the rows."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcl_kernels.backends.triton import compute_capability, padded_edge, product_precision


class Tiles(NamedTuple):
    """Sizes of a kernel's tile, and the options of its launch. Those below the line follow from the rows."""

    rows: int
    columns: int
    features: int  # that one product multiplies: all of them, or a part of rows that are wider
    warps: int
    stages: int
    per_multiprocessor: int = 1  # programs
    gradients: int = 0  # features whose gradient a program of the backward kernel sums
    descriptors: bool = False  # tiles are read by bulk copies, which sm_90 and later have
    piece: int = 4  # rows that a program of the backward join sums
    joined: int = 16  # slots that a program of a join loads at a time
    # --
    width: int = 0  # of a sorted copy
    operand: torch.dtype = torch.float32  # of a sorted copy
    splits: int = 1  # parts of a number of a sorted copy
    precision: str = "tf32"  # of a product, as Triton names it

    def blocks(self, n: int) -> int:
        """Number of blocks of `rows` rows in a sorted copy of n rows, which holds a tile of columns past its last."""
        return -(-n // self.rows) + -(-self.columns // self.rows)

    @property
    def parts(self) -> int:
        """Number of parts of the gradient's features, which programs sum one each."""
        return -(-self.width // self.gradients)

    @property
    def copied(self) -> int:
        """Features that the copy kernel copies at a time."""
        return min(64, padded_edge(self.width))


# By kernel, precision and architecture, the tiles for each maximal width; an entry holds for later architectures up to
# the next one. Each is the best of those tried by what its machine code shows (`python -m benchmarks.gpu.static`):
# - up to 512 features a tile of rows stays in the multiprocessor, and columns are read once for each tile of rows.
#   Wider rows, and split ones that do not fit, are read in parts;
# - two programs share a multiprocessor where they fit: one multiplies while the other takes exponentials;
# - few registers are spilled in a loop over columns, none with half precision;
# - backward: as many features of the gradient as a program can hold, since each part computes the logits again.
ANY_WIDTH = 1 << 62
TABLE: dict[tuple[str, str, int], dict[int, Tiles]] = {
    ("forward", "half", 80): {
        128: Tiles(rows=64, columns=128, features=128, warps=4, stages=2, per_multiprocessor=2),
        256: Tiles(rows=64, columns=64, features=256, warps=4, stages=2, per_multiprocessor=2),
        512: Tiles(rows=64, columns=64, features=512, warps=4, stages=2),
        ANY_WIDTH: Tiles(rows=128, columns=128, features=64, warps=8, stages=3),
    },
    ("forward", "half", 90): {
        128: Tiles(rows=64, columns=128, features=128, warps=4, stages=2, per_multiprocessor=2, descriptors=True),
        256: Tiles(rows=128, columns=128, features=256, warps=8, stages=2, descriptors=True),
        512: Tiles(rows=128, columns=32, features=512, warps=8, stages=2, descriptors=True),
        ANY_WIDTH: Tiles(rows=128, columns=128, features=64, warps=8, stages=3),
    },
    ("forward", "half", 100): {
        128: Tiles(rows=128, columns=128, features=128, warps=4, stages=2, per_multiprocessor=2, descriptors=True),
        256: Tiles(rows=128, columns=64, features=256, warps=8, stages=2, descriptors=True),
        512: Tiles(rows=64, columns=64, features=512, warps=4, stages=2, descriptors=True),
        ANY_WIDTH: Tiles(rows=128, columns=128, features=64, warps=4, stages=3, per_multiprocessor=2),
    },
    ("forward", "tf32", 80): {
        128: Tiles(rows=64, columns=64, features=128, warps=4, stages=2, per_multiprocessor=2),
        256: Tiles(rows=64, columns=32, features=256, warps=4, stages=2),
        ANY_WIDTH: Tiles(rows=128, columns=64, features=32, warps=8, stages=2),
    },
    ("forward", "tf32", 90): {
        128: Tiles(rows=64, columns=64, features=128, warps=4, stages=2, per_multiprocessor=2, descriptors=True),
        256: Tiles(rows=64, columns=32, features=256, warps=4, stages=2, descriptors=True),
        ANY_WIDTH: Tiles(rows=128, columns=64, features=32, warps=8, stages=2, per_multiprocessor=2),
    },
    ("forward", "bf16x6", 90): {
        128: Tiles(rows=128, columns=64, features=128, warps=8, stages=2, descriptors=True),
        256: Tiles(rows=64, columns=32, features=256, warps=4, stages=2, descriptors=True),
        ANY_WIDTH: Tiles(rows=128, columns=64, features=64, warps=8, stages=2),
    },
    ("forward", "tf32x3", 80): {
        ANY_WIDTH: Tiles(rows=128, columns=64, features=16, warps=8, stages=2),
    },
    ("backward", "half", 80): {
        128: Tiles(rows=64, columns=128, features=128, warps=4, stages=2, per_multiprocessor=2),
        256: Tiles(rows=64, columns=32, features=256, warps=4, stages=2, per_multiprocessor=2),
        512: Tiles(rows=64, columns=64, features=512, warps=8, stages=2),
        ANY_WIDTH: Tiles(rows=64, columns=32, features=64, warps=8, stages=2, gradients=512),
    },
    ("backward", "half", 90): {
        128: Tiles(rows=64, columns=128, features=128, warps=4, stages=2, per_multiprocessor=2, descriptors=True),
        256: Tiles(rows=64, columns=64, features=256, warps=4, stages=2, per_multiprocessor=2, descriptors=True),
        512: Tiles(rows=64, columns=64, features=512, warps=8, stages=2, descriptors=True),
        ANY_WIDTH: Tiles(rows=64, columns=64, features=64, warps=8, stages=2, gradients=512),
    },
    ("backward", "half", 100): {
        128: Tiles(rows=64, columns=128, features=128, warps=4, stages=2, descriptors=True),
        256: Tiles(rows=64, columns=64, features=256, warps=8, stages=2, descriptors=True),
        512: Tiles(rows=64, columns=32, features=512, warps=8, stages=2, descriptors=True),
        ANY_WIDTH: Tiles(rows=64, columns=64, features=64, warps=8, stages=2, gradients=512),
    },
    ("backward", "tf32", 80): {
        128: Tiles(rows=64, columns=32, features=128, warps=4, stages=2, per_multiprocessor=2),
        ANY_WIDTH: Tiles(rows=64, columns=32, features=32, warps=8, stages=2, gradients=512),
    },
    ("backward", "tf32", 90): {
        128: Tiles(rows=64, columns=32, features=128, warps=4, stages=2, per_multiprocessor=2, descriptors=True),
        ANY_WIDTH: Tiles(rows=64, columns=32, features=32, warps=8, stages=2, gradients=512),
    },
    ("backward", "bf16x6", 90): {
        128: Tiles(rows=128, columns=64, features=128, warps=8, stages=2, descriptors=True),
        256: Tiles(rows=128, columns=64, features=64, warps=8, stages=2, gradients=128),
        ANY_WIDTH: Tiles(rows=128, columns=32, features=64, warps=8, stages=2, gradients=256),
    },
    ("backward", "tf32x3", 80): {
        128: Tiles(rows=64, columns=16, features=16, warps=4, stages=2, gradients=128, per_multiprocessor=2),
        ANY_WIDTH: Tiles(rows=64, columns=16, features=16, warps=8, stages=2, gradients=256),
    },
}
# The cost of the interpreter is that of its calls: few and large tiles.
INTERPRETED = Tiles(rows=128, columns=256, features=512, gradients=1024, warps=4, stages=1, piece=128, joined=2)
# By precision: type of a copy, parts of a number, and precision of a product as Triton names it.
OPERANDS = {
    "bf16x6": (torch.bfloat16, 3, "tf32"),  # a number is the sum of three; six products are as exact as fp32
    "tf32": (torch.float32, 1, "tf32"),
    "tf32x3": (torch.float32, 1, "tf32x3"),
    "ieee": (torch.float64, 1, "ieee"),
}


def loss_precision(x: Tensor, y: Tensor, accumulated: Tensor) -> str:
    """Returns the precision in which rows of x and y are multiplied: "half", "bf16x6", "tf32x3", "tf32" or "ieee"."""
    precision = product_precision(x, y, accumulated)
    return exact_precision(x.device) if precision == "tf32x3" else precision


def exact_precision(device: torch.device) -> str:
    """Returns the precision of products that are as exact as fp32.

    On sm_90 they are six products of bfloat16. sm_80 lacks the registers for them, and on sm_100 Triton takes more
    tensor memory than there is: there they are three products of tf32.
    """
    capability = compute_capability(device)
    return "bf16x6" if capability is None or capability[0] == 9 else "tf32x3"


@cache
def choose_tiles(
    kernel: str, precision: str, dtype: torch.dtype, width: int, capability: tuple[int, int] | None
) -> Tiles:
    """Returns the tiles of a kernel ("forward" or "backward") for rows of `width` features.

    Precision is that of `loss_precision`, dtype that of the rows. "ieee", which checks use, takes the tiles of tf32x3,
    the nearest in size. Capability None stands for the interpreter.
    """
    tiles = INTERPRETED
    if capability is not None:
        tiles = _compiled_tiles(kernel, "tf32x3" if precision == "ieee" else precision, width, capability[0])
    edge = padded_edge(width)
    features = min(tiles.features, edge)
    padded = -(-width // 16) * 16
    if features < padded:
        padded = -(-width // features) * features
    operand, splits, product = OPERANDS.get(precision, (dtype, 1, "tf32"))
    return tiles._replace(
        features=features,
        gradients=min(tiles.gradients or features, edge),
        descriptors=tiles.descriptors and features >= padded,
        width=padded,
        operand=operand,
        splits=splits,
        precision=product,
    )


def _compiled_tiles(kernel: str, precision: str, width: int, major: int) -> Tiles:
    # Compute capabilities above 10 are of chips with the tensor cores and the shared memory of sm_80.
    limit = 10 * major if major <= 10 else 80
    architecture = max(
        third for first, second, third in TABLE if (first, second) == (kernel, precision) and third <= limit
    )
    return next(tiles for max_width, tiles in TABLE[kernel, precision, architecture].items() if width <= max_width)


def operand_of(tiles: Tiles) -> Any:
    """Returns the type of the operands as Triton names it."""
    import triton.language as tl

    return getattr(tl, str(tiles.operand).removeprefix("torch."))
