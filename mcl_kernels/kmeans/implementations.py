"""The implementations of a pass over the data, and the choice of one."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from mcl_kernels.backends import cuda, native
from mcl_kernels.backends.triton import unavailable_reason
from mcl_kernels.kmeans import faiss
from mcl_kernels.logsumexp.api import for_cuda

# Each module has `assign` and `assign_and_sum`, and may have `follow` (see centers.py); it is imported on first use.
IMPLEMENTATIONS = {
    "native": "mcl_kernels.kmeans.native",
    "triton": "mcl_kernels.kmeans.triton.launch",
    "cuda": "mcl_kernels.kmeans.cuda",
    "reference": "mcl_kernels.kmeans.reference",
    "faiss": "mcl_kernels.kmeans.faiss",
}
IMPLS = ("auto", *IMPLEMENTATIONS)


def implementation(impl: str, device: torch.device) -> ModuleType:
    """Returns the module that `impl` names; raises if it does not run on the device."""
    return import_module(IMPLEMENTATIONS[_resolve(impl, device)])


def _resolve(impl: str, device: torch.device) -> str:
    """Returns the name of the implementation to use; only "auto" is replaced by another name."""
    if impl == "auto":
        if device.type == "cpu":
            return "native" if native.usable() else "reference"
        return for_cuda(device, "reference") if device.type == "cuda" else "reference"
    if impl == "native" and device.type != "cpu":
        raise ValueError(f"impl='native' computes on CPU tensors: got device {device}")
    if impl == "triton" and (reason := unavailable_reason(device)):
        raise RuntimeError(f"impl='triton': {reason} (or use impl='auto')")
    if impl == "cuda" and (reason := cuda.why_not(device)):
        raise RuntimeError(f"impl='cuda': {reason} (or use impl='auto')")
    if impl == "faiss" and (reason := faiss.unavailable_reason()):
        raise RuntimeError(f"impl='faiss': {reason}")
    return impl
