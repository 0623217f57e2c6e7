"""The operation in plain PyTorch, tile by tile: for every device, with no N x M matrix.

    forward   b_i = m_i + log sum_j exp(s_ij - m_i), m the running maximum of the row (c_j: of the column)
    backward  W_ij = where(keep_ij, gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j), 0)
              dq_i = scale_i sum_j W_ij k_j,  dk_j = sum_i scale_i W_ij q_i,  dscale_i = sum_j W_ij <q_i, k_j>

The self form is the bidirectional one with c = b and gc = gb, of which only the sums over rows are computed. Queries
and keys are visited in the order of the plan: a tile of queries is compared with the keys from the first of its
clusters to the last. Rows with a negative label, which may hold any values, are in no tile.

Cost in products over the kept pairs, rounded up to tiles: 1 forward; backward 2 (self), 3 (otherwise).
Memory beyond inputs and outputs: a few tiles, and fp32 gradients while half-precision ones are summed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mcl_kernels.logsumexp.inputs import Inputs, LseGradients, Saved, Wanted
from mcl_kernels.logsumexp.pairs import Pairs, Plan, kept_pairs, make_plan

# Sizes of a tile: large enough to hide the cost of a PyTorch call, small enough for a core's cache.
ROWS, COLUMNS = 256, 1024


class _Side:
    """Queries or keys in the order of the plan."""

    def __init__(self, x: Tensor, order: Tensor, labels: Tensor | None, ids: Tensor | None, dtype: torch.dtype):
        self.x, self.order, self.dtype = x, order, dtype
        self.labels = None if labels is None else labels[order]
        self.ids = None if ids is None else ids[order]

    def rows(self, tile: slice) -> Tensor:
        return self.x[self.order[tile]].to(self.dtype)


def _sides(inputs: Inputs, plan: Plan) -> tuple[_Side, _Side]:
    """Queries and keys; in the self form they are one."""
    query, key, scale, pairs, _ = inputs
    queries = _Side(query, plan.query_order, pairs.labels, pairs.ids, scale.dtype)
    if key is None:
        return queries, queries
    return queries, _Side(key, plan.key_order, pairs.key_labels, pairs.key_ids, scale.dtype)


class _Tile(NamedTuple):
    rows: slice  # of the sorted queries
    columns: slice  # of the sorted keys
    query: Tensor  # [rows, D]
    key: Tensor  # [columns, D]
    dropped: Tensor | None  # bool [rows, columns], the pairs that are not kept; None: all are kept


def _tiles(plan: Plan, query: _Side, key: _Side, negatives: str) -> Iterator[_Tile]:
    """Tiles that may hold a kept pair, rows in the outer loop."""

    def part(values: Tensor | None, tile: slice) -> Tensor | None:
        return None if values is None else values[tile]

    for rows, first, last, uniform in _row_tiles(plan):
        # Where all rows have all keys of one range, only "different" compares labels within it.
        matched = uniform and negatives != "different"
        row_labels, column_labels = (None, None) if matched else (query.labels, key.labels)
        query_rows = query.rows(rows)
        for start in range(first, last, COLUMNS):
            columns = slice(start, min(start + COLUMNS, last))
            ids, key_ids = part(query.ids, rows), part(key.ids, columns)
            keep = kept_pairs(Pairs(part(row_labels, rows), part(column_labels, columns), ids, key_ids, negatives))
            yield _Tile(rows, columns, query_rows, key.rows(columns), None if keep is None else ~keep)


def _row_tiles(plan: Plan) -> Iterator[tuple[slice, int, int, bool]]:
    """Yields tiles of sorted rows that have keys: the rows, the range of their keys, whether all rows have all of it.

    A tile ends with a cluster if that is possible, so that no row is multiplied with the keys of another cluster.
    """
    begin, end = plan.key_begin.tolist(), plan.key_end.tolist()
    start = next((i for i in range(len(begin)) if begin[i] < end[i]), len(begin))  # rows without keys are first
    while start < len(begin):
        stop = min(start + ROWS, len(begin))
        if stop < len(begin):
            cluster_start = bisect_left(begin, begin[stop], lo=start)
            stop = cluster_start if start < cluster_start else stop
        uniform = begin[start] == begin[stop - 1] and end[start] == end[stop - 1]
        yield slice(start, stop), begin[start], end[stop - 1], uniform
        start = stop


class _OnlineLogSumExp:
    """log sum exp of each row of a matrix that arrives in tiles."""

    def __init__(self, size: int, like: Tensor):
        self.maximum = like.new_full((size,), -math.inf)
        self.total = like.new_zeros(size)

    def update(self, rows: slice, logits: Tensor) -> None:
        maximum = torch.maximum(self.maximum[rows], logits.amax(1))
        shift = self._shift(maximum)
        total = self.total[rows] * (self.maximum[rows] - shift).exp()
        self.total[rows] = total + (logits - shift.unsqueeze(1)).exp().sum(1)
        self.maximum[rows] = maximum

    def result(self, order: Tensor) -> Tensor:
        """Row i of the matrix is row order[i] of the result."""
        return torch.empty_like(self.total).index_copy_(0, order, self._shift(self.maximum) + self.total.log())

    @staticmethod
    def _shift(maximum: Tensor) -> Tensor:
        # An infinite maximum is not subtracted: -inf has to stay -inf, and inf to stay inf.
        return torch.where(maximum.isinf(), torch.zeros_like(maximum), maximum)


def forward(inputs: Inputs) -> Saved:
    """Log-sum-exps and the plan."""
    query, key, scale, pairs, bidirectional = inputs
    plan = make_plan(query, key, pairs)
    rows, columns = _sides(inputs, plan)
    row_scale = _sorted_scale(inputs, plan)

    row_lse = _OnlineLogSumExp(len(rows.order), scale)
    column_lse = _OnlineLogSumExp(len(columns.order) if bidirectional else 0, scale)
    for tile in _tiles(plan, rows, columns, pairs.negatives):
        logits = row_scale[tile.rows] * (tile.query @ tile.key.T)
        if tile.dropped is not None:
            logits.masked_fill_(tile.dropped, -math.inf)
        row_lse.update(tile.rows, logits)
        if bidirectional:
            column_lse.update(tile.columns, logits.T)
    return Saved(row_lse.result(rows.order), column_lse.result(plan.key_order[: len(column_lse.total)]), plan)


def backward(inputs: Inputs, saved: Saved, grads: LseGradients, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and scale; [0] for one that is not wanted (and for the key of the self form)."""
    query, key, scale, pairs, bidirectional = inputs
    rows, columns = _sides(inputs, saved.plan)
    row_scale = _sorted_scale(inputs, saved.plan)
    lse, weight = saved.row_lse[rows.order].unsqueeze(1), grads.row[rows.order].unsqueeze(1)  # [N, 1]
    two_sided = bidirectional or key is None
    if two_sided:
        column_lse, column_weight = (saved.row_lse, grads.row) if key is None else (saved.column_lse, grads.column)
        column_lse, column_weight = column_lse[columns.order], column_weight[columns.order]  # [M]

    wants_key = wanted.key and key is not None
    grad_query = scale.new_zeros(query.shape if wanted.query else 0)
    grad_key = scale.new_zeros(inputs.keys.shape if wants_key else 0)
    grad_scale = scale.new_zeros(len(query) if wanted.scale else 0)
    for tile in _tiles(saved.plan, rows, columns, pairs.negatives):
        products = tile.query @ tile.key.T
        logits = row_scale[tile.rows] * products
        pair_weight = weight[tile.rows] * (logits - lse[tile.rows]).exp()
        if two_sided:
            pair_weight += column_weight[tile.columns] * (logits - column_lse[tile.columns]).exp()
        if tile.dropped is not None:
            pair_weight.masked_fill_(tile.dropped, 0.0)
        # No row occurs twice in a tile, so each sum has one order, that of the tiles.
        if wanted.query:
            grad_query.index_add_(0, rows.order[tile.rows], row_scale[tile.rows] * (pair_weight @ tile.key))
        if wants_key:
            grad_key.index_add_(0, columns.order[tile.columns], pair_weight.T @ (row_scale[tile.rows] * tile.query))
        if wanted.scale:
            grad_scale.index_add_(0, rows.order[tile.rows], (pair_weight * products).sum(1))
    if wanted.scale:
        # In the self form every pair was computed from both its rows, with the weights of both.
        grad_scale = grad_scale * 0.5 if key is None else grad_scale
        grad_scale = grad_scale.sum_to_size(scale.shape)
    return grad_query.to(query.dtype), grad_key.to(inputs.keys.dtype), grad_scale


def _sorted_scale(inputs: Inputs, plan: Plan) -> Tensor:
    """Scale of each sorted query, [N, 1]."""
    return inputs.scale.expand(len(inputs.query))[plan.query_order].unsqueeze(1)


def count_above(inputs: Inputs, threshold: Tensor) -> Tensor:
    """Number of kept keys of each query with not (<q_i, k_j> <= threshold_i): NaN counts as above; int64 [N]."""
    plan = make_plan(inputs.query, inputs.key, inputs.pairs)
    rows, columns = _sides(inputs, plan)
    row_threshold = threshold[plan.query_order].unsqueeze(1)

    count = torch.zeros_like(plan.query_order)
    for tile in _tiles(plan, rows, columns, inputs.pairs.negatives):
        above = ~(tile.query @ tile.key.T <= row_threshold[tile.rows])
        if tile.dropped is not None:
            above &= ~tile.dropped
        count.index_add_(0, rows.order[tile.rows], above.sum(1))
    return count
