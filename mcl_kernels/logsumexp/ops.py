"""The fused implementations as differentiable functions: `eager.py` calls one, these operators stand for it in graphs.

One forward op and one backward op serve them all: `str impl` picks the module that computes, since several
implementations live on the same device. The forward op returns the LSE and the plan, and autograd saves those and the
inputs, nothing else. The backward op refuses to be differentiated.

An implementation is a module with

    forward(inputs) -> Saved
    backward(inputs, saved, grads, wanted) -> (grad_query, grad_key, grad_scale), [0] for one that is not wanted
    count_above(inputs, threshold) -> int64 [N]

In the self form (`inputs.key` is None) column_lse is [0], c = b and gc = gb; the gradient of the query has the terms of
both sides, that of the scale counts each pair once. A row with a negative label may hold anything, NaN too: it has LSE
-inf and gradient 0, and changes no other row. Gradients have the dtype of their input. The plan is `pairs.make_plan`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mcl_kernels._traced import is_traced
from mcl_kernels.backends.table import load
from mcl_kernels.logsumexp import eager, reference
from mcl_kernels.logsumexp.inputs import Inputs, LseGradients, Saved, Wanted
from mcl_kernels.logsumexp.pairs import Plan

# The fields of `Inputs` and `Saved`, in the order of their `flatten`.
INPUTS = (
    "Tensor query, Tensor? key, Tensor scale, Tensor? labels, Tensor? key_labels, Tensor? ids, Tensor? key_ids, "
    "str negatives, int views, bool bidirectional"
)
SAVED = (
    "Tensor row_lse, Tensor column_lse, Tensor query_order, Tensor key_order, Tensor key_begin, Tensor key_end, "
    "Tensor key_drop_begin, Tensor key_drop_end, "
    "Tensor query_begin, Tensor query_end, Tensor query_drop_begin, Tensor query_drop_end"
)
GPU_IMPLS = ("triton", "cuda")  # they take default ids, and their plan has the ranges that only GPUs need
N_INPUTS, N_SAVED = INPUTS.count(",") + 1, SAVED.count(",") + 1


def compute(inputs: Inputs, impl: str) -> tuple[Tensor, Tensor]:
    """Returns b, [N], and c, [M] where bidirectional, else [0]."""
    if impl not in GPU_IMPLS:
        inputs = inputs.with_ids()
    if impl == "reference":
        return reference.logsumexp(inputs)
    _refuse_transforms(inputs.query, inputs.keys, inputs.scale)
    if not is_traced(*inputs.tensors()):
        return eager.logsumexp(inputs, impl)
    row_lse, column_lse, *_ = masked_logsumexp(*inputs.flatten(), impl)
    return row_lse, column_lse


@torch.library.custom_op(
    "mcl_kernels::masked_logsumexp",
    mutates_args=(),
    schema=f"({INPUTS}, str impl) -> ({', '.join(['Tensor'] * N_SAVED)})",
)
def masked_logsumexp(*arguments):  # type: ignore[no-untyped-def]
    """The fields of `Saved`, [0] for those that the plan lacks."""
    *flat, impl = arguments
    inputs = Inputs.unflatten(flat)
    with torch.autocast(inputs.query.device.type, enabled=False):
        saved = load("logsumexp", impl).forward(inputs).flatten()
    return tuple(inputs.scale.new_empty(0, dtype=torch.int32) if x is None else x for x in saved)


@masked_logsumexp.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    inputs, impl = Inputs.unflatten(arguments[:N_INPUTS]), arguments[N_INPUTS]
    n, m = inputs.query.shape[0], inputs.keys.shape[0]
    integers, drops = (inputs.query.new_empty(0, dtype=dtype) for dtype in (torch.int64, torch.int32))
    on_gpu = impl in GPU_IMPLS
    drops_keys, of_keys = on_gpu and inputs.pairs.drops(), on_gpu and inputs.bidirectional
    return (
        inputs.scale.new_empty(n),
        inputs.scale.new_empty(m if inputs.bidirectional else 0),
        integers.new_empty(n),
        integers.new_empty(0 if inputs.key is None else m),
        integers.new_empty(n),
        integers.new_empty(n),
        *(drops.new_empty(n if drops_keys else 0) for _ in range(2)),
        *((integers.new_empty(m) if of_keys else drops.new_empty(0)) for _ in range(2)),
        *(drops.new_empty(m if of_keys and drops_keys else 0) for _ in range(2)),
    )


@torch.library.custom_op(
    "mcl_kernels::masked_logsumexp_backward",
    mutates_args=(),
    schema=(
        f"({INPUTS}, {SAVED}, Tensor grad_row, Tensor grad_column, bool[] wanted, str impl) -> (Tensor, Tensor, Tensor)"
    ),
)
def masked_logsumexp_backward(*arguments):  # type: ignore[no-untyped-def]
    """Gradients of query, key and scale; [0] for one that is not wanted."""
    inputs, saved, grads, wanted, impl = _unflatten_backward(arguments)
    row_lse, column_lse, plan = saved
    optional = (None if x is None or len(x) == 0 else x for x in plan[4:])
    saved = Saved(row_lse, column_lse, Plan(*plan[:4], *optional))
    with torch.autocast(inputs.query.device.type, enabled=False):
        return load("logsumexp", impl).backward(inputs, saved, grads, wanted)


@masked_logsumexp_backward.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    inputs, _, _, wanted, _ = _unflatten_backward(arguments)
    query, keys, scale = inputs.query, inputs.keys, inputs.scale
    return (
        query.new_empty(query.shape if wanted.query else (0,)),
        keys.new_empty(keys.shape if wanted.key and inputs.key is not None else (0,)),
        scale.new_empty(scale.shape if wanted.scale else (0,)),
    )


def _unflatten_backward(arguments: tuple[Any, ...]) -> tuple[Inputs, Saved, LseGradients, Wanted, str]:
    inputs, saved = arguments[:N_INPUTS], arguments[N_INPUTS : N_INPUTS + N_SAVED]
    grad_row, grad_column, wanted, impl = arguments[N_INPUTS + N_SAVED :]
    return Inputs.unflatten(inputs), Saved.unflatten(saved), LseGradients(grad_row, grad_column), Wanted(*wanted), impl


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, negatives, views, bidirectional, impl = inputs
    ctx.options, ctx.impl = (negatives, views, bidirectional), impl
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_row: Tensor, grad_column: Tensor, *grad_plan: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    tensors, saved = ctx.saved_tensors[:-N_SAVED], ctx.saved_tensors[-N_SAVED:]
    grads = masked_logsumexp_backward(*tensors, *ctx.options, *saved, grad_row, grad_column, list(wanted), ctx.impl)
    differentiable = [grad if needed else None for grad, needed in zip(grads, wanted, strict=True)]
    return *differentiable, *(None,) * (N_INPUTS + 1 - len(wanted))


masked_logsumexp.register_autograd(_backward, setup_context=_save_for_backward)


masked_logsumexp_backward.register_autograd(eager.refuse_double_backward)


def count_above(inputs: Inputs, threshold: Tensor, impl: str) -> Tensor:
    """Number of kept keys of each query with not (<q_i, k_j> <= threshold_i): NaN counts as above; int64 [N]."""
    if impl not in GPU_IMPLS:
        inputs = inputs.with_ids()
    if impl == "reference":
        return reference.count_above(inputs, threshold)
    if not is_traced(*inputs.tensors()):
        return eager.count_above(inputs, threshold, impl)
    count: Tensor = fused_count_above(*inputs.flatten(), threshold, impl)
    return count


@torch.library.custom_op(
    "mcl_kernels::count_above", mutates_args=(), schema=f"({INPUTS}, Tensor threshold, str impl) -> Tensor"
)
def fused_count_above(*arguments):  # type: ignore[no-untyped-def]
    *flat, threshold, impl = arguments
    inputs = Inputs.unflatten(flat)
    with torch.autocast(inputs.query.device.type, enabled=False):
        return load("logsumexp", impl).count_above(inputs, threshold)


@fused_count_above.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    query = arguments[0]
    return query.new_empty(query.shape[0], dtype=torch.int64)


def _refuse_transforms(*inputs: Tensor) -> None:
    """Raises for derivatives that the fused ops do not have: all but plain reverse mode.

    In forward mode PyTorch would drop the tangents without an error; in `torch.func.grad` its own error is about an
    autograd.Function.
    """
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and any(unpack(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            "masked_logsumexp: a fused implementation has no forward-mode derivative; use impl='reference'"
        )
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
        return
    if any(_is_differentiated_by_transform(x) for x in inputs):
        raise NotImplementedError(
            "masked_logsumexp: a fused implementation has no derivative under torch.func (grad, vjp, jacrev, "
            "hessian); use impl='reference'"
        )


def _is_differentiated_by_transform(x: Tensor) -> bool:
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x) and x.requires_grad:
            return True
        x = functorch.get_unwrapped(x)
    return False
