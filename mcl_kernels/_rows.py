"""Small pieces of arithmetic on rows of embeddings, with the precision the library promises."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Of logits, sums and losses: fp64 where an input is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def normalize_rows(x: Tensor) -> Tensor:
    """x_i / |x_i| in fp32 (fp64 for fp64), rounded once to the dtype of x.

    A row without a direction (a norm of at most 1e-12, or below the normal numbers of its dtype) becomes 0, and so
    does its gradient: divided by a norm that small it would be infinite in half precision.
    """
    wide = x.to(compute_dtype(x))
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    vanishing = norm <= max(1e-12, torch.finfo(x.dtype).tiny)
    return (wide / torch.where(vanishing, torch.inf, norm)).to(x.dtype)


def row_dot(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """<x_i, y_i>, [N], in `dtype`."""
    return (x.to(dtype) * y.to(dtype)).sum(1)
