"""The operation in plain PyTorch, tile by tile: for every device, with no N x M matrix.

    forward   b_i = m_i + log sum_j exp(s_ij - m_i), m the running maximum of the row (c_j: of the column)
    backward  W_ij = where(keep_ij, gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j), 0)
              dq_i = scale_i sum_j W_ij k_j,  dk_j = sum_i scale_i W_ij q_i,  dscale_i = sum_j W_ij <q_i, k_j>

The self form is the bidirectional one with c = b and gc = gb, read from its rows alone. Rows and keys are
visited in the order of the plan: a tile of rows meets the keys from the first of its clusters to the last. Rows with
a negative label, which may hold anything, are in no tile.

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

from mcl_kernels.logsumexp.pairs import Pairs, Plan, kept_pairs, make_plan

# Sizes of a tile: enough work to hide the cost of a PyTorch call, small enough to stay in a core's cache.
ROWS, COLUMNS = 256, 1024


class _Side:
    """Queries or keys in the order of the plan."""

    def __init__(self, x: Tensor, order: Tensor, labels: Tensor | None, ids: Tensor | None, dtype: torch.dtype):
        self.x, self.order, self.dtype = x, order, dtype
        self.labels = None if labels is None else labels[order]
        self.ids = None if ids is None else ids[order]

    def rows(self, tile: slice) -> Tensor:
        return self.x[self.order[tile]].to(self.dtype)


class _Tile(NamedTuple):
    rows: slice  # of the sorted queries
    columns: slice  # of the sorted keys
    query: Tensor  # [rows, D]
    key: Tensor  # [columns, D]
    dropped: Tensor | None  # bool [rows, columns], the pairs that are not kept; None: all are


def _tiles(plan: Plan, query: _Side, key: _Side, negatives: str) -> Iterator[_Tile]:
    """Every tile that may hold a kept pair, rows in the outer loop."""

    def part(values: Tensor | None, tile: slice) -> Tensor | None:
        return None if values is None else values[tile]

    for rows, first, last, uniform in _row_tiles(plan):
        # Rows that meet the same keys, all of them: only "different" has to look at labels within the range.
        matched = uniform and negatives != "different"
        row_labels, column_labels = (None, None) if matched else (query.labels, key.labels)
        query_rows = query.rows(rows)
        for start in range(first, last, COLUMNS):
            columns = slice(start, min(start + COLUMNS, last))
            ids, key_ids = part(query.ids, rows), part(key.ids, columns)
            keep = kept_pairs(Pairs(part(row_labels, rows), part(column_labels, columns), ids, key_ids, negatives))
            yield _Tile(rows, columns, query_rows, key.rows(columns), None if keep is None else ~keep)


def _row_tiles(plan: Plan) -> Iterator[tuple[slice, int, int, bool]]:
    """Tiles of sorted rows that meet any key: the rows, their range of keys, whether all of them meet all of it.

    A tile ends with a cluster where it can, so that no row is multiplied with the keys of its neighbour's.
    """
    begin, end = plan.key_begin.tolist(), plan.key_end.tolist()
    start = next((i for i in range(len(begin)) if begin[i] < end[i]), len(begin))  # rows that meet nothing are first
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


def forward(
    query: Tensor,  # [N, D]
    key: Tensor | None,  # [M, D]; None: the queries
    scale: Tensor,  # [] or [N], fp32 or fp64: the dtype of the logits
    pairs: Pairs,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Plan]:
    """The row LSE [N], the column LSE ([M] where bidirectional, else [0]) and the plan."""
    plan = make_plan(query, key, pairs)
    rows = _Side(query, plan.query_order, pairs.labels, pairs.ids, scale.dtype)
    columns = rows if key is None else _Side(key, plan.key_order, pairs.key_labels, pairs.key_ids, scale.dtype)
    row_scale = scale.expand(len(query))[plan.query_order].unsqueeze(1)  # [N, 1]

    row_lse = _OnlineLogSumExp(len(rows.order), scale)
    column_lse = _OnlineLogSumExp(len(columns.order) if bidirectional else 0, scale)
    for tile in _tiles(plan, rows, columns, pairs.negatives):
        logits = row_scale[tile.rows] * (tile.query @ tile.key.T)
        if tile.dropped is not None:
            logits.masked_fill_(tile.dropped, -math.inf)
        row_lse.update(tile.rows, logits)
        if bidirectional:
            column_lse.update(tile.columns, logits.T)
    return row_lse.result(rows.order), column_lse.result(plan.key_order[: len(column_lse.total)]), plan


def backward(
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
    rows = _Side(query, plan.query_order, pairs.labels, pairs.ids, scale.dtype)
    columns = rows if key is None else _Side(key, plan.key_order, pairs.key_labels, pairs.key_ids, scale.dtype)
    row_scale = scale.expand(len(query))[plan.query_order].unsqueeze(1)  # [N, 1]
    lse, weight = row_lse[rows.order].unsqueeze(1), grad_row[rows.order].unsqueeze(1)  # [N, 1]
    two_sided = bidirectional or key is None
    if two_sided:
        column_lse, column_weight = (row_lse, grad_row) if key is None else (column_lse, grad_column)
        column_lse, column_weight = column_lse[columns.order], column_weight[columns.order]  # [M]

    needs_query, needs_key, needs_scale = needs_grad
    needs_key = needs_key and key is not None
    grad_query = scale.new_zeros(query.shape if needs_query else 0)
    grad_key = scale.new_zeros(key.shape if key is not None and needs_key else 0)
    grad_scale = scale.new_zeros(len(query) if needs_scale else 0)
    for tile in _tiles(plan, rows, columns, pairs.negatives):
        products = tile.query @ tile.key.T
        logits = row_scale[tile.rows] * products
        pair_weight = weight[tile.rows] * (logits - lse[tile.rows]).exp()
        if two_sided:
            pair_weight += column_weight[tile.columns] * (logits - column_lse[tile.columns]).exp()
        if tile.dropped is not None:
            pair_weight.masked_fill_(tile.dropped, 0.0)
        # No row occurs twice in a tile, so each sum has one order, that of the tiles.
        if needs_query:
            grad_query.index_add_(0, rows.order[tile.rows], row_scale[tile.rows] * (pair_weight @ tile.key))
        if needs_key:
            grad_key.index_add_(0, columns.order[tile.columns], pair_weight.T @ (row_scale[tile.rows] * tile.query))
        if needs_scale:
            grad_scale.index_add_(0, rows.order[tile.rows], (pair_weight * products).sum(1))
    if needs_scale:
        # In the self form every pair was met from both its rows, with the weights of both.
        grad_scale = grad_scale * 0.5 if key is None else grad_scale
        grad_scale = grad_scale.sum_to_size(scale.shape)
    return grad_query.to(query.dtype), grad_key.to(query.dtype if key is None else key.dtype), grad_scale


def count_above(
    query: Tensor,
    key: Tensor,
    threshold: Tensor,  # [N]
    pairs: Pairs,
) -> Tensor:
    """For each query, how many kept keys have not <q_i, k_j> <= threshold_i; int64 [N]."""
    plan = make_plan(query, key, pairs)
    rows = _Side(query, plan.query_order, pairs.labels, pairs.ids, threshold.dtype)
    columns = _Side(key, plan.key_order, pairs.key_labels, pairs.key_ids, threshold.dtype)
    row_threshold = threshold[plan.query_order].unsqueeze(1)

    count = torch.zeros_like(plan.query_order)
    for tile in _tiles(plan, rows, columns, pairs.negatives):
        above = ~(tile.query @ tile.key.T <= row_threshold[tile.rows])
        if tile.dropped is not None:
            above &= ~tile.dropped
        count.index_add_(0, rows.order[tile.rows], above.sum(1))
    return count
