"""InfoNCE of each anchor from its positive product and its log-sum-exps: one Triton kernel, and one for the gradients.

    a_i    = scale_i <q_i, p_i>, from the products or from the rows
    loss_i = log(1 + e^(b_i - a_i)), 0 where there are no negatives; for both directions the mean of those of b and c

The rows of V views share their positive products: row i has that of sample i mod (rows / V).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import current_device
from mcl_kernels.backends.triton_device import load_features, rounded
from mcl_kernels.backends.triton_launch import launch
from mcl_kernels.losses.triton.unit_rows import tile_of, view_of

SAMPLES = 256  # of a program
TERMS = tl.constexpr(18)  # of the series: (1 / 9)^18 is below the precision of fp64


@triton.jit
def log1p(x):
    """Returns log(1 + x) for x from 0 to 1, 2 artanh(x / (2 + x)), exact to rounding for a small x too."""
    ratio = x / (2 + x)
    square = ratio * ratio
    series = tl.zeros(x.shape, x.dtype)
    for term in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - term) - 1)
    return 2 * ratio * series


@triton.jit
def losses_of(logit, lse):
    """Returns the loss of anchors; NaN where a lonely anchor's logit is not finite."""
    difference = lse - logit
    loss = tl.maximum(difference, 0.0) + log1p(tl.exp(-tl.abs(difference)))
    return tl.where(lse == float("-inf"), 0.0 * logit, loss)


@triton.jit
def slopes_of(logit, lse):
    """Returns the derivative of the losses by the LSE, the negative of that by the logit: 0 for a lonely anchor."""
    difference = lse - logit
    small = tl.exp(-tl.abs(difference))
    slope = tl.where(difference < 0, small, 1.0) / (1 + small)
    return tl.where(lse == float("-inf"), 0.0, slope)


@triton.jit
def multiply_rows(query, positive, row, valid, width, FEATURES: tl.constexpr, WIDE: tl.constexpr):
    """Returns <q_i, p_i>."""
    products = tl.zeros(row.shape, WIDE)
    for first in range(0, width, FEATURES):
        x = load_features(query.x, row * query.stride, valid, query.step, width, first, FEATURES, WIDE)
        y = load_features(positive.x, row * positive.stride, valid, positive.step, width, first, FEATURES, WIDE)
        products += tl.sum(x * y, 1)
    return products


@triton.jit
def store_multiples(view, weight, grad, row, valid, width, FEATURES: tl.constexpr):
    """Stores weight_i x_i."""
    for first in range(0, width, FEATURES):
        x = load_features(view.x, row * view.stride, valid, view.step, width, first, FEATURES, weight.dtype)
        feature = first + tl.arange(0, FEATURES)
        written = valid[:, None] & (feature < width)[None, :]
        value = rounded(weight[:, None] * x, grad.dtype.element_ty)
        tl.store(grad + row[:, None] * width + feature[None, :], value, mask=written)


@triton.jit(do_not_specialize=["n"])
def info_nce_kernel(
    query,  # View of n rows; None: the products are given
    positive,  # View of n rows, or None
    product,  # [n], written if there are rows
    scale,  # [] or [VIEWS n]
    row_lse,  # [VIEWS n]
    column_lse,  # [VIEWS n], or None
    loss,  # [VIEWS n]
    n, width, SCALE_STRIDE: tl.constexpr, VIEWS: tl.constexpr, SAMPLES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Losses of the rows of SAMPLES samples."""
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    valid = sample < n
    if query is not None:
        products = multiply_rows(query, positive, sample, valid, width, FEATURES, product.dtype.element_ty)
        tl.store(product + sample, products, mask=valid)
    else:
        products = tl.load(product + sample, mask=valid, other=0.0)
    for view in tl.static_range(VIEWS):
        row = view * n + sample
        logit = products * tl.load(scale + row * SCALE_STRIDE, mask=valid, other=0.0)
        value = losses_of(logit, tl.load(row_lse + row, mask=valid, other=0.0))
        if column_lse is not None:
            value = (value + losses_of(logit, tl.load(column_lse + row, mask=valid, other=0.0))) / 2
        tl.store(loss + row, value, mask=valid)


@triton.jit(do_not_specialize=["n"])
def info_nce_backward_kernel(
    grad_loss,  # [VIEWS n], or with a stride of 0 one value
    grad_stride,
    query,  # View of n rows; None: the gradient of the products is wanted
    positive,  # View of n rows, or None
    product,  # [n]
    scale,  # [] or [VIEWS n]
    row_lse,  # [VIEWS n]
    column_lse,  # [VIEWS n], or None
    grad_query,  # [n, D], or None
    grad_positive,  # [n, D], or None
    grad_product,  # [n], or None
    grad_scale,  # [VIEWS n], or None
    grad_row_lse,  # [VIEWS n]
    grad_column_lse,  # [VIEWS n], or None
    n, width, SCALE_STRIDE: tl.constexpr, VIEWS: tl.constexpr, SAMPLES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows of SAMPLES samples."""
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    valid = sample < n
    products = tl.load(product + sample, mask=valid, other=0.0)
    total = tl.zeros((SAMPLES,), product.dtype.element_ty)
    for view in tl.static_range(VIEWS):
        row = view * n + sample
        factor = tl.load(scale + row * SCALE_STRIDE, mask=valid, other=0.0)
        weight = tl.load(grad_loss + row * grad_stride, mask=valid, other=0.0)
        logit = products * factor
        if column_lse is not None:
            weight = weight / 2
        slope = weight * slopes_of(logit, tl.load(row_lse + row, mask=valid, other=0.0))
        tl.store(grad_row_lse + row, slope, mask=valid)
        if column_lse is not None:
            column_slope = weight * slopes_of(logit, tl.load(column_lse + row, mask=valid, other=0.0))
            tl.store(grad_column_lse + row, column_slope, mask=valid)
            slope += column_slope
        total -= slope * factor
        if grad_scale is not None:
            tl.store(grad_scale + row, -slope * products, mask=valid)
    if grad_product is not None:
        tl.store(grad_product + sample, total, mask=valid)
    if grad_query is not None:
        store_multiples(positive, total, grad_query, sample, valid, width, FEATURES)
    if grad_positive is not None:
        store_multiples(query, total, grad_positive, sample, valid, width, FEATURES)


def info_nce(product: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor | None = None) -> Tensor:
    """The loss of each row, [N], from the products of the samples, [N / V], a scale [] or [N] and log-sum-exps [N]."""
    loss: Tensor = _InfoNCE.apply(None, None, product, scale, row_lse, column_lse)  # type: ignore[no-untyped-call]
    return loss


def info_nce_of_rows(
    query: Tensor, positive: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor | None = None
) -> Tensor:
    """The loss of each row, [N], from queries and positives [N, D], a scale [] or [N] and log-sum-exps [N]."""
    loss: Tensor = _InfoNCE.apply(query, positive, None, scale, row_lse, column_lse)  # type: ignore[no-untyped-call]
    return loss


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor | None, positive: Tensor | None, product: Tensor | None, *rest: Tensor | None
    ) -> Tensor:
        scale, row_lse, column_lse = (None if x is None else x.contiguous() for x in rest)
        assert scale is not None
        assert row_lse is not None
        loss, product = losses_and_products(query, positive, product, scale, row_lse, column_lse)
        ctx.save_for_backward(query, positive, product, scale, row_lse, column_lse)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *grads, grad_scale, grad_row, grad_column = gradients(
            grad_loss, *ctx.saved_tensors, wanted=ctx.needs_input_grad
        )
        if grad_scale is not None:
            grad_scale = grad_scale.sum_to_size(ctx.saved_tensors[3].shape)
        return *grads, grad_scale, grad_row, grad_column


def losses_and_products(
    query: Tensor | None, positive: Tensor | None, product: Tensor | None, scale: Tensor, row_lse: Tensor,
    column_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of each row, and the products of the samples: those given, or those of the rows; without a graph."""
    product = torch.empty_like(row_lse) if product is None else product.contiguous()
    loss = torch.empty_like(row_lse)
    _launch(info_nce_kernel, (), query, positive, (product, scale, row_lse, column_lse, loss), product)
    return loss, product


def gradients(
    grad_loss: Tensor, query: Tensor | None, positive: Tensor | None, product: Tensor, scale: Tensor, row_lse: Tensor,
    column_lse: Tensor | None, *, wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of query, positive, product and each row's share of that of the scale, and of both log-sum-exps.

    Of the first four None for one that is not wanted.
    """
    grad_query = query.new_empty(query.shape) if query is not None and wanted[0] else None
    grad_positive = positive.new_empty(positive.shape) if positive is not None and wanted[1] else None
    grad_product = torch.empty_like(product) if wanted[2] else None
    grad_scale = torch.empty_like(row_lse) if wanted[3] else None
    grad_row_lse = torch.empty_like(row_lse)
    grad_column_lse = None if column_lse is None else torch.empty_like(column_lse)
    arguments = (
        product, scale, row_lse, column_lse, grad_query, grad_positive, grad_product, grad_scale, grad_row_lse,
        grad_column_lse,
    )  # fmt: skip
    _launch(info_nce_backward_kernel, (grad_loss, grad_loss.stride(0)), query, positive, arguments, product)
    return grad_query, grad_positive, grad_product, grad_scale, grad_row_lse, grad_column_lse


def _launch(
    kernel: Any, first: tuple[Any, ...], query: Tensor | None, positive: Tensor | None, rest: tuple[Any, ...],
    product: Tensor,
) -> None:  # fmt: skip
    n, (_, scale, row_lse, *_) = product.shape[0], rest
    if n == 0:
        return
    rows: tuple[Any, Any] = (None, None)
    width, samples, features = 1, SAMPLES, 1
    if query is not None and positive is not None:
        rows, width = (view_of(query), view_of(positive)), query.shape[1]
        samples, features = tile_of(width)
    with current_device(product):
        launch(
            kernel, (-(-n // samples),), *first, *rows, *rest, n, width, SCALE_STRIDE=scale.ndim,
            VIEWS=row_lse.shape[0] // n, SAMPLES=samples, FEATURES=features, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
