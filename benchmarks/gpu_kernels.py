"""GPU kernels of this library and of its peers, specialised as by their launchers, for `gpu_static` to compile.

Rows are contiguous; D and the counts of rows are divisible by 16. The cost of a loss, forward and backward, is given in
units: one unit is a product of D elements for every pair that the kernels visit.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from mcl_kernels.kmeans.triton import tile_table as kmeans
from mcl_kernels.logsumexp.triton.tile_table import choose_tiles, tile_constants

DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "tf32x3": torch.float32}
POINTERS = {"bf16": "*bf16", "tf32": "*fp32", "tf32x3": "*fp32"}


class Launch(NamedTuple):
    """A kernel with its specialisation."""

    library: str
    kernel: str
    function: Any
    arguments: dict[str, Any]  # a type; None or an integer that is compiled in; or a tuple of these
    constants: dict[str, Any]  # tl.constexpr arguments
    undivided: tuple[str, ...]  # integers that are not assumed to be divisible by 16
    tiles: dict[str, int]  # rows, columns, features, gradients, chunk, as far as the kernel has them
    warps: int
    stages: int


class Units(NamedTuple):
    """Units of a loss by its form; None if a library does not have that form."""

    self_form: int | None
    one_direction: int | None
    both_directions: int | None
    pairs: str  # that are visited: "kept", rounded up to tiles, or "all"


# The first of each is its most frequent call: the self form, a fixed temperature, negatives of the same cluster.
FORWARD = ("forward", "forward, different")
SCALE_TOO, KEYS = "backward, scale too", "backward, keys, scale of each query"
BACKWARD = ("backward", "backward, different", SCALE_TOO, KEYS)
OWN = (*FORWARD, *BACKWARD)


def own_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch:
    from mcl_kernels.logsumexp.triton.arguments import ColumnArguments, RowArguments, TermArguments
    from mcl_kernels.logsumexp.triton.backward import backward_kernel
    from mcl_kernels.logsumexp.triton.forward import forward_kernel

    function = forward_kernel if kernel in FORWARD else backward_kernel
    name, launcher_precision = kernel.split(",")[0], _launcher_precision(precision)
    tiles = choose_tiles(name, launcher_precision, width, (architecture // 10, 0))
    different, features = kernel.endswith("different"), POINTERS[precision]
    ids = "*i64" if different else None
    row_term = None if kernel == KEYS else "*fp32"
    arguments = {
        "rows": RowArguments(features, "i32", 1, "*i64", "*i64", "*i64", "*i32", "*i32", ids, "*fp32"),
        "columns": ColumnArguments(features, "i32", 1, "*i64", ids),
        "terms": TermArguments(row_term, row_term, "*fp32", "*fp32", "*fp32" if kernel == KEYS else None, None),
        "threshold": None, "result": "*fp32",
        "grad_x": features, "grad_scale": "*fp32" if kernel == SCALE_TOO else None,
        "n": "i32", "width": "i32",
    }  # fmt: skip
    constants = {
        **tile_constants(name, launcher_precision, DTYPES[precision], width, tiles),
        "SCALE_STRIDE": 0, "SKIPS_TILES": different,
    }  # fmt: skip
    arguments = {argument: types for argument, types in arguments.items() if argument in function.arg_names}
    sizes = tiles._asdict()
    warps, stages = sizes.pop("warps"), sizes.pop("stages")
    return Launch(
        f"mcl_kernels {version('mcl_kernels')}", kernel, function, arguments, constants, ("n",), sizes, warps, stages
    )


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
        "n": "i32", "clusters": "i32", "width": "i32",
    }  # fmt: skip
    constants = kmeans.tile_constants(launcher_precision, DTYPES[precision], width, clusters, cosine, with_sums, tiles)
    sizes = tiles._asdict()
    warps, stages = sizes.pop("warps"), sizes.pop("stages")
    return Launch(
        f"mcl_kernels {version('mcl_kernels')}", kernel, assign.assign_kernel, arguments, constants, ("n", "clusters"),
        sizes, warps, stages,
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
    return Launch(f"mcl_kernels {version('mcl_kernels')}", kernel, function, arguments, constants, (), sizes, 4, 3)


def own_units(architecture: int, precision: str, width: int) -> Units:
    """Units of our kernels. Of each side: one forward; backward one for the sum, and one for the logits of each part.

    A part is the block of features whose gradients a program accumulates.
    """
    tiles = choose_tiles("backward", _launcher_precision(precision), width, (architecture // 10, 0))
    side = 1 - (-width // tiles.gradients)
    return Units(1 + side, 1 + 2 * side, 2 + 2 * side, "kept")


def _launcher_precision(precision: str) -> str:
    return "half" if precision == "bf16" else precision


INF_CL = ("inf-cl: forward", "inf-cl: backward, queries", "inf-cl: backward, keys")
MEMEFF = ("memeff: forward", "memeff: backward")


def peer_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch | None:
    """Returns None if the library does not multiply in this precision."""
    if kernel in INF_CL:
        return _inf_cl_kernel(kernel, width) if precision == "tf32" else None
    return _memeff_kernel(kernel, architecture, precision, width) if precision != "tf32x3" else None


def peer_units(kernel: str, architecture: int, width: int) -> Units:
    """Units of a peer. Inf-CL recomputes logits for each side of each direction, memeff once for both directions.

    For rows that are too wide for its row-owner kernels, memeff has a backward pass of three units with atomic sums.
    """
    if kernel in INF_CL:
        return Units(None, 5, 10, "all")
    return Units(None, None, 5 if _memeff_owns_rows(architecture, width) else 4, "all")


def _inf_cl_kernel(kernel: str, width: int) -> Launch:
    from inf_cl import flash

    names = ("_prob_fwd_kernel", "_dq_prob_bwd_kernel", "_dk_prob_bwd_kernel")
    function = getattr(flash, names[INF_CL.index(kernel)])
    head = min(width, 256)  # its launcher's default; rows are split into heads of this width, always in fp32
    constants = {"BLOCK_HEADDIM": head, "BLOCK_M": 64, "BLOCK_N": 64}
    heads = width // head
    if heads == 1:
        constants["nheads"] = 1  # an integer of 1 becomes a constant
    types = {
        argument: "i32" if argument in ("nheads", "seqlen_q", "seqlen_k") else "*fp32"
        for argument in function.arg_names
        if argument not in constants
    }
    tiles = {"rows": 64, "columns": 64, "features": head}
    return Launch(f"inf-cl {version('inf-cl')}", kernel, function, types, constants, ("nheads",), tiles, 8, 1)


def _memeff_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch:
    from memeff import _common, clip_loss, distributed_clip_loss

    features = _common.check_dims(width)
    constants = {"D_MODEL": width, "INPUT_PRECISION": "tf32"}
    with _capability(architecture):
        if kernel == "memeff: forward":
            function = distributed_clip_loss.clip_denom_kernel
            rows, columns, warps, stages = 128, 128, 4, 3  # Triton's defaults
            constants["BLOCK_SIZE_D"] = features
        elif _common.fa_ok(width, None):
            function = clip_loss.clip_fa_grad_kernel
            rows, columns, warps, stages = _common.fa_blocks(None, width)
            features = constants["D_POW2"] = 1 << (width - 1).bit_length()
            constants["BIDIR"] = True
        else:
            function = distributed_clip_loss.clip_grad_both_kernel
            rows, columns, warps, stages = _common.backward_blocks(None)
            constants["BLOCK_SIZE_D"] = features
    constants |= {"BLOCK_SIZE_I": rows, "BLOCK_SIZE_J": columns}
    types = {
        argument: _memeff_type(argument, precision) for argument in function.arg_names if argument not in constants
    }
    tiles = {"rows": rows, "columns": columns, "features": features}
    return Launch(f"memeff {version('memeff')}", kernel, function, types, constants, (), tiles, warps, stages)


def _memeff_owns_rows(architecture: int, width: int) -> bool:
    from memeff import _common

    with _capability(architecture):
        return bool(_common.fa_ok(width, None))


def _memeff_type(argument: str, precision: str) -> str:
    if argument in ("A_ptr", "B_ptr", "X_ptr", "Y_ptr"):
        return POINTERS[precision]
    if argument in ("n_own", "n_other", "n_i", "n_j", "batch_size"):
        return "i32"
    return "*fp32" if argument.endswith("_ptr") else "fp32"


def _capability(architecture: int) -> Any:
    """Replaces the device capability, by which memeff chooses its tiles."""
    return patch("torch.cuda.get_device_capability", return_value=divmod(architecture, 10))
