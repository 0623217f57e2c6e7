"""GPU kernels as they are compiled for the table: what a row names, and those of k-means.

Launches of k-means are written out here, specialised as by their launchers for contiguous rows, with D and the count of
rows divisible by 16. Those of the losses are recorded (own.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.loop import Tile
from mcl_kernels import __version__
from mcl_kernels.kmeans.triton import tile_table as kmeans

LIBRARY = f"mcl_kernels {__version__}"
# Float32 rows are multiplied by torch's setting: "tf32" with `high`, "fp32" with `highest`.
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
POINTERS = {"bf16": "*bf16", "tf32": "*fp32", "fp32": "*fp32"}
UNDIVIDED = "?"  # ends the type of an integer that is not assumed to be divisible by 16

Position = tuple[int, ...]  # of an argument, or of a field of a tuple


class Launch(NamedTuple):
    """A kernel with its specialisation."""

    library: str
    kernel: str
    compile: Callable[[], Any]
    tiles: dict[str, int]  # rows, columns, features, gradients, chunk, as far as the kernel has them
    warps: int
    stages: int
    depth: int = 0  # multiply-adds on the tensor cores that a pair needs; 0 if no loop is counted
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


def describe(
    function: Any, arguments: dict[str, Any], constants: dict[str, Any], architecture: int, warps: int, stages: int
) -> Callable[[], Any]:
    """Returns a function that compiles a kernel for arguments of these types, without a launch.

    An argument is a type, None or an integer that is compiled in, or a tuple of these. Constants are the tl.constexpr
    arguments. Pointers and integers are divisible by 16, unless UNDIVIDED.
    """
    return partial(_compile, function, arguments, constants, architecture, warps, stages)


def _compile(
    function: Any, arguments: dict[str, Any], constants: dict[str, Any], architecture: int, warps: int, stages: int
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, positions, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], positions[index,] = "constexpr", constants[name]
        else:
            signature[name] = _argument_types(arguments[name], (index,), positions, attributes)
    source = ASTSource(fn=function, signature=signature, constexprs=positions, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def _argument_types(
    argument: Any, position: Position, constants: dict[Position, Any], attributes: dict[Position, Any]
) -> Any:
    """Returns the type of an argument, for a tuple those of its fields; records constants and divisibility by 16."""
    if isinstance(argument, tuple):
        fields = enumerate(argument)
        return type(argument)(*(_argument_types(field, (*position, i), constants, attributes) for i, field in fields))
    if not isinstance(argument, str):
        constants[position] = argument
        return "constexpr"
    if argument.startswith(("*", "i32")) and not argument.endswith(UNDIVIDED):
        attributes[position] = [["tt.divisibility", 16]]
    return argument.removesuffix(UNDIVIDED)


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
PARTS = ("k-means: find parts, 1000 centres", "k-means: join parts")  # of few rows
SUMS = ("k-means: sums of pieces", "k-means: sums of clusters")
KMEANS = (*ASSIGN, *PARTS, *SUMS)


def kmeans_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch | None:
    """Returns None if k-means has no such kernel in this precision, or the same one in another precision."""
    if kernel in (*ASSIGN, *PARTS):
        return _assign_kernel(kernel, architecture, precision, width)
    return _label_sums_kernel(kernel, architecture, precision)


def _assign_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch | None:
    from mcl_kernels.kmeans.triton import arguments as groups
    from mcl_kernels.kmeans.triton import assign, parts

    clusters, cosine, with_sums = ASSIGN.get(kernel, Pass(1000, False, False))
    if precision == "tf32":  # k-means multiplies fp32 as tf32x3
        return None
    launcher_precision, features = "half" if precision == "bf16" else "tf32x3", POINTERS[precision]
    if with_sums and not kmeans.sums_few(launcher_precision, width, clusters):
        return None
    tiles = kmeans.choose_tiles(launcher_precision, width, clusters, (architecture // 10, 0))
    low = features if launcher_precision == "half" else None
    arguments = {
        "rows": groups.RowArguments(features, "i32", 1),
        "centers": groups.CenterArguments("*fp32", "*fp32", features, low, "*fp32", "*fp32"),
        "results": groups.ResultArguments("*i64", "*fp32", "*i1", "*fp32"),
        "partial": groups.SumArguments("*fp64", "*i64", "*fp32", "*fp32") if with_sums else None,
        "found": groups.PartArguments("*fp32", "*fp32", "*i32", "*fp32"),
        "n": "i32?", "clusters": "i32?", "width": "i32", "parts": "i32?",
    }  # fmt: skip
    constants = kmeans.tile_constants(launcher_precision, DTYPES[precision], width, clusters, cosine, with_sums, tiles)
    sizes = tiles._asdict()
    warps, stages = sizes.pop("warps"), sizes.pop("stages")
    function = {PARTS[0]: parts.find_parts_kernel, PARTS[1]: parts.join_parts_kernel}.get(kernel, assign.assign_kernel)
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    compile_kernel = describe(function, arguments, constants, architecture, warps, stages)
    return Launch(LIBRARY, kernel, compile_kernel, sizes, warps, stages)


def _label_sums_kernel(kernel: str, architecture: int, precision: str) -> Launch | None:
    import triton.language as tl

    from mcl_kernels.kmeans.triton import label_sums

    pieces = kernel == SUMS[0]
    if precision == "fp32" or (precision == "bf16" and not pieces):
        return None
    constants = dict(label_sums.PIECE_TILE if pieces else label_sums.JOIN_TILE)
    sizes = {"rows": constants["ROWS"], "chunk": constants["CHUNK"]}
    function = label_sums.sum_pieces_kernel if pieces else label_sums.join_pieces_kernel
    if pieces:
        constants |= {"COSINE": False, "ACCUMULATOR": tl.float32, "x_step": 1}
    types = {"x": POINTERS[precision], "x_stride": "i32", "width": "i32", "inverse_norms": "*fp32", "offset": "*fp32"}
    types |= dict.fromkeys(("order", "begin", "end"), "*i64") | dict.fromkeys(("sums", "pieces", "rounding"), "*fp64")
    arguments = {name: types[name] for name in function.arg_names if name not in constants}
    return Launch(LIBRARY, kernel, describe(function, arguments, constants, architecture, 4, 3), sizes, 4, 3)
