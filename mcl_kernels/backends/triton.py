"""Policy of the Triton kernels of every operation: availability, precision of products, launch device, tile edges.

Triton itself is imported by the functions that need it, so that this module can be imported without it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mcl_kernels.backends import cuda

MIN_MAJOR_CAPABILITY = 8  # the oldest architecture that Triton supports
MIN_EDGE = 16  # of the tiles that `tl.dot` multiplies
NOTHING = nullcontext()


def unavailable_reason(device: torch.device) -> str | None:
    """Returns why Triton kernels cannot run on a device, None if they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    if not hasattr(triton, "knobs"):
        return f"needs triton 3.4 or later: got {triton.__version__}"
    if device.type == "cpu":
        if triton.knobs.runtime.interpret:
            return None
        return "computes on CUDA tensors: got device cpu (TRITON_INTERPRET=1 interprets it, for tests)"
    if device.type != "cuda":
        return f"computes on CUDA tensors: got device {device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip:
        return "is for NVIDIA's GPUs: torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if major < MIN_MAJOR_CAPABILITY:
        return f"needs compute capability {MIN_MAJOR_CAPABILITY}.0 or later: got {major}.{minor}"
    return None


def describe() -> tuple[list[str], str]:
    """Returns the types of device of this machine that the kernels compute on; their description, or why none."""
    types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    reasons = {name: unavailable_reason(torch.device(name)) for name in types}
    available = [name for name, reason in reasons.items() if reason is None]
    reason = "Triton kernels for GPUs" if available else cuda.no_device() or reasons[types[-1]]
    return available, str(reason)


def product_precision(x: Tensor, y: Tensor, accumulated: Tensor) -> str:
    """Returns the precision in which rows of x and y are multiplied, for sums in the dtype of `accumulated`.

    "half" for two operands of one 16-bit dtype, "ieee" for sums in fp64 (used by checks), else "tf32x3" (as exact as
    fp32) or "tf32" by torch's setting for fp32 products.
    """
    if accumulated.dtype == torch.float64:
        return "ieee"
    if x.dtype == y.dtype and x.dtype.itemsize == 2:
        return "half"
    try:
        highest = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch raises it once its newer setting was used
        highest = torch.backends.cuda.matmul.fp32_precision != "tf32"  # type: ignore[attr-defined]
    return "tf32x3" if highest else "tf32"


def product_constants(precision: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the constants of kernels that multiply rows of `dtype`: operand and accumulator types, precision."""
    import triton.language as tl

    accumulator = tl.float64 if precision == "ieee" else tl.float32
    if precision == "half":
        operand = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
        return {"OPERAND": operand, "ACCUMULATOR": accumulator, "PRECISION": "tf32"}
    return {"OPERAND": accumulator, "ACCUMULATOR": accumulator, "PRECISION": precision}


def triton_version() -> tuple[int, ...]:
    """Returns major and minor version of the installed Triton."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Returns the compute capability of a GPU, None for a CPU, on which kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@cache
def multiprocessors(device: torch.device) -> int | None:
    """Returns the number of multiprocessors of a GPU, None for a CPU."""
    if device.type != "cuda":
        return None
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def padded_edge(size: int) -> int:
    """Returns the edge of the smallest tile that holds `size` elements: a power of 2, as Triton's tiles are."""
    return max(MIN_EDGE, 1 << (size - 1).bit_length())


def current_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of x current: kernels launch there. Does nothing on a CPU, nor where there is one GPU."""
    if not x.is_cuda or torch.cuda.device_count() == 1:
        return NOTHING
    return torch.cuda.device(x.device)
