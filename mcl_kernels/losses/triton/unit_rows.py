"""Normalisation of rows and its derivative as Triton kernels: one launch each for both views and their cosines.

The formulas are those of `normalize.py`; 1 / |x| is two factors here too, a power of two and 1 / |scale x|.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import current_device, padded_edge
from mcl_kernels.backends.triton_device import load_features, rounded
from mcl_kernels.backends.triton_launch import launch
from mcl_kernels.normalize import composed_gradients, compute_dtype

TILE = 1024  # elements of a program
MAX_FEATURES = 1024  # read at a time
WIDE_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class View(NamedTuple):
    """Rows of any strides."""

    x: Any  # [N, D]
    stride: Any  # from row to row
    step: Any  # from feature to feature


@triton.jit
def inverse_norms(view, row, valid, width, VANISHING: tl.constexpr, FEATURES: tl.constexpr, WIDE: tl.constexpr):
    """Returns `scale`, 1 unless |x|^2 overflows or nearly does, and 1 / |scale x|: 0 for a row without a direction."""
    largest: tl.constexpr = 2.0**120 if tl.float32 == WIDE else 2.0**1016
    shrinking: tl.constexpr = 2.0**-80 if tl.float32 == WIDE else 2.0**-540
    squares = tl.zeros(row.shape, WIDE)
    shrunk_squares = tl.zeros(row.shape, WIDE)
    for first in range(0, width, FEATURES):
        x = load_features(view.x, row * view.stride, valid, view.step, width, first, FEATURES, WIDE)
        squares += tl.sum(x * x, 1)
        shrunk_squares += tl.sum((x * shrinking) * (x * shrinking), 1)
    is_small = squares <= largest
    scale = tl.where(is_small, 1.0, shrinking).to(WIDE)
    squares = tl.where(is_small, squares, shrunk_squares)
    # A row that holds infinity is not finite anywhere.
    squares = tl.where(squares == float("inf"), float("nan"), squares)
    if tl.float32 == WIDE:
        norm = tl.sqrt_rn(squares)
        inverse = tl.div_rn(tl.full(row.shape, 1.0, WIDE), norm)
    else:
        norm = tl.sqrt(squares)
        inverse = 1.0 / norm
    return scale, tl.where(norm <= VANISHING, 0.0, inverse)


@triton.jit(do_not_specialize=["n"])
def unit_rows_kernel(
    view_a,  # View of N rows
    view_b,  # View of N rows, or None
    rows,  # [N, D], with view_b [2N, D]: view_a first
    cosine,  # [N]
    n, width,
    VANISHING: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """rows = x / |x| of ROWS rows of each view, rounded once, and the products of the rounded rows of both."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < n
    scale_a, inverse_a = inverse_norms(view_a, row, valid, width, VANISHING, FEATURES, WIDE)
    scale_b, inverse_b = scale_a, inverse_a
    if view_b is not None:
        scale_b, inverse_b = inverse_norms(view_b, row, valid, width, VANISHING, FEATURES, WIDE)
    products = tl.zeros((ROWS,), WIDE)
    for first in range(0, width, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        at = rows + row[:, None] * width + feature[None, :]
        written = valid[:, None] & (feature < width)[None, :]
        x = load_features(view_a.x, row * view_a.stride, valid, view_a.step, width, first, FEATURES, WIDE)
        unit_a = rounded(x * scale_a[:, None] * inverse_a[:, None], rows.dtype.element_ty)
        tl.store(at, unit_a, mask=written)
        if view_b is not None:
            x = load_features(view_b.x, row * view_b.stride, valid, view_b.step, width, first, FEATURES, WIDE)
            unit_b = rounded(x * scale_b[:, None] * inverse_b[:, None], rows.dtype.element_ty)
            tl.store(at + n.to(tl.int64) * width, unit_b, mask=written)
            products += tl.sum(unit_a.to(WIDE) * unit_b.to(WIDE), 1)
    if view_b is not None:
        tl.store(cosine + row, products, mask=valid)


@triton.jit
def load_direction(grad_rows, partners, weight, row, valid, width, first, FEATURES: tl.constexpr, WIDE: tl.constexpr):
    """Returns the incoming gradient of unit rows, with that of their cosines: g + w p, p the unit rows of the other."""
    direction = load_features(grad_rows, row * width, valid, 1, width, first, FEATURES, WIDE)
    if partners is not None:
        direction += weight[:, None] * load_features(partners, row * width, valid, 1, width, first, FEATURES, WIDE)
    return direction


@triton.jit
def project_rows(
    view, grad_rows, partners, weight, grad_x, row, valid, width,
    VANISHING: tl.constexpr, FEATURES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Stores (h - y <y, h>) / |x| with y = x / |x| and h = g + w p."""
    scale, inverse = inverse_norms(view, row, valid, width, VANISHING, FEATURES, WIDE)
    along = tl.zeros(row.shape, WIDE)
    for first in range(0, width, FEATURES):
        x = load_features(view.x, row * view.stride, valid, view.step, width, first, FEATURES, WIDE) * scale[:, None]
        along += tl.sum(x * load_direction(grad_rows, partners, weight, row, valid, width, first, FEATURES, WIDE), 1)
    along = along * inverse * inverse
    for first in range(0, width, FEATURES):
        x = load_features(view.x, row * view.stride, valid, view.step, width, first, FEATURES, WIDE) * scale[:, None]
        direction = load_direction(grad_rows, partners, weight, row, valid, width, first, FEATURES, WIDE)
        gradient = (direction - along[:, None] * x) * inverse[:, None] * scale[:, None]
        feature = first + tl.arange(0, FEATURES)
        at = grad_x + row[:, None] * width + feature[None, :]
        written = valid[:, None] & (feature < width)[None, :]
        tl.store(at, rounded(gradient, grad_x.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["n"])
def unit_rows_backward_kernel(
    view_a,  # View of N rows
    view_b,  # View of N rows, or None
    rows,  # [N, D] or [2N, D], the unit rows
    grad_rows,  # [N, D] or [2N, D]
    grad_cosine,  # [N], if there are two views
    grad_a,  # [N, D]
    grad_b,  # [N, D] or None
    n, width,
    VANISHING: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS rows of each view."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < n
    if view_b is None:
        project_rows(view_a, grad_rows, None, row, grad_a, row, valid, width, VANISHING, FEATURES, WIDE)
    else:
        weight = tl.load(grad_cosine + row, mask=valid, other=0.0).to(WIDE)
        second = n.to(tl.int64) * width
        project_rows(view_a, grad_rows, rows + second, weight, grad_a, row, valid, width, VANISHING, FEATURES, WIDE)
        project_rows(view_b, grad_rows + second, rows, weight, grad_b, row, valid, width, VANISHING, FEATURES, WIDE)


def unit_rows(view_a: Tensor, view_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unit rows of both views, [2N, D], and their cosines, [N]; without view_b [N, D] and [0]."""
    rows, cosine = _UnitRows.apply(view_a, view_b)  # type: ignore[no-untyped-call]
    return rows, cosine


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, view_a: Tensor, view_b: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows, cosine = normalize_views(view_a, view_b)
        ctx.save_for_backward(view_a, view_b, rows)
        return rows, cosine

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_cosine: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        view_a, view_b, rows = ctx.saved_tensors
        gradients = composed_gradients if torch.is_grad_enabled() else unit_rows_gradients
        return gradients(view_a, view_b, rows, grad_rows, grad_cosine)


def normalize_views(view_a: Tensor, view_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unit rows and cosines, as `unit_rows` returns them, without a graph."""
    n, width = view_a.shape
    rows = view_a.new_empty(n if view_b is None else 2 * n, width)
    cosine = view_a.new_empty(0) if view_b is None else view_a.new_empty(n, dtype=compute_dtype(view_a))
    if n:
        constants = _constants(view_a)
        with current_device(view_a):
            launch(
                unit_rows_kernel, (-(-n // constants["ROWS"]),), view_of(view_a),
                None if view_b is None else view_of(view_b), rows, cosine, n, width, **constants,
            )  # fmt: skip
    return rows, cosine


def unit_rows_gradients(
    view_a: Tensor, view_b: Tensor | None, rows: Tensor, grad_rows: Tensor, grad_cosine: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the views from those of the unit rows and of the cosines."""
    n, width = view_a.shape
    grad_a = view_a.new_empty(n, width)
    grad_b = None if view_b is None else view_b.new_empty(n, width)
    if n:
        constants = _constants(view_a)
        with current_device(view_a):
            launch(
                unit_rows_backward_kernel, (-(-n // constants["ROWS"]),), view_of(view_a),
                None if view_b is None else view_of(view_b), rows, grad_rows.contiguous(),
                grad_cosine.contiguous(), grad_a, grad_b, n, width, **constants,
            )  # fmt: skip
    return grad_a, grad_b


def view_of(x: Tensor) -> View:
    """Rows as a kernel's argument."""
    return View(x, *x.stride())


def tile_of(width: int) -> tuple[int, int]:
    """Rows of a program and features that it reads at a time."""
    features = min(padded_edge(width), MAX_FEATURES)
    return TILE // features, features


def _constants(x: Tensor) -> dict[str, Any]:
    rows, features = tile_of(x.shape[1])
    return {
        "VANISHING": max(1e-12, torch.finfo(x.dtype).tiny), "WIDE": WIDE_TYPES[compute_dtype(x)],
        "ROWS": rows, "FEATURES": features, "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip
