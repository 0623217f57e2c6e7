"""The operation as Triton kernels: on CUDA tensors, or on the CPU's under TRITON_INTERPRET=1.

    forward   b_i = log sum_j exp(s_ij), and c_j alike with rows and columns exchanged
    backward  W_ij = where(keep_ij, gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j), 0)
              dq_i = scale_i sum_j W_ij k_j,  dk_j = sum_i scale_i W_ij q_i,  dscale_i = sum_j W_ij <q_i, k_j>

Each program owns a tile of sorted rows and writes each of them once: no atomics, and sums in one order. Rows meet the
columns from the first of their first cluster to the last of their last, which is read on the device: the grid depends
on N alone, and nothing waits for the GPU.

Cost in products over the kept pairs, rounded up to tiles: forward 1 (2 where bidirectional); backward 2 (self), 4
(otherwise), and one more a side for each part of the features but the first where a program cannot hold them all.
Memory beyond inputs and outputs: the plan and a few vectors [N] and [M].
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcl_kernels.logsumexp import gpu_common
from mcl_kernels.logsumexp.gpu_common import Rows, Side, Terms

PLAN_ROWS = 256  # of a program that looks for dropped columns


class Tiles(NamedTuple):
    """The sizes of a kernel's tile and how it is run."""

    rows: int
    columns: int
    features: int  # of both sides that are multiplied at a time
    warps: int
    stages: int
    gradients: int = 0  # features whose gradient a program of the backward pass holds
    chunk: int = 0  # of them that one product sums


# By kernel, precision and architecture (oldest first): the tiles for rows of at most so many numbers. Each is the
# fastest-looking of those tried that compile without a spill on that architecture (`python -m benchmarks.gpu_static`):
# - forward: 128 rows read each key once per 128 queries. Wide rows pass in parts of 64 features, three in flight.
# - backward: as many features of the gradient as a program can hold, since each part computes the logits again: 64 x
#   512 sums are half of the registers, and all of sm_100's tensor memory. One product sums a chunk of them, so that its
#   operands fit beside; then come as many columns as still do.
# - fp32 rows are twice as large, and tf32x3 splits each operand in two and adds sums of its own: on sm_90 and sm_100
#   those fit beside 64 x 256. It takes features 16 at a time in both kernels, so that their logits are the same.
_WIDEST = 1 << 62
_BACKWARD_HALF = ((128, Tiles(128, 64, 128, 8, 2, 128, 64)), (256, Tiles(64, 64, 64, 8, 2, 256, 256)))
TABLE: dict[tuple[str, str, int], tuple[tuple[int, Tiles], ...]] = {
    ("forward", "half", 80): ((128, Tiles(128, 128, 128, 8, 2)), (_WIDEST, Tiles(128, 128, 64, 8, 3))),
    ("forward", "tf32", 80): ((_WIDEST, Tiles(128, 64, 32, 8, 2)),),
    ("forward", "tf32x3", 80): ((_WIDEST, Tiles(128, 64, 16, 8, 2)),),
    ("backward", "half", 80): (
        (128, Tiles(128, 32, 128, 8, 2, 128, 64)),
        (256, Tiles(64, 64, 64, 8, 2, 256, 256)),
        (_WIDEST, Tiles(64, 32, 64, 8, 2, 512, 128)),
    ),
    ("backward", "half", 90): (*_BACKWARD_HALF, (_WIDEST, Tiles(64, 32, 64, 8, 2, 512, 256))),
    ("backward", "half", 100): (*_BACKWARD_HALF, (_WIDEST, Tiles(64, 32, 64, 8, 2, 512, 512))),
    ("backward", "tf32", 80): ((256, Tiles(64, 32, 32, 8, 2, 256, 256)), (_WIDEST, Tiles(64, 16, 16, 8, 2, 512, 128))),
    ("backward", "tf32", 90): ((256, Tiles(64, 32, 32, 8, 2, 256, 128)), (_WIDEST, Tiles(64, 32, 32, 8, 2, 512, 64))),
    ("backward", "tf32", 100): (
        (256, Tiles(64, 32, 32, 8, 2, 256, 256)),
        (_WIDEST, Tiles(64, 16, 16, 8, 1, 512, 512)),
    ),
    ("backward", "tf32x3", 80): ((256, Tiles(64, 16, 16, 8, 2, 256, 128)), (_WIDEST, Tiles(64, 8, 16, 8, 2, 512, 128))),
    ("backward", "tf32x3", 90): ((_WIDEST, Tiles(64, 16, 16, 8, 1, 256, 32)),),
    ("backward", "tf32x3", 100): ((_WIDEST, Tiles(64, 16, 16, 8, 2, 256, 256)),),
}
INTERPRETED = Tiles(128, 256, 1024, 4, 1, 1024, 512)  # few and large: its cost is that of calls


def choose_tiles(kernel: str, precision: str, width: int, capability: tuple[int, int] | None) -> Tiles:
    """Of `kernel` ("forward" or "backward") for rows of `width` numbers.

    Precision is "half", "tf32" or "tf32x3"; capability None is the interpreter's.
    """
    tiles = INTERPRETED
    if capability is not None:
        # Beyond 10 come chips with the tensor cores and the shared memory of the first.
        architecture = 10 * capability[0] if capability[0] <= 10 else 80
        newest = max(each for name, of, each in TABLE if (name, of) == (kernel, precision) and each <= architecture)
        by_width = TABLE[kernel, precision, newest]
        if precision == "tf32x3" and _before_triton_3_9():
            by_width = ((_WIDEST, by_width[0][1]),)
        tiles = next(tiles for most, tiles in by_width if width <= most)
    whole = max(16, 1 << (width - 1).bit_length())
    gradients, chunk = min(tiles.gradients, whole), min(tiles.chunk, whole)
    return tiles._replace(features=min(tiles.features, whole), gradients=gradients, chunk=chunk)


def _before_triton_3_9() -> bool:
    """Then products of 8 columns may not compile: wide rows of tf32x3 take the tiles of narrow ones."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def tile_constants(kernel: str, precision: str, dtype: torch.dtype, width: int, tiles: Tiles) -> dict[str, Any]:
    """What a kernel is compiled for, beside its options: types, and the sizes of its tiles."""
    import triton.language as tl

    wide = tl.float64 if precision == "ieee" else tl.float32
    half = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    constants = {
        "DTYPE": half[dtype] if precision == "half" else wide,
        "SUM": wide,
        "PRECISION": "tf32" if precision == "half" else precision,
        "ROWS": tiles.rows, "COLUMNS": tiles.columns, "FEATURES": tiles.features, "ONE_PART": width <= tiles.features,
    }  # fmt: skip
    if kernel == "backward":
        # A constant too: what is computed of it would be in registers all the time.
        parts = -(-width // tiles.gradients)
        constants |= {"GRADIENTS": tiles.gradients, "CHUNK": tiles.chunk, "PARTS": parts}
    return constants


def _common_arguments(
    kernel: str, owned: Rows, columns: Side, scale: Tensor, negatives: str, least_precision: str = "tf32"
) -> dict[str, Any]:
    """What every kernel of one side's rows against the other's needs to know."""
    rows = owned.side
    width = rows.x.shape[1]
    precision = product_precision(rows.x, columns.x, scale)
    precision = least_precision if precision == "tf32" else precision
    capability = torch.cuda.get_device_capability(rows.x.device) if rows.x.is_cuda else None
    # fp64 is for checks: it takes the tiles of what is nearest in size.
    tiles = choose_tiles(kernel, "tf32x3" if precision == "ieee" else precision, width, capability)
    values, column_values = gpu_common.dropped_values(rows, columns, negatives)
    dropped = None if values is None else _dropped(owned, columns, values, column_values)
    compares_ids = gpu_common.compares_ids(rows, negatives)
    unused = rows.order
    return {
        "x": rows.x, "x_stride": rows.x.stride(0), "x_step": rows.x.stride(1), "row_order": rows.order,
        "row_begin": owned.begin, "row_end": owned.end,
        "drop_begin": unused if dropped is None else dropped[0], "drop_end": unused if dropped is None else dropped[1],
        "row_ids": rows.ids if compares_ids else unused,
        "y": columns.x, "y_stride": columns.x.stride(0), "y_step": columns.x.stride(1), "column_order": columns.order,
        "column_ids": columns.ids if compares_ids else unused,
        "scale": scale, "scale_stride": scale.ndim, "n": len(rows.order), "width": width,
        "HAS_DROPPED": dropped is not None, "COMPARES_IDS": compares_ids, "SKIPS_TILES": negatives == "different",
        **tile_constants(kernel, precision, rows.x.dtype, width, tiles),
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def product_precision(x: Tensor, y: Tensor, scale: Tensor) -> str:
    """How rows are multiplied: "half" as they are, fp32 and mixed ones as torch says, fp64 (for checks) exactly."""
    if scale.dtype == torch.float64:
        return "ieee"
    if x.dtype == y.dtype and x.dtype.itemsize == 2:
        return "half"
    try:
        highest = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch does not answer once its newer switch was used
        highest = torch.backends.cuda.matmul.fp32_precision != "tf32"  # type: ignore[attr-defined]
    return "tf32x3" if highest else "tf32"


def _dropped(rows: Rows, columns: Side, values: Tensor, column_values: Tensor | None) -> tuple[Tensor, Tensor]:
    from mcl_kernels.logsumexp.triton.tiles import drop_kernel

    order = rows.side.order
    n = len(order)
    begin, end = torch.empty(2, n, dtype=torch.int32, device=order.device).unbind()
    if n:
        with on_device_of(begin):
            drop_kernel[(-(-n // PLAN_ROWS),)](
                order, rows.begin, rows.end, values, columns.order, column_values, begin, end, n,
                len(columns.order).bit_length(), ROWS=PLAN_ROWS,
            )  # fmt: skip
    return begin, end


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """A launch goes to the current device, whatever the tensors' own is; nothing on a CPU."""
    device: AbstractContextManager[object] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    return device


def _run_forward(
    rows: Rows, columns: Side, scale: Tensor, negatives: str, result: Tensor, threshold: Tensor | None
) -> None:
    from mcl_kernels.logsumexp.triton.forward import forward_kernel

    if len(result) == 0:
        return
    counts = threshold is not None
    # What is counted is compared with products that torch computed in fp32.
    arguments = _common_arguments("forward", rows, columns, scale, negatives, "tf32x3" if counts else "tf32")
    with on_device_of(result):
        forward_kernel[(-(-len(result) // arguments["ROWS"]),)](
            **arguments, result=result, threshold=threshold if counts else scale, COUNT=counts
        )


def _run_backward(
    rows: Rows,
    columns: Side,
    scale: Tensor,
    negatives: str,
    terms: Terms,
    grad_x: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    from mcl_kernels.logsumexp.triton.backward import backward_kernel

    n = len(rows.side.x)
    if n == 0:
        return
    arguments = _common_arguments("backward", rows, columns, scale, negatives)
    if grad_x is None:
        arguments["PARTS"] = 1
    unused = scale, scale
    row_lse, row_weight = terms.row or unused
    column_lse, column_weight = terms.column or unused
    with on_device_of(rows.side.x):
        backward_kernel[(-(-n // arguments["ROWS"]) * arguments["PARTS"],)](
            **arguments, row_lse=row_lse, row_weight=row_weight, column_lse=column_lse, column_weight=column_weight,
            column_scale=scale if terms.column_scale is None else terms.column_scale, unit=terms.fp16_scale,
            grad_x=rows.side.x if grad_x is None else grad_x, grad_scale=scale if grad_scale is None else grad_scale,
            ROW_TERM=terms.row is not None, COLUMN_TERM=terms.column is not None,
            SCALES_COLUMNS=terms.column_scale is not None, NEEDS_X=grad_x is not None,
            NEEDS_SCALE=grad_scale is not None,
        )  # fmt: skip


forward = partial(gpu_common.forward, _run_forward)
backward = partial(gpu_common.backward, _run_backward)
count_above = partial(gpu_common.count_above, _run_forward)
