"""What the implementations for GPUs have in common: which launches make a forward and a backward pass.

Their kernels own the rows of one side, queries or keys, and meet the other side's as columns: each row is written once,
so sums need no atomics and have one order. What both directions want of the same pairs is two launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mcl_kernels.logsumexp.device_plan import make_plan, query_ranges
from mcl_kernels.logsumexp.pairs import Pairs, Plan


class Side(NamedTuple):
    """Queries or keys."""

    x: Tensor
    order: Tensor  # int64, sorted
    labels: Tensor | None
    ids: Tensor | None


class Rows(NamedTuple):
    """The side whose rows are owned, and the range of the other side's sorted rows that each sorted row meets."""

    side: Side
    begin: Tensor  # int64
    end: Tensor


class Terms(NamedTuple):
    """Of a pair's weight, W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j).

    Both terms, or one of them.
    """

    row: tuple[Tensor, Tensor] | None  # LSE and weight
    column: tuple[Tensor, Tensor] | None
    column_scale: Tensor | None  # of the logits, in place of the rows' scale
    unit: Tensor  # the power of 2 that brings weights into the range of fp16


# run(rows, columns, scale, negatives, result, threshold): the LSE of each row, or what is above its threshold.
RunForward = Callable[[Rows, Side, Tensor, str, Tensor, Tensor | None], None]
# run(rows, columns, scale, negatives, terms, grad_x, grad_scale): the gradients that are wanted.
RunBackward = Callable[[Rows, Side, Tensor, str, Terms, Tensor | None, Tensor | None], None]


def dropped_values(rows: Side, columns: Side, negatives: str) -> tuple[Tensor | None, Tensor | None]:
    """A row drops the columns of its value: among those it meets they are neighbours, since rows are sorted by it."""
    return (rows.labels, columns.labels) if negatives == "different" else (rows.ids, columns.ids)


def compares_ids(rows: Side, negatives: str) -> bool:
    """Whether a row's own sample may be anywhere: under "different" it may have other labels."""
    return negatives == "different" and rows.ids is not None


def _sides(query: Tensor, key: Tensor | None, pairs: Pairs, plan: Plan) -> tuple[Side, Side]:
    labels, key_labels, ids, key_ids = (None if v is None else v.contiguous() for v in pairs[:4])
    queries = Side(query, plan.query_order, labels, ids)
    return queries, queries if key is None else Side(key, plan.key_order, key_labels, key_ids)


def forward(
    run: RunForward, query: Tensor, key: Tensor | None, scale: Tensor, pairs: Pairs, bidirectional: bool
) -> tuple[Tensor, Tensor, Plan]:
    """Row LSE [N], column LSE ([M] where bidirectional, else [0]) and the plan."""
    plan, scale = make_plan(query, key, pairs), scale.contiguous()
    queries, keys = _sides(query, key, pairs, plan)
    row_lse, column_lse = scale.new_empty(len(query)), scale.new_empty(len(keys.x) if bidirectional else 0)
    run(Rows(queries, plan.key_begin, plan.key_end), keys, scale, pairs.negatives, row_lse, None)
    if bidirectional:
        run(Rows(keys, *query_ranges(pairs, plan)), queries, scale, pairs.negatives, column_lse, None)
    return row_lse, column_lse, plan


def backward(
    run: RunBackward,
    grad_row: Tensor,  # [N], the gradient of the row LSE
    grad_column: Tensor,  # [M] where bidirectional, else [0]
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    pairs: Pairs,
    row_lse: Tensor,
    column_lse: Tensor,
    plan: Plan,
    bidirectional: bool,
    needs_grad: tuple[bool, bool, bool],  # of query, key, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and scale; [0] for one that is not needed (and for the key of the self form)."""
    needs_query, needs_key, needs_scale = needs_grad
    needs_key = needs_key and key is not None
    queries, keys = _sides(query, key, pairs, plan)
    grad_query = query.new_empty(query.shape if needs_query else 0)
    grad_key = keys.x.new_empty(keys.x.shape if needs_key else 0)
    grad_scale = scale.new_empty(len(query) if needs_scale else 0)
    scale, grad_row, grad_column = (values.contiguous() for values in (scale, grad_row, grad_column))
    if key is None:
        column_lse, grad_column = row_lse, grad_row

    both = bidirectional or key is None
    of_keys = (column_lse, grad_column) if both else None
    if needs_query or needs_scale:
        unit = _unit(query, keys.x, grad_row, grad_column)
        terms = Terms((row_lse, grad_row), of_keys, None, unit)
        run(
            Rows(queries, plan.key_begin, plan.key_end), keys, scale, pairs.negatives, terms,
            grad_query if needs_query else None, grad_scale if needs_scale else None,
        )  # fmt: skip
    if needs_key:
        # A scale of each query differs from column to column of the keys' rows: there it is a part of the weights.
        varies = scale.ndim > 0
        if varies:
            grad_row = grad_row * scale
        unit = _unit(query, keys.x, grad_row, grad_column)
        terms = Terms(of_keys, (row_lse, grad_row), scale if varies else None, unit)
        rows, one = Rows(keys, *query_ranges(pairs, plan)), scale.new_ones(())
        run(rows, queries, one if varies else scale, pairs.negatives, terms, grad_key, None)
    if needs_scale:
        grad_scale = grad_scale.sum_to_size(scale.shape)
        if key is None:
            grad_scale = grad_scale / 2  # every pair was met from both its rows, with the terms of both
    return grad_query, grad_key, grad_scale


def _unit(query: Tensor, key: Tensor, *weights: Tensor) -> Tensor:
    """The power of 2 that brings the pair weights of fp16 products, which are fp16 too, into its range.

    Products of other dtypes do not read it.
    """
    if query.dtype != torch.float16 or key.dtype != torch.float16:
        return weights[0]
    smallest = torch.finfo(weights[0].dtype).tiny
    largest = torch.cat((*weights, weights[0].new_full((1,), smallest))).abs().amax()
    # Of two terms, each at most the largest gradient.
    return torch.where(largest.isfinite(), (14 - largest.log2().ceil()).clamp(-126, 126).exp2(), 1.0)


def count_above(
    run: RunForward,
    query: Tensor,
    key: Tensor,
    threshold: Tensor,  # [N]
    pairs: Pairs,
) -> Tensor:
    """For each query, how many kept keys have not <q_i, k_j> <= threshold_i; int64 [N]."""
    plan = make_plan(query, key, pairs)
    queries, keys = _sides(query, key, pairs, plan)
    count = torch.empty_like(plan.query_order)
    rows = Rows(queries, plan.key_begin, plan.key_end)
    run(rows, keys, threshold.new_ones(()), pairs.negatives, count, threshold.contiguous())
    return count
