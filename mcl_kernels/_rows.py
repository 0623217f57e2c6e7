"""Small pieces of arithmetic on rows of embeddings, with the precision the library promises."""

from __future__ import annotations

from typing import Any

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
    # A compiler fuses the plain composition by itself, and does not take the forward mode of a Function.
    if torch.compiler.is_compiling():
        return _scaled(x, _inverse_norm(x))
    normalized: Tensor = _Normalize.apply(x)  # type: ignore[no-untyped-call]
    return normalized


class _Normalize(torch.autograd.Function):
    """PyTorch's own derivative of a division by the norm passes over the rows twice as often."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _scaled(x, _inverse_norm(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _projected(x, grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _projected(x, tangent)


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x_i|, [N, 1]; 0 for a row without a direction."""
    norm = torch.linalg.vector_norm(x.to(compute_dtype(x)), dim=1, keepdim=True)
    vanishing = norm <= max(1e-12, torch.finfo(x.dtype).tiny)
    return torch.where(vanishing, torch.inf, norm).reciprocal()


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    return (x.to(factor.dtype) * factor).to(x.dtype)


def _projected(x: Tensor, direction: Tensor) -> Tensor:
    """The derivative of x / |x| along a direction, and by symmetry its transpose: (g - y <y, g>) / |x|, y = x / |x|."""
    inverse = _inverse_norm(x)
    wide, g = x.to(inverse.dtype), direction.to(inverse.dtype)
    along = row_dot(wide, g, inverse.dtype).unsqueeze(1)
    return (torch.addcmul(g, wide, -along * inverse.square()) * inverse).to(x.dtype)


def row_dot(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """<x_i, y_i>, [N], in `dtype`."""
    return (x.to(dtype) * y.to(dtype)).sum(1)
