"""Calls of a fused implementation outside of graphs: an operator costs several times the host's time of these.

Results, refusals and what autograd saves are those of the operators in `ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcl_kernels.backends.table import load
from mcl_kernels.logsumexp.inputs import Inputs, LseGradients, Saved, Wanted

Gradients = Callable[[], tuple[Tensor | None, ...]]


def logsumexp(inputs: Inputs, impl: str) -> tuple[Tensor, Tensor]:
    """Returns b, [N], and c, [M] where bidirectional, else [0]."""
    row_lse, column_lse = _LogSumExp.apply(*inputs.flatten(), impl)  # type: ignore[no-untyped-call]
    return row_lse, column_lse


@torch.no_grad()
def count_above(inputs: Inputs, threshold: Tensor, impl: str) -> Tensor:
    """Number of kept keys of each query with not (<q_i, k_j> <= threshold_i): NaN counts as above; int64 [N]."""
    with without_autocast(inputs.query):
        count: Tensor = load("logsumexp", impl).count_above(inputs, threshold)
        return count


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        *flat, ctx.impl = arguments
        inputs = Inputs.unflatten(flat)
        with without_autocast(inputs.query):
            saved = load("logsumexp", ctx.impl).forward(inputs)
        tensors = inputs.tensors()
        ctx.options = flat[len(tensors) :]
        ctx.save_for_backward(*tensors, *saved.flatten())
        ctx.set_materialize_grads(False)
        return saved.row_lse, saved.column_lse

    @staticmethod
    def backward(ctx: Any, grad_row: Tensor | None, grad_column: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        n_inputs = len(ctx.needs_input_grad) - len(ctx.options) - 1
        tensors = ctx.saved_tensors
        inputs, saved = Inputs.unflatten((*tensors[:n_inputs], *ctx.options)), Saved.unflatten(tensors[n_inputs:])
        grads = LseGradients(
            torch.zeros_like(saved.row_lse) if grad_row is None else grad_row,
            torch.zeros_like(saved.column_lse) if grad_column is None else grad_column,
        )
        wanted = Wanted(*ctx.needs_input_grad[:3])
        compute = partial(_gradients, inputs, saved, grads, wanted, ctx.impl)
        gradients = refusing_derivatives(compute, *grads, *inputs[:3]) if torch.is_grad_enabled() else compute()
        differentiable = [grad if needed else None for grad, needed in zip(gradients, wanted, strict=True)]
        return *differentiable, *(None,) * (len(ctx.needs_input_grad) - len(wanted))


class _Backward(torch.autograd.Function):
    """The backward pass in a graph of second derivatives, which it refuses."""

    @staticmethod
    def forward(ctx: Any, compute: Gradients, *differentiable: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return compute()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # type: ignore[override]
        refuse_double_backward(ctx, *grads)


def refusing_derivatives(compute: Gradients, *differentiable: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients as computed, in a graph that refuses second derivatives by the tensors of which they are functions."""
    gradients: tuple[Tensor | None, ...] = _Backward.apply(compute, *differentiable)  # type: ignore[no-untyped-call]
    return gradients


def _gradients(inputs: Inputs, saved: Saved, grads: LseGradients, wanted: Wanted, impl: str) -> tuple[Tensor, ...]:
    with without_autocast(inputs.query):
        gradients: tuple[Tensor, ...] = load("logsumexp", impl).backward(inputs, saved, grads, wanted)
        return gradients


def refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    """Raises: a backward of a fused implementation has no derivative."""
    raise RuntimeError(
        "masked_logsumexp: the backward of a fused implementation is not differentiable; "
        "for second derivatives call it with impl='reference'"
    )


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Context without autocast; entering torch's own takes longer than this question."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
