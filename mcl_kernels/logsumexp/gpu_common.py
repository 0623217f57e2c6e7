"""Launches of a forward and a backward pass, which the implementations for GPUs share.

A kernel owns the rows of one side, queries or keys, and compares them with the other side's rows, its columns: each row
is written once, so sums need no atomics and have one order. A bidirectional call therefore launches the kernel twice,
once per side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mcl_kernels.logsumexp.device_plan import make_plan, query_ranges
from mcl_kernels.logsumexp.inputs import Inputs, LseGradients, Saved, Wanted
from mcl_kernels.logsumexp.pairs import Pairs, Plan


class Side(NamedTuple):
    """Queries or keys."""

    x: Tensor  # [N, D]
    order: Tensor  # int64 [N], sorted -> original row index
    labels: Tensor | None  # int64 [N]
    ids: Tensor | None  # int64 [N]


class Rows(NamedTuple):
    """The side whose rows are owned, and for each sorted row its range of the other side's sorted rows."""

    side: Side
    begin: Tensor  # int64 [N]
    end: Tensor  # int64 [N]
    drop_begin: Tensor | None  # int32 [N], those among them that it drops; None: no row drops any
    drop_end: Tensor | None  # int32 [N]


class Terms(NamedTuple):
    """Terms of a pair's weight, one or both of them.

    W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j)
    """

    row: tuple[Tensor, Tensor] | None  # LSE and weight
    column: tuple[Tensor, Tensor] | None
    column_scale: Tensor | None  # scale of each column's logits, in place of the rows' scale
    fp16_scale: Tensor  # power of 2 that brings weights into the range of fp16


# run(rows, columns, scale, negatives, result, threshold): the LSE of each row, or the count above its threshold.
RunForward = Callable[[Rows, Side, Tensor, str, Tensor, Tensor | None], None]
# run(rows, columns, scale, negatives, terms, grad_x, grad_scale): the gradients that are given a tensor.
RunBackward = Callable[[Rows, Side, Tensor, str, Terms, Tensor | None, Tensor | None], None]


def compares_ids(rows: Side, negatives: str) -> bool:
    """Returns whether ids are compared pair by pair: under "different" rows of one sample may have different labels."""
    return negatives == "different" and rows.ids is not None


def _sides(inputs: Inputs, plan: Plan) -> tuple[Side, Side]:
    """Queries and keys; in the self form they are one."""
    query, key, _, pairs, _ = inputs
    if key is not None and pairs.negatives == "different":
        pairs = pairs.with_ids(query, key)  # compared pair by pair
    labels, key_labels, ids, key_ids = (None if v is None else v.contiguous() for v in pairs[:4])
    queries = Side(query, plan.query_order, labels, ids)
    return queries, queries if key is None else Side(key, plan.key_order, key_labels, key_ids)


def _rows_of_queries(queries: Side, plan: Plan) -> Rows:
    return Rows(queries, plan.key_begin, plan.key_end, plan.key_drop_begin, plan.key_drop_end)


def _rows_of_keys(queries: Side, keys: Side, pairs: Pairs, plan: Plan) -> Rows:
    if plan.query_begin is None or plan.query_end is None:
        return Rows(keys, *query_ranges(queries.x, keys.x, pairs, plan))
    return Rows(keys, plan.query_begin, plan.query_end, plan.query_drop_begin, plan.query_drop_end)


def forward(run: RunForward, inputs: Inputs) -> Saved:
    """Log-sum-exps and the plan."""
    query, key, scale, pairs, bidirectional = inputs
    plan, scale = make_plan(query, key, pairs, bidirectional), scale.contiguous()
    queries, keys = _sides(inputs, plan)
    row_lse, column_lse = scale.new_empty(query.shape[0]), scale.new_empty(keys.x.shape[0] if bidirectional else 0)
    run(_rows_of_queries(queries, plan), keys, scale, pairs.negatives, row_lse, None)
    if bidirectional:
        run(_rows_of_keys(queries, keys, pairs, plan), queries, scale, pairs.negatives, column_lse, None)
    return Saved(row_lse, column_lse, plan)


def backward(
    run: RunBackward, inputs: Inputs, saved: Saved, grads: LseGradients, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and scale; [0] for one that is not wanted (and for the key of the self form)."""
    grad_query, grad_key, grad_scale = launch_backward(run, inputs, saved, grads, wanted)
    if wanted.scale:
        grad_scale = sum_scale(grad_scale, inputs)
    return grad_query, grad_key, grad_scale


def sum_scale(grad_scale: Tensor, inputs: Inputs) -> Tensor:
    """Gradient of the scale from each query's share."""
    grad_scale = grad_scale.sum_to_size(inputs.scale.shape)
    # In the self form every pair was computed from both its rows, with the terms of both.
    return grad_scale / 2 if inputs.key is None else grad_scale


def launch_backward(
    run: RunBackward, inputs: Inputs, saved: Saved, grads: LseGradients, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query and key, and each query's share of that of the scale, [N]; [0] for one that is not wanted."""
    query, key, scale, pairs, bidirectional = inputs
    plan, wants_key = saved.plan, wanted.key and key is not None
    queries, keys = _sides(inputs, plan)
    grad_query = query.new_empty(query.shape if wanted.query else 0)
    grad_key = keys.x.new_empty(keys.x.shape if wants_key else 0)
    grad_scale = scale.new_empty(query.shape[0] if wanted.scale else 0)
    scale, grad_row, grad_column = (values.contiguous() for values in (scale, *grads))
    column_lse = saved.column_lse
    if key is None:
        column_lse, grad_column = saved.row_lse, grad_row

    key_term = (column_lse, grad_column) if bidirectional or key is None else None
    if wanted.query or wanted.scale:
        fp16_scale = _fp16_scale(query, keys.x, grad_row, grad_column)
        terms = Terms((saved.row_lse, grad_row), key_term, None, fp16_scale)
        run(
            _rows_of_queries(queries, plan), keys, scale, pairs.negatives, terms, grad_query if wanted.query else None,
            grad_scale if wanted.scale else None,
        )  # fmt: skip
    if wants_key:
        # A vector of scales belongs to the queries, which are the columns here: it goes into their weights.
        varies = scale.ndim > 0
        if varies:
            grad_row = grad_row * scale
        fp16_scale = _fp16_scale(query, keys.x, grad_row, grad_column)
        terms = Terms(key_term, (saved.row_lse, grad_row), scale if varies else None, fp16_scale)
        rows = _rows_of_keys(queries, keys, pairs, plan)
        run(rows, queries, scale.new_ones(()) if varies else scale, pairs.negatives, terms, grad_key, None)
    return grad_query, grad_key, grad_scale


def _fp16_scale(query: Tensor, key: Tensor, *weights: Tensor) -> Tensor:
    """Power of 2 that brings the pair weights of fp16 products, which are fp16 too, into its range.

    Products of other dtypes do not read it.
    """
    if query.dtype != torch.float16 or key.dtype != torch.float16:
        return weights[0]
    smallest = torch.finfo(weights[0].dtype).tiny
    largest = torch.cat((*weights, weights[0].new_full((1,), smallest))).abs().amax()
    # A weight has two terms, each at most the largest gradient.
    return torch.where(largest.isfinite(), (14 - largest.log2().ceil()).clamp(-126, 126).exp2(), 1.0)


def count_above(run: RunForward, inputs: Inputs, threshold: Tensor) -> Tensor:
    """Number of kept keys of each query with not (<q_i, k_j> <= threshold_i): NaN counts as above; int64 [N]."""
    plan = make_plan(inputs.query, inputs.key, inputs.pairs, False)
    queries, keys = _sides(inputs, plan)
    count, one = torch.empty_like(plan.query_order), threshold.new_ones(())
    run(_rows_of_queries(queries, plan), keys, one, inputs.pairs.negatives, count, threshold.contiguous())
    return count
