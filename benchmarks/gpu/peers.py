"""GPU kernels of two peers, memeff and Inf-CL, specialised as by their launchers, for `static` to compile.

Rows are contiguous, and D and the counts of rows divisible by 16.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any
from unittest.mock import patch

from benchmarks.gpu.kernels import POINTERS, Launch, Units, describe

INF_CL = ("inf-cl: forward", "inf-cl: backward, queries", "inf-cl: backward, keys")
MEMEFF = ("memeff: forward", "memeff: backward")


def peer_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch | None:
    """Returns None if the library does not multiply in this precision."""
    if kernel in INF_CL:
        return _inf_cl_kernel(kernel, architecture, width) if precision == "tf32" else None
    return _memeff_kernel(kernel, architecture, precision, width) if precision != "fp32" else None


def peer_units(kernel: str, architecture: int, width: int) -> Units:
    """Units of a peer. Inf-CL recomputes logits for each side of each direction, memeff once for both directions.

    For rows that are too wide for its row-owner kernels, memeff has a backward pass of three units with atomic sums.
    """
    if kernel in INF_CL:
        return Units(None, 5, 10, "all")
    return Units(None, None, 5 if _memeff_owns_rows(architecture, width) else 4, "all")


def _inf_cl_kernel(kernel: str, architecture: int, width: int) -> Launch:
    from inf_cl import flash

    names = ("_prob_fwd_kernel", "_dq_prob_bwd_kernel", "_dk_prob_bwd_kernel")
    function = getattr(flash, names[INF_CL.index(kernel)])
    head = min(width, 256)  # its launcher's default; rows are split into heads of this width, always in fp32
    constants = {"BLOCK_HEADDIM": head, "BLOCK_M": 64, "BLOCK_N": 64}
    heads = width // head
    if heads == 1:
        constants["nheads"] = 1  # an integer of 1 becomes a constant
    types = {
        argument: {"nheads": "i32?", "seqlen_q": "i32", "seqlen_k": "i32"}.get(argument, "*fp32")
        for argument in function.arg_names
        if argument not in constants
    }
    tiles = {"rows": 64, "columns": 64, "features": head}
    depth = width if kernel == INF_CL[0] else 2 * width
    compile_kernel = describe(function, types, constants, architecture, 8, 1)
    return Launch(f"inf-cl {version('inf-cl')}", kernel, compile_kernel, tiles, 8, 1, depth, heads)


def _memeff_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch:
    from memeff import _common, clip_loss, distributed_clip_loss

    features = _common.check_dims(width)
    constants = {"D_MODEL": width, "INPUT_PRECISION": "tf32"}
    with _capability(architecture):
        if kernel == "memeff: forward":
            function, products = distributed_clip_loss.clip_denom_kernel, 1
            rows, columns, warps, stages = 128, 128, 4, 3  # Triton's defaults
            constants["BLOCK_SIZE_D"] = features
        elif _common.fa_ok(width, None):
            function, products = clip_loss.clip_fa_grad_kernel, 2
            rows, columns, warps, stages = _common.fa_blocks(None, width)
            features = constants["D_POW2"] = 1 << (width - 1).bit_length()
            constants["BIDIR"] = True
        else:
            function, products = distributed_clip_loss.clip_grad_both_kernel, 3
            rows, columns, warps, stages = _common.backward_blocks(None)
            constants["BLOCK_SIZE_D"] = features
    constants |= {"BLOCK_SIZE_I": rows, "BLOCK_SIZE_J": columns}
    types = {
        argument: _memeff_type(argument, precision) for argument in function.arg_names if argument not in constants
    }
    tiles = {"rows": rows, "columns": columns, "features": features}
    steps = -(-width // features)
    depth = products * steps * features
    compile_kernel = describe(function, types, constants, architecture, warps, stages)
    return Launch(f"memeff {version('memeff')}", kernel, compile_kernel, tiles, warps, stages, depth, steps)


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
