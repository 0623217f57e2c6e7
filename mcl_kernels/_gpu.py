"""What "auto" takes on a GPU."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from mcl_kernels import _cuda
from mcl_kernels.logsumexp import triton


@cache
def pick(device: torch.device, otherwise: str) -> str:
    """The first implementation for GPUs that runs on this one; if none does, warns once, in one line, why not."""
    reasons = {}
    for name, why_not in (("triton", triton.why_not), ("cuda", _cuda.why_not)):
        reason = why_not(device, otherwise)
        if reason is None:
            return name
        reasons[name] = reason
    told = "; ".join(f"impl={name!r}: {reason}" for name, reason in reasons.items())
    warnings.warn(f"mcl_kernels: impl={otherwise!r} computes, several times slower: {told}", RuntimeWarning, 3)
    return otherwise
