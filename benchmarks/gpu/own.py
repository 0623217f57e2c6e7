"""The losses' Triton kernels, as their launchers launch them: recorded without a GPU, for `static` to compile.

The cost of a loss, forward and backward, is given in units: one unit is a product of D elements for every pair that the
kernels visit.
"""

from __future__ import annotations

import torch

from benchmarks.gpu import stand_in
from benchmarks.gpu.kernels import DTYPES, LIBRARY, Launch, Units
from mcl_kernels.logsumexp.inputs import Inputs, LseGradients, Wanted
from mcl_kernels.logsumexp.pairs import Pairs

N = 4096  # rows of each side
# The first of each is its most frequent call: the self form, a fixed temperature, negatives of the same cluster.
UNALIGNED = ("forward, unaligned", "backward, unaligned")  # slices of wider rows, at no multiple of 16 bytes
SCALE_TOO, KEYS = "backward, scale too", "backward, keys, scale of each query"
FORWARD = ("forward", "forward, different", UNALIGNED[0])
BACKWARD = ("backward", "backward, different", SCALE_TOO, KEYS, UNALIGNED[1])
OWN = (*FORWARD, *BACKWARD)


def own_kernel(kernel: str, architecture: int, precision: str, width: int) -> Launch | None:
    """Returns None for unaligned rows in another precision than bf16."""
    if kernel in UNALIGNED and precision != "bf16":
        return None
    recorded = _record(kernel, architecture, precision, width)
    given = recorded.arguments
    tiles = {
        name: given[name.upper()]
        for name in ("rows", "columns", "features", "gradients", "chunk")
        if name.upper() in given
    }
    sums = min(tiles.get("gradients", 0), width)
    return Launch(
        LIBRARY, kernel, recorded.compile, tiles, recorded.options.num_warps, recorded.options.num_stages,
        _products(recorded) * (width + sums), -(-width // tiles["features"]),
    )  # fmt: skip


def _products(recorded: stand_in.Launch) -> int:
    """Products of tensor cores for one of rows: three of tf32, or the six largest of numbers that are sums of three."""
    if recorded.arguments.get("SPLITS", 1) > 1:
        return 6
    return 3 if recorded.arguments["PRECISION"] == "tf32x3" else 1


def own_units(launch: Launch, width: int) -> Units:
    """Units of the losses by a backward kernel's launch; none by that of a forward kernel.

    Of each side: one forward; backward one for the sum, and one for the logits of each part, the features whose
    gradients a program accumulates.
    """
    if "gradients" not in launch.tiles:
        return Units(None, None, None, "kept")
    side = 1 - (-width // launch.tiles["gradients"])
    return Units(1 + side, 1 + 2 * side, 2 + 2 * side, "kept")


def _record(kernel: str, architecture: int, precision: str, width: int) -> stand_in.Launch:
    from mcl_kernels.logsumexp.triton import launch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with stand_in.capture(architecture) as launches:
            inputs = _inputs(kernel, DTYPES[precision], width)
            saved = launch.forward(inputs)
            if kernel in BACKWARD:
                grads = LseGradients(inputs.scale.new_ones(N), inputs.scale.new_ones(len(saved.column_lse)))
                wanted = Wanted(query=kernel != KEYS, key=kernel == KEYS, scale=kernel == SCALE_TOO)
                launch.backward(inputs, saved, grads, wanted)
    finally:
        torch.set_float32_matmul_precision(before)
    name = "backward_kernel" if kernel in BACKWARD else "forward_kernel"
    return next(each for each in launches if each.name == name)


def _inputs(kernel: str, dtype: torch.dtype, width: int) -> Inputs:
    query, key = (torch.zeros(N, width, dtype=dtype) for _ in range(2))
    if kernel in UNALIGNED:
        query = torch.zeros(N, width + 1, dtype=dtype)[:, 1:]
    labels, ids = torch.zeros(N, dtype=torch.int64), torch.arange(N)
    negatives = "different" if kernel.endswith("different") else "same"
    if kernel == KEYS:
        return Inputs(query, key, torch.ones(N), Pairs(labels, labels, ids, ids, negatives))
    return Inputs.of_self(query, torch.ones(()), Pairs(labels, None, ids, None, negatives))
