"""InfoNCE of each anchor from its positive product and its log-sum-exps: one Triton kernel, and one for the gradients.

    a_i    = scale_i <q_i, p_i>
    loss_i = log(1 + e^(b_i - a_i)), 0 where there are no negatives; for both directions the mean of those of b and c

The rows of V views share their positive products: row i has that of sample i mod (rows / V).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import current_device

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


@triton.jit(do_not_specialize=["n"])
def info_nce_kernel(
    product,  # [n]
    scale,  # [] or [VIEWS n]
    row_lse,  # [VIEWS n]
    column_lse,  # [VIEWS n], or None
    loss,  # [VIEWS n]
    n, SCALE_STRIDE: tl.constexpr, VIEWS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Losses of the rows of SAMPLES samples."""
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    valid = sample < n
    positive = tl.load(product + sample, mask=valid, other=0.0)
    for view in tl.static_range(VIEWS):
        row = view * n + sample
        logit = positive * tl.load(scale + row * SCALE_STRIDE, mask=valid, other=0.0)
        value = losses_of(logit, tl.load(row_lse + row, mask=valid, other=0.0))
        if column_lse is not None:
            value = (value + losses_of(logit, tl.load(column_lse + row, mask=valid, other=0.0))) / 2
        tl.store(loss + row, value, mask=valid)


@triton.jit(do_not_specialize=["n"])
def info_nce_backward_kernel(
    grad_loss,  # [VIEWS n], or with a stride of 0 one value
    grad_stride,
    product,  # [n]
    scale,  # [] or [VIEWS n]
    row_lse,  # [VIEWS n]
    column_lse,  # [VIEWS n], or None
    grad_product,  # [n]
    grad_scale,  # [VIEWS n], or None
    grad_row_lse,  # [VIEWS n]
    grad_column_lse,  # [VIEWS n], or None
    n, SCALE_STRIDE: tl.constexpr, VIEWS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows of SAMPLES samples."""
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    valid = sample < n
    positive = tl.load(product + sample, mask=valid, other=0.0)
    total = tl.zeros((SAMPLES,), product.dtype.element_ty)
    for view in tl.static_range(VIEWS):
        row = view * n + sample
        factor = tl.load(scale + row * SCALE_STRIDE, mask=valid, other=0.0)
        weight = tl.load(grad_loss + row * grad_stride, mask=valid, other=0.0)
        logit = positive * factor
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
            tl.store(grad_scale + row, -slope * positive, mask=valid)
    tl.store(grad_product + sample, total, mask=valid)


def info_nce(product: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor | None = None) -> Tensor:
    """The loss of each row, [N], from the products of the samples, [N / V], a scale [] or [N] and log-sum-exps [N]."""
    loss: Tensor = _InfoNCE.apply(product, scale, row_lse, column_lse)  # type: ignore[no-untyped-call]
    return loss


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        product, scale, row_lse, column_lse = (None if x is None else x.contiguous() for x in tensors)
        assert product is not None
        assert scale is not None
        assert row_lse is not None
        ctx.save_for_backward(product, scale, row_lse, column_lse)
        loss = torch.empty_like(row_lse)
        _launch(info_nce_kernel, (product, scale, row_lse, column_lse, loss), product, scale, row_lse)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        product, scale, row_lse, column_lse = ctx.saved_tensors
        grad_product, grad_row_lse = torch.empty_like(product), torch.empty_like(row_lse)
        grad_column_lse = None if column_lse is None else torch.empty_like(column_lse)
        grad_scale = torch.empty_like(row_lse) if ctx.needs_input_grad[1] else None
        arguments = (
            grad_loss, grad_loss.stride(0), product, scale, row_lse, column_lse,
            grad_product, grad_scale, grad_row_lse, grad_column_lse,
        )  # fmt: skip
        _launch(info_nce_backward_kernel, arguments, product, scale, row_lse)
        if grad_scale is not None:
            grad_scale = grad_scale.sum_to_size(scale.shape)
        return grad_product, grad_scale, grad_row_lse, grad_column_lse


def _launch(kernel: Any, arguments: tuple[Any, ...], product: Tensor, scale: Tensor, row_lse: Tensor) -> None:
    n = product.shape[0]
    if n:
        with current_device(product):
            kernel[(-(-n // SAMPLES),)](
                *arguments, n, SCALE_STRIDE=scale.ndim, VIEWS=row_lse.shape[0] // n, SAMPLES=SAMPLES, num_warps=4
            )
