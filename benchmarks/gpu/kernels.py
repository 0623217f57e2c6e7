"""GPU kernels of this library, specialised as by their launchers, for `static` to compile.

Rows are contiguous, and the fields of a row and the counts of rows divisible by 16, unless a kernel says otherwise. The
cost of a loss, forward and backward, is given in units: one unit is a product of D elements for every pair that the
kernels visit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.gpu.loop import Tile
from mcl_kernels import __version__
from mcl_kernels.kmeans.triton import tile_table as kmeans
from mcl_kernels.logsumexp.triton.tile_table import choose_tiles, tile_constants

LIBRARY = f"mcl_kernels {__version__}"
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "tf32x3": torch.float32}
POINTERS = {"bf16": "*bf16", "tf32": "*fp32", "tf32x3": "*fp32"}
PARTS = {"bf16": 1, "tf32": 1, "tf32x3": 3}  # products of tensor cores for one of rows
UNDIVIDED = "?"  # ends the type of a pointer or an integer that is not assumed to be divisible by 16


class Launch(NamedTuple):
    """A kernel with its specialisation."""

    library: str
    kernel: str
    function: Any
    arguments: dict[str, Any]  # a type; None or an integer that is compiled in; or a tuple of these
    constants: dict[str, Any]  # tl.constexpr arguments
    tiles: dict[str, int]  # rows, columns, features, gradients, chunk, as far as the kernel has them
    warps: int
    stages: int
    depth: int = 0  # multiply-adds of each pair on the tensor cores; 0 if no loop is counted
    steps: int = 1  # of the loop over features

    def tile(self, architecture: int) -> Tile:
        """What an iteration of its inner loop computes."""
        rows, columns = self.tiles["rows"], self.tiles["columns"]
        return Tile(architecture, rows, columns, self.depth, self.warps, self.steps)


class Units(NamedTuple):
    """Units of a loss by its form; None if a library does not have that form."""

    self_form: int | None
    one_direction: int | None
    both_directions: int | None
    pairs: str  # that are visited: "kept", rounded up to tiles, or "all"


# The first of each is its most frequent call: the self form, a fixed temperature, negatives of the same cluster.
UNALIGNED = ("forward, unaligned", "backward, unaligned")  # slices of wider rows, at no multiple of 16 bytes
FORWARD = ("forward", "forward, different", UNALIGNED[0])
SCALE_TOO, KEYS = "backward, scale too", "backward, keys, scale of each query"
BACKWARD = ("backward", "backward, different", SCALE_TOO, KEYS, UNALIGNED[1])
OWN = (*FORWARD, *BACKWARD)


def own_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch | None:
    """Returns None for unaligned rows in another precision than bf16."""
    if kernel in UNALIGNED and precision != "bf16":
        return None
    from mcl_kernels.logsumexp.triton.arguments import ColumnArguments, RowArguments, TermArguments
    from mcl_kernels.logsumexp.triton.backward import backward_kernel
    from mcl_kernels.logsumexp.triton.forward import forward_kernel

    function = forward_kernel if kernel in FORWARD else backward_kernel
    name, launcher_precision = kernel.split(",")[0], _launcher_precision(precision)
    tiles = choose_tiles(name, launcher_precision, width, (architecture // 10, 0))
    different, features = kernel.endswith("different"), POINTERS[precision]
    ids = "*i64" if different else None
    size = "i32" if width % 16 == 0 else "i32?"
    x, stride = (features + UNDIVIDED, "i32?") if kernel in UNALIGNED else (features, size)
    row_term = None if kernel == KEYS else "*fp32"
    arguments = {
        "rows": RowArguments(x, stride, 1, "*i64", "*i64", "*i64", "*i32", "*i32", ids, "*fp32"),
        "columns": ColumnArguments(x, stride, 1, "*i64", ids),
        "terms": TermArguments(row_term, row_term, "*fp32", "*fp32", "*fp32" if kernel == KEYS else None, None),
        "threshold": None, "result": "*fp32",
        "grad_x": features, "grad_scale": "*fp32" if kernel == SCALE_TOO else None,
        "n": "i32?", "width": size,
    }  # fmt: skip
    constants = {
        **tile_constants(name, launcher_precision, DTYPES[precision], width, tiles),
        "SCALE_STRIDE": 0, "SKIPS_TILES": different,
    }  # fmt: skip
    arguments = {argument: types for argument, types in arguments.items() if argument in function.arg_names}
    sizes = tiles._asdict()
    warps, stages = sizes.pop("warps"), sizes.pop("stages")
    steps = -(-width // tiles.features)
    depth = PARTS[precision] * (steps * tiles.features + tiles.gradients)
    return Launch(LIBRARY, kernel, function, arguments, constants, sizes, warps, stages, depth, steps)


class Pass(NamedTuple):
    """Specialisation of the assignment kernel of k-means."""

    clusters: int
    cosine: bool
    with_sums: bool


# A stage of MCL has about 10 centres. Sums are products with one-hot labels for 10 and 32 centres, but not for 1000.
ASSIGN = {
    f"k-means: {name}, {clusters} centres{', cosine' if cosine else ''}": Pass(clusters, cosine, name != "assign")
    for name, clusters, cosine in (
        ("assign", 10, False), ("assign and sum", 10, False), ("assign and sum", 10, True),
        ("assign and sum", 32, False), ("assign", 1000, False), ("assign", 1000, True),
    )
}  # fmt: skip
SUMS = ("k-means: sums of pieces", "k-means: sums of clusters")
KMEANS = (*ASSIGN, *SUMS)


def kmeans_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch | None:
    """Returns None if k-means has no such kernel in this precision, or the same one in another precision."""
    if kernel in ASSIGN:
        return _assign_kernel(kernel, architecture, precision, width)
    return _label_sums_kernel(kernel, precision)


def _assign_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch | None:
    from mcl_kernels.kmeans.triton import assign

    clusters, cosine, with_sums = ASSIGN[kernel]
    launcher_precision, features = _launcher_precision(precision), POINTERS[precision]
    if precision == "tf32":  # k-means multiplies fp32 as tf32x3
        return None
    if with_sums and not kmeans.sums_few(launcher_precision, width, clusters):
        return None
    tiles = kmeans.choose_tiles(launcher_precision, width, clusters, (architecture // 10, 0))
    low = features if launcher_precision == "half" else None
    arguments = {
        "rows": assign.RowArguments(features, "i32", 1),
        "centers": assign.CenterArguments("*fp32", "*fp32", features, low, "*fp32", "*fp32"),
        "results": assign.ResultArguments("*i64", "*fp32", "*i1", "*fp32"),
        "partial": assign.SumArguments("*fp64", "*i64", "*fp32", "*fp32") if with_sums else None,
        "n": "i32?", "clusters": "i32?", "width": "i32",
    }  # fmt: skip
    constants = kmeans.tile_constants(launcher_precision, DTYPES[precision], width, clusters, cosine, with_sums, tiles)
    sizes = tiles._asdict()
    warps, stages = sizes.pop("warps"), sizes.pop("stages")
    return Launch(
        LIBRARY, kernel, assign.assign_kernel, arguments, constants, sizes, warps,
        stages,
    )  # fmt: skip


def _label_sums_kernel(kernel: str, precision: str) -> Launch | None:
    import triton.language as tl

    from mcl_kernels.kmeans.triton import label_sums

    pieces = kernel == SUMS[0]
    if precision == "tf32x3" or (precision == "bf16" and not pieces):
        return None
    constants = dict(label_sums.PIECE_TILE if pieces else label_sums.JOIN_TILE)
    sizes = {"rows": constants["ROWS"], "chunk": constants["CHUNK"]}
    function = label_sums.sum_pieces_kernel if pieces else label_sums.join_pieces_kernel
    if pieces:
        constants |= {"COSINE": False, "ACCUMULATOR": tl.float32, "x_step": 1}
    types = {"x": POINTERS[precision], "x_stride": "i32", "width": "i32", "inverse_norms": "*fp32", "offset": "*fp32"}
    types |= dict.fromkeys(("order", "begin", "end"), "*i64") | dict.fromkeys(("sums", "pieces", "rounding"), "*fp64")
    arguments = {name: types[name] for name in function.arg_names if name not in constants}
    return Launch(LIBRARY, kernel, function, arguments, constants, sizes, 4, 3)


def own_units(architecture: int, precision: str, width: int) -> Units:
    """Units of our kernels. Of each side: one forward; backward one for the sum, and one for the logits of each part.

    A part is the block of features whose gradients a program accumulates.
    """
    tiles = choose_tiles("backward", _launcher_precision(precision), width, (architecture // 10, 0))
    side = 1 - (-width // tiles.gradients)
    return Units(1 + side, 1 + 2 * side, 2 + 2 * side, "kept")


def _launcher_precision(precision: str) -> str:
    return "half" if precision == "bf16" else precision
