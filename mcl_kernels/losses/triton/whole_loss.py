"""InfoNCE of a batch, normalisation included, as one function of autograd and repeated launches.

The kernels are those of `unit_rows.py`, `logsumexp/triton` and `info_nce.py`, which cost the host more as functions of
autograd of their own. Values and gradients have the same bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcl_kernels.backends.triton import product_precision
from mcl_kernels.backends.triton_launch import repeated
from mcl_kernels.logsumexp import gpu_common
from mcl_kernels.logsumexp.eager import refusing_derivatives, without_autocast
from mcl_kernels.logsumexp.inputs import Inputs, LseGradients, Saved, Wanted
from mcl_kernels.logsumexp.pairs import Pairs
from mcl_kernels.logsumexp.triton import launch
from mcl_kernels.logsumexp.triton.arguments import Copies
from mcl_kernels.logsumexp.triton.backward import run_backward
from mcl_kernels.losses.triton import info_nce
from mcl_kernels.losses.triton.unit_rows import normalize_views, unit_rows_gradients

Results = tuple[Tensor | None, ...]


class Form(NamedTuple):
    """A loss without its tensors."""

    negatives: str
    views: int  # of `Pairs`
    is_joined: bool  # query and key are two views, whose rows are one side: `nt_xent`
    bidirectional: bool
    normalize: bool  # the rows; joined views always are
    shares_labels: bool  # labels are those of both sides, and given once: `repeated` tells its inputs by their address
    shares_ids: bool

    def inputs(self, x: Tensor, y: Tensor | None, scale: Tensor, identities: Sequence[Tensor | None]) -> Inputs:
        """Inputs of the log-sum-exp, by the labels and ids that are given."""
        labels, key_labels, ids, key_ids = identities
        key_labels, key_ids = labels if self.shares_labels else key_labels, ids if self.shares_ids else key_ids
        pairs = Pairs(labels, key_labels, ids, key_ids, self.negatives, self.views)
        return Inputs(x, y, scale, pairs, self.bidirectional)


class Rows(NamedTuple):
    """Rows as they are multiplied, and what is known of their products."""

    x: Tensor  # of the query, or of both joined views
    y: Tensor | None  # of the key; None for joined views
    z: Tensor | None  # of the positive; None: the first keys
    product: Tensor | None  # <x_i, positive_i>

    def compared(self) -> tuple[Tensor | None, Tensor | None]:
        """Queries and their positives; None for joined views, which have their products."""
        if self.y is None:
            return None, None
        return self.x, self.y[: self.x.shape[0]] if self.z is None else self.z


def whole_loss(
    query: Tensor, key: Tensor, positive: Tensor | None, scale: Tensor, pairs: Pairs, *, is_joined: bool = False,
    bidirectional: bool = False, normalize: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of each row, and the log-sum-exps of their negatives, which have no gradient.

    With `is_joined` the rows are those of both views, [2N], one side. Else they are those of the query, [N], whose
    positives are the first keys where `positive` is None.
    """
    labels, key_labels, ids, key_ids, negatives, views = pairs
    shares_labels, shares_ids = labels is key_labels, ids is key_ids
    form = Form(negatives, views, is_joined, bidirectional, normalize, shares_labels, shares_ids)
    key_labels, key_ids = None if shares_labels else key_labels, None if shares_ids else key_ids
    given = query, key, positive, scale, labels, key_labels, ids, key_ids
    loss, lse = _WholeLoss.apply(*given, form)  # type: ignore[no-untyped-call]
    return loss, lse


class _WholeLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, positive: Tensor | None, scale: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        *identities, form = rest
        scale = scale.contiguous()
        given = query, key, positive, scale, *identities
        ctx.key = (*form, product_precision(query, key, scale), *[_layout(x) for x in given])
        with without_autocast(query):
            results = repeated(("loss", ctx.key), given, partial(_losses, given, form))
        *rows, loss, row_lse, column_lse = results[:7]
        plan = results[7:]
        assert row_lse is not None
        ctx.form = form
        views = (query, key, positive) if form.normalize else (None, None, None)
        ctx.save_for_backward(*views, *rows, scale, *identities, row_lse, column_lse, *plan)
        ctx.mark_non_differentiable(row_lse)
        ctx.set_materialize_grads(False)
        return loss, row_lse  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: None) -> Results:  # type: ignore[override]
        others = (None,) * 5  # labels, ids and the form
        if grad_loss is None:
            return *(None,) * 4, *others
        tensors = ctx.saved_tensors
        compute = partial(_gradients, grad_loss, tensors, ctx.form, ctx.needs_input_grad, ctx.key)
        if torch.is_grad_enabled():
            return *refusing_derivatives(compute, grad_loss, *tensors[:8]), *others
        return *compute(), *others


def _layout(x: Tensor | None) -> Hashable:
    """All that launches depend on of a tensor but its address."""
    return None if x is None else (x.shape, x.stride(), x.dtype)


def _losses(given: tuple[Any, ...], form: Form) -> Results:
    """Fields of Rows, the losses, and fields of Saved."""
    query, key, positive, scale, *identities = given
    rows = _rows(query, key, positive, form)
    saved = launch.forward(form.inputs(rows.x, rows.y, scale, identities))
    column_lse = saved.column_lse if form.bidirectional else None
    loss, product = info_nce.losses_and_products(*rows.compared(), rows.product, scale, saved.row_lse, column_lse)
    return *rows[:3], product, loss, *saved.flatten()


def _rows(query: Tensor, key: Tensor, positive: Tensor | None, form: Form) -> Rows:
    if form.is_joined:
        x, cosine = normalize_views(query, key)
        return Rows(x, None, None, cosine)
    if not form.normalize:
        return Rows(query, key, positive, None)
    z = None if positive is None else normalize_views(positive, None)[0]
    return Rows(normalize_views(query, None)[0], normalize_views(key, None)[0], z, None)


def _gradients(grad_loss: Tensor, tensors: Any, form: Form, wanted: Sequence[bool], key: Hashable) -> Results:
    """Gradients of query, key, positive and scale."""
    query, key_rows, positive, x, y, z, _, scale, *identities = tensors[:12]
    wants = tuple(wanted[:4])
    with without_autocast(x):
        # Hooks of saved tensors may have changed strides since the forward pass, and a setting the precision.
        read = (query, key_rows, positive) if form.normalize else (x, y, z)
        layouts = [_layout(tensor) for tensor in (grad_loss, *read, *identities[:4])]
        precision = product_precision(x, x if y is None else y, scale)
        found = repeated(
            ("gradients", *wants, precision, key, *layouts),
            (grad_loss, *tensors),
            partial(_row_gradients, grad_loss, tensors, form, wants),
        )
        near_x, near_z, near_scale, grad_x, grad_y, far_scale = found
        grad_scale = None
        if near_scale is not None and far_scale is not None:
            grad_scale = near_scale.sum_to_size(scale.shape)
            grad_scale = grad_scale + gpu_common.sum_scale(far_scale, form.inputs(x, y, scale, identities))
        if form.is_joined:
            return grad_x if wants[0] else None, grad_y if wants[1] else None, None, grad_scale
        assert grad_x is not None
        assert grad_y is not None
        if near_x is not None:
            grad_x.add_(near_x)
        if z is None and near_z is not None:
            grad_y[: len(x)].add_(near_z)
        gradients = [grad_x if wants[0] else None, grad_y if wants[1] else None, near_z if wants[2] else None]
        if form.normalize:
            for i, (view, rows) in enumerate(((query, x), (key_rows, y), (positive, z))):
                gradient = gradients[i]
                gradients[i] = None if gradient is None else _view_gradient(view, rows, gradient)
    return *gradients, grad_scale


def _row_gradients(grad_loss: Tensor, tensors: Any, form: Form, wants: tuple[bool, ...]) -> Results:
    """Gradients of rows by their positive logits and by the log-sum-exps, with each row's share of that of the scale.

    Those of x, z and the scale, then those of x, y and the scale; for joined views of the views in place of x and y.
    """
    query, key, _, x, y, z, product, scale, *rest = tensors
    wants_query, wants_key, wants_positive, wants_scale = wants
    if form.is_joined:
        wants_query, wants_key = wants_query or wants_key, False
    saved = Saved.unflatten(rest[4:])
    column_lse = saved.column_lse if form.bidirectional else None
    near_x, near_z, grad_product, near_scale, grad_row, grad_column = info_nce.gradients(
        grad_loss, *Rows(x, y, z, product).compared(), product, scale, saved.row_lse, column_lse,
        wanted=(wants_query, wants_key if z is None else wants_positive, form.is_joined and wants_query, wants_scale),
    )  # fmt: skip
    assert grad_row is not None
    grads = LseGradients(grad_row, saved.column_lse if grad_column is None else grad_column)
    grad_x, grad_y, far_scale = gpu_common.launch_backward(
        partial(run_backward, Copies()), form.inputs(x, y, scale, rest[:4]), saved, grads,
        Wanted(wants_query, wants_key, wants_scale),
    )  # fmt: skip
    gradients: tuple[Tensor | None, ...] = grad_x, grad_y
    if form.is_joined and wants_query:
        assert grad_product is not None
        gradients = unit_rows_gradients(query, key, x, grad_x, grad_product)
    return near_x, near_z, near_scale, *gradients, far_scale if wants_scale else None


def _view_gradient(view: Tensor, rows: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of rows from that of the unit rows."""
    key = "unit rows", *(_layout(x) for x in (view, rows, gradient))
    inputs = view, rows, gradient

    def compute() -> Results:
        return unit_rows_gradients(view, None, rows, gradient, gradient.new_empty(0))

    result = repeated(key, inputs, compute)[0]
    assert result is not None
    return result
