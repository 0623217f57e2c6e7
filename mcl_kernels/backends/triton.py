"""Where Triton kernels run. Imports triton on first use."""

from __future__ import annotations

import torch

from mcl_kernels.backends import cuda

MIN_MAJOR = 8  # compute capability that Triton itself supports


def unavailable_reason(device: torch.device) -> str | None:
    """Returns why Triton kernels do not compute on a device, or None."""
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
    if major < MIN_MAJOR:
        return f"needs compute capability {MIN_MAJOR}.0 or later: got {major}.{minor}"
    return None


def describe() -> tuple[list[str], str]:
    """Returns the types of device here that the kernels compute on, and their description or the reason."""
    types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    reasons = {name: unavailable_reason(torch.device(name)) for name in types}
    available = [name for name, reason in reasons.items() if reason is None]
    reason = "Triton kernels for GPUs" if available else cuda.no_device() or reasons[types[-1]]
    return available, str(reason)
