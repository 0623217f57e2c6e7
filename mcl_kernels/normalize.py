"""Arithmetic on rows of embeddings: normalisation, with its derivatives, and products of rows.

Normalisation has three implementations, PyTorch operations, `csrc/cpu/normalize.h` and `losses/triton/unit_rows.py`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from mcl_kernels._traced import is_traced


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Data type of logits, sums and losses: fp64 where an input is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def normalize_rows(x: Tensor, impl: str = "reference") -> Tensor:
    """x_i / |x_i| in fp32 (fp64 for fp64), rounded once to the dtype of x.

    A row without a direction (a norm of at most 1e-12, or below the normal numbers of its dtype) becomes 0, and so
    does its gradient: divided by a norm that small it would be infinite in half precision.
    """
    return unit_views(x, None, impl)[0]


def shrunk_rows(x: Tensor) -> Tensor:
    """Rows that another library can normalise: each row whose norm would overflow is divided by a power of two."""
    return (x * _shrinking(x.to(compute_dtype(x)))).to(x.dtype)


def unit_views(view_a: Tensor, view_b: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    """Both views normalised as by `normalize_rows`, one after the other, [2N, D], and their cosines, [N].

    Without view_b the rows of view_a alone, [N, D], and no cosines, [0].
    """
    # A compiler fuses the plain composition by itself, and does not take the forward mode of a Function.
    if torch.compiler.is_compiling():
        return _composed(view_a, view_b)
    views = (view_a,) if view_b is None else (view_a, view_b)
    if impl == "triton" and views[-1].dtype == view_a.dtype and forward_ad._current_level < 0 and not is_traced(*views):
        rows, cosine = _triton_kernels().unit_rows(view_a, view_b)
        return rows, cosine
    native = impl == "native" and all(
        type(view) in (Tensor, Parameter) and view.dtype == view_a.dtype == compute_dtype(view) for view in views
    )
    rows, cosine = _Normalize.apply(view_a, view_b, native)  # type: ignore[no-untyped-call]
    return rows, cosine


def joined_views(view_a: Tensor, view_b: Tensor) -> tuple[Tensor, Tensor]:
    """One view after the other, [2N, D], and <a_i, b_i>, [N]."""
    rows = torch.cat((view_a, view_b))
    # Parts of `rows` from here on, so that a graph holds one copy of them.
    part_a, part_b = rows.view(2, *view_a.shape)
    return rows, row_dot(part_a, part_b, compute_dtype(rows))


class _Normalize(torch.autograd.Function):
    """Normalisation with a derivative in one pass; PyTorch's own reads and writes the rows once for each step."""

    generate_vmap_rule = True

    @staticmethod
    def forward(view_a: Tensor, view_b: Tensor | None, native: bool) -> tuple[Tensor, Tensor]:
        if native:
            rows, cosine = torch.ops.mcl_kernels_native.unit_rows(view_a, view_b)
            return rows, cosine
        return _composed(view_a, view_b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        view_a, view_b, ctx.native = inputs
        rows = None if view_b is None else output[0]
        ctx.save_for_backward(view_a, view_b, rows)
        ctx.save_for_forward(view_a, view_b, rows)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_cosine: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        view_a, view_b, rows = ctx.saved_tensors
        if ctx.native and not torch.is_grad_enabled():
            gradients = torch.ops.mcl_kernels_native.unit_rows_backward(view_a, view_b, grad_rows, grad_cosine)
            return gradients[0], None if view_b is None else gradients[1], None
        return *composed_gradients(view_a, view_b, rows, grad_rows, grad_cosine), None

    @staticmethod
    def jvp(ctx: Any, tangent_a: Tensor, tangent_b: Tensor, native: None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        view_a, view_b, rows = ctx.saved_tensors
        moved_a = _projected(view_a, tangent_a)
        if view_b is None:
            return moved_a, moved_a.new_empty(0)
        unit_a, unit_b = rows.view(2, *view_a.shape)
        moved_b = _projected(view_b, tangent_b)
        dtype = compute_dtype(rows)
        return torch.cat((moved_a, moved_b)), row_dot(moved_a, unit_b, dtype) + row_dot(unit_a, moved_b, dtype)


@cache
def _triton_kernels() -> ModuleType:
    return import_module("mcl_kernels.losses.triton.unit_rows")


def _composed(view_a: Tensor, view_b: Tensor | None) -> tuple[Tensor, Tensor]:
    unit_a = _unit(view_a)
    if view_b is None:
        return unit_a, unit_a.new_empty(0)
    return joined_views(unit_a, _unit(view_b))


def composed_gradients(
    view_a: Tensor, view_b: Tensor | None, rows: Tensor, grad_rows: Tensor, grad_cosine: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the views by PyTorch operations, which are differentiable; `rows` are the unit rows of both."""
    if view_b is None:
        return _projected(view_a, grad_rows), None
    unit_a, unit_b = rows.view(2, *view_a.shape).to(grad_cosine.dtype)
    grad_a, grad_b = grad_rows.view(2, *view_a.shape).to(grad_cosine.dtype)
    along = grad_cosine.unsqueeze(1)
    grad_a, grad_b = torch.addcmul(grad_a, unit_b, along), torch.addcmul(grad_b, unit_a, along)
    return _projected(view_a, grad_a), _projected(view_b, grad_b)


def _unit(x: Tensor) -> Tensor:
    scaled, inverse, _ = _scaled(x)
    return (scaled * inverse).to(x.dtype)


def _scaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows c_i x_i, 1 / |c_i x_i|, [N, 1], and the powers of two c_i of `_shrinking`, [N, 1].

    1 / |x_i| may be below the normal numbers, so it stays in two factors. A row without a direction has 0 in place of
    1 / |c_i x_i|.
    """
    wide = x.to(compute_dtype(x))
    scale = _shrinking(wide)
    scaled = wide * scale
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    vanishing = max(1e-12, torch.finfo(x.dtype).tiny)
    return scaled, torch.threshold(norm, vanishing, torch.inf).reciprocal(), scale


def _shrinking(wide: Tensor) -> Tensor:
    """Power of two for each row, [N, 1], by which the norm of the row becomes finite: 1 if it is."""
    divisor = 2.0**80 if wide.dtype == torch.float32 else 2.0**540
    # Without a graph: the direction of a row does not depend on it.
    norm = torch.linalg.vector_norm(wide.detach(), dim=1, keepdim=True)
    return torch.threshold(norm.clamp(max=divisor), divisor / 2, 1.0).reciprocal()


def _projected(x: Tensor, direction: Tensor) -> Tensor:
    """The derivative of x / |x| along a direction, and by symmetry its transpose: (g - y <y, g>) / |x|, y = x / |x|."""
    scaled, inverse, scale = _scaled(x)
    g = direction.to(inverse.dtype)
    along = row_dot(scaled, g, inverse.dtype).unsqueeze(1) * inverse * inverse
    return (torch.addcmul(g, scaled, along, value=-1) * inverse * scale).to(x.dtype)


def row_dot(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """<x_i, y_i>, [N], in `dtype`."""
    return (x.to(dtype) * y.to(dtype)).sum(1)
