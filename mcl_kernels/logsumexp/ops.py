"""The torch.library contract of the fused implementations: schemas, fakes, autograd.

One forward op and one backward op serve them all: `str impl` picks the module that computes, since several
implementations live on the same device. The forward op returns the LSE and the plan, and autograd saves
those and the inputs, nothing else. The backward op refuses to be differentiated.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mcl_kernels.logsumexp.pairs import Pairs, Plan

# Each module has `forward`, `backward` and `count_above`; it is imported when it is first called.
IMPLEMENTATIONS = {
    "native": "mcl_kernels.logsumexp.native",
    "triton": "mcl_kernels.logsumexp.triton.launch",
    "cuda": "mcl_kernels.logsumexp.cuda",
    "blockwise": "mcl_kernels.logsumexp.blockwise",
}

_LABELS_AND_IDS = "Tensor? labels, Tensor? key_labels, Tensor? ids, Tensor? key_ids"
_INPUTS = f"Tensor query, Tensor? key, Tensor scale, {_LABELS_AND_IDS}"
_PLAN = "Tensor query_order, Tensor key_order, Tensor key_begin, Tensor key_end"
_OPTIONS = "str negatives, bool bidirectional, str impl"


def _module(impl: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[impl])


@torch.library.custom_op(
    "mcl_kernels::masked_logsumexp",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def masked_logsumexp(query, key, scale, labels, key_labels, ids, key_ids, negatives, bidirectional, impl):  # type: ignore[no-untyped-def]
    """Row LSE [N], column LSE ([M] where bidirectional, else [0]), then the four tensors of the plan."""
    with torch.autocast(query.device.type, enabled=False):
        row_lse, column_lse, plan = _module(impl).forward(
            query, key, scale, Pairs(labels, key_labels, ids, key_ids, negatives), bidirectional
        )
    return (row_lse, column_lse, *plan)


@masked_logsumexp.register_fake
def _(query, key, scale, labels, key_labels, ids, key_ids, negatives, bidirectional, impl):  # type: ignore[no-untyped-def]
    n = query.shape[0]
    integers = query.new_empty(0, dtype=torch.int64)
    return (
        scale.new_empty(n),
        scale.new_empty(key.shape[0] if bidirectional else 0),
        integers.new_empty(n),
        integers.new_empty(0 if key is None else key.shape[0]),
        integers.new_empty(n),
        integers.new_empty(n),
    )


@torch.library.custom_op(
    "mcl_kernels::masked_logsumexp_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_row, Tensor grad_column, {_INPUTS}, Tensor row_lse, Tensor column_lse, {_PLAN}, "
        f"{_OPTIONS}, bool[] needs_grad) -> (Tensor, Tensor, Tensor)"
    ),
)
def masked_logsumexp_backward(  # type: ignore[no-untyped-def]
    grad_row, grad_column, query, key, scale, labels, key_labels, ids, key_ids, row_lse, column_lse,
    query_order, key_order, key_begin, key_end, negatives, bidirectional, impl, needs_grad,
):  # fmt: skip
    """The gradients of query, key and scale; [0] for one that is not needed."""
    pairs = Pairs(labels, key_labels, ids, key_ids, negatives)
    plan = Plan(query_order, key_order, key_begin, key_end)
    with torch.autocast(query.device.type, enabled=False):
        return _module(impl).backward(
            grad_row, grad_column, query, key, scale, pairs, row_lse, column_lse, plan, bidirectional, needs_grad
        )


@masked_logsumexp_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_row, grad_column, query, key, scale, labels, key_labels, ids, key_ids, row_lse, column_lse,
    query_order, key_order, key_begin, key_end, negatives, bidirectional, impl, needs_grad,
):  # fmt: skip
    needs_query, needs_key, needs_scale = needs_grad
    keyed = query if key is None else key
    return (
        query.new_empty(query.shape if needs_query else (0,)),
        keyed.new_empty(keyed.shape if needs_key and key is not None else (0,)),
        scale.new_empty(scale.shape if needs_scale else (0,)),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.negatives, ctx.bidirectional, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_row: Tensor, grad_column: Tensor, *grad_plan: None) -> tuple[Tensor | None, ...]:
    needs_grad = ctx.needs_input_grad[:3]
    grads = masked_logsumexp_backward(
        grad_row, grad_column, *ctx.saved_tensors, ctx.negatives, ctx.bidirectional, ctx.impl, list(needs_grad)
    )
    wanted = [grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)]
    return (*wanted, *(None,) * 7)


masked_logsumexp.register_autograd(_backward, setup_context=_save_for_backward)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "masked_logsumexp: the backward of a fused implementation is not differentiable; "
        "for second derivatives call it with impl='reference'"
    )


masked_logsumexp_backward.register_autograd(_refuse_double_backward)


@torch.library.custom_op(
    "mcl_kernels::count_above",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor threshold, {_LABELS_AND_IDS}, str negatives, str impl) -> Tensor",
)
def count_above(query, key, threshold, labels, key_labels, ids, key_ids, negatives, impl):  # type: ignore[no-untyped-def]
    """For each query, how many kept keys have not <q_i, k_j> <= threshold_i; int64 [N]."""
    with torch.autocast(query.device.type, enabled=False):
        pairs = Pairs(labels, key_labels, ids, key_ids, negatives)
        return _module(impl).count_above(query, key, threshold, pairs)


@count_above.register_fake
def _(query, key, threshold, labels, key_labels, ids, key_ids, negatives, impl):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], dtype=torch.int64)
