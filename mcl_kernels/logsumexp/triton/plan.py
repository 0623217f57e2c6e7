"""The kernel that makes the plan of few rows by counting, and its launchers.

    rank_i = #{j: (label_j, id_j, j) before (label_i, id_i, i)}, and begin and end of each range by the same comparisons

Cost: n (n + m) comparisons of integers in one launch, where sorting takes a dozen launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcl_kernels.backends.triton import compute_capability, current_device
from mcl_kernels.backends.triton_launch import launch
from mcl_kernels.logsumexp.pairs import Pairs, Plan, Ranges

COLUMNS = 128  # of a tile
ROWS, INTERPRETED_ROWS = 8, 128  # few, so that 1,024 rows fill a GPU; the interpreter's time is that of its programs


class PlanSide(NamedTuple):
    """Labels and ids of the samples of a side, and what is written of its rows in sorted order."""

    labels: Any  # int64 [samples], or None
    ids: Any  # int64 [samples], or None: their indices
    order: Any  # int64 [rows], or None: it is known already
    begin: Any  # int64 [rows], or None: only the order is wanted
    end: Any
    drop_begin: Any  # int32 [rows], or None: no row drops any
    drop_end: Any


class Counts(NamedTuple):
    """Counts of the columns of each row that a tile of columns adds to."""

    before: Any  # sorted before the row, if they are of its own side
    begin: Any  # sorted before its range
    end: Any  # sorted before the end of its range
    drop_begin: Any  # in its range, sorted before those that it drops
    drop_end: Any


@triton.jit
def load_group(labels, sample, valid, NEGATIVES: tl.constexpr):
    """Returns the first sort key: -1 where nothing matches, then the label where it matters."""
    group = tl.zeros(sample.shape, tl.int64)
    if labels is not None:
        group = tl.maximum(tl.load(labels + sample, mask=valid, other=0), -1)
        if NEGATIVES == "all":
            group = tl.minimum(group, 0)
    return group


@triton.jit
def load_id(ids, sample, valid):
    """Returns the second sort key."""
    return tl.load(ids + sample, mask=valid, other=0) if ids is not None else sample.to(tl.int64)


@triton.jit
def count_columns(group, own_id, sample, side, n, NEGATIVES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the Counts of the n samples of a side."""
    group, own_id, sample = group[:, None], own_id[:, None], sample[:, None]
    zeros = tl.zeros((ROWS, COLUMNS), tl.int32)
    before, begin, end, drop_begin, drop_end = zeros, zeros, zeros, zeros, zeros
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        valid = column < n
        column_group = load_group(side.labels, column, valid, NEGATIVES)[None, :]
        column_id = load_id(side.ids, column, valid)[None, :]
        valid, column = valid[None, :], column[None, :]
        smaller, equal = valid & (column_group < group), valid & (column_group == group)
        before += (smaller | (equal & ((column_id < own_id) | ((column_id == own_id) & (column < sample))))).to(
            tl.int32
        )
        if NEGATIVES == "same":
            in_range = equal & (group >= 0)
            begin += smaller.to(tl.int32)
        else:
            in_range = valid & (column_group >= 0) & (group >= 0)
            begin += (valid & (column_group < 0) & (group >= 0)).to(tl.int32)
        end += in_range.to(tl.int32)
        if NEGATIVES == "different":
            drop_begin += (in_range & smaller).to(tl.int32)
            drop_end += (in_range & equal).to(tl.int32)
        else:
            drop_begin += (in_range & (column_id < own_id)).to(tl.int32)
            drop_end += (in_range & (column_id == own_id)).to(tl.int32)
    begin, drop_begin = tl.sum(begin, 1), tl.sum(drop_begin, 1)
    drop_begin += begin
    return Counts(tl.sum(before, 1), begin, begin + tl.sum(end, 1), drop_begin, drop_begin + tl.sum(drop_end, 1))


@triton.jit
def plan_rows(
    tile, own, n, other, m, IS_SELF: tl.constexpr, VIEWS: tl.constexpr, NEGATIVES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores the plan of ROWS samples of a side: their VIEWS rows are neighbours in sorted order."""
    sample = tile * ROWS + tl.arange(0, ROWS)
    valid = sample < n
    group, own_id = load_group(own.labels, sample, valid, NEGATIVES), load_id(own.ids, sample, valid)
    counts = count_columns(group, own_id, sample, own, n, NEGATIVES, ROWS, COLUMNS)
    first = counts.before.to(tl.int64) * VIEWS
    if own.begin is not None:
        if not IS_SELF:
            counts = count_columns(group, own_id, sample, other, m, NEGATIVES, ROWS, COLUMNS)
    for view in tl.static_range(VIEWS):
        if own.order is not None:
            tl.store(own.order + first + view, (view * n + sample).to(tl.int64), mask=valid)
        if own.begin is not None:
            tl.store(own.begin + first + view, (counts.begin * VIEWS).to(tl.int64), mask=valid)
            tl.store(own.end + first + view, (counts.end * VIEWS).to(tl.int64), mask=valid)
        if own.drop_begin is not None:
            tl.store(own.drop_begin + first + view, counts.drop_begin * VIEWS, mask=valid)
            tl.store(own.drop_end + first + view, counts.drop_end * VIEWS, mask=valid)


@triton.jit(do_not_specialize=["n", "m"])
def plan_kernel(
    own,  # PlanSide of n samples
    other,  # PlanSide of m samples, the same in the self form
    n, m, tiles,
    IS_SELF: tl.constexpr, VIEWS: tl.constexpr, NEGATIVES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Plans the rows of `own` by the first `tiles` programs, those of `other` by the others."""
    tile = tl.program_id(0)
    if tile < tiles:
        plan_rows(tile, own, n, other, m, IS_SELF, VIEWS, NEGATIVES, ROWS, COLUMNS)
    elif not IS_SELF:
        plan_rows(tile - tiles, other, m, own, n, IS_SELF, VIEWS, NEGATIVES, ROWS, COLUMNS)


def count_plan(query: Tensor, key: Tensor | None, pairs: Pairs, bidirectional: bool) -> Plan:
    """The plan, with the ranges of the keys in a bidirectional call."""
    labels, key_labels, ids, key_ids, *_ = pairs
    queries = _empty_side(query, labels, ids, pairs.drops())
    if key is None:
        _plan(queries, query.shape[0], None, 0, pairs)
        return Plan(queries.order, query.new_empty(0, dtype=torch.int64), *queries[3:])
    keys = _empty_side(key, key_labels, key_ids, pairs.drops())
    if not bidirectional:
        keys = PlanSide(*keys[:3], None, None, None, None)
    _plan(queries, query.shape[0], keys, key.shape[0], pairs)
    return Plan(queries.order, keys.order, *queries[3:], *keys[3:])


def count_ranges(query: Tensor, key: Tensor, pairs: Pairs) -> Ranges:
    """Each sorted key's range of sorted queries."""
    labels, key_labels, ids, key_ids, *_ = pairs
    keys = _empty_side(key, key_labels, key_ids, pairs.drops())
    queries = PlanSide(labels, ids, None, None, None, None, None)
    _plan(keys._replace(order=None), key.shape[0], queries, query.shape[0], pairs, plans_both=False)
    return Ranges(*keys[3:])


def _empty_side(x: Tensor, labels: Tensor | None, ids: Tensor | None, drops: bool) -> PlanSide:
    n, device = x.shape[0], x.device
    order, begin, end = (torch.empty(n, dtype=torch.int64, device=device) for _ in range(3))
    drop_begin, drop_end = (torch.empty(n, dtype=torch.int32, device=device) if drops else None for _ in range(2))
    return PlanSide(labels, ids, order, begin, end, drop_begin, drop_end)


def _plan(own: PlanSide, n: int, other: PlanSide | None, m: int, pairs: Pairs, *, plans_both: bool = True) -> None:
    views = max(pairs.views, 1)
    n, m = n // views, m // views
    rows = INTERPRETED_ROWS if compute_capability(own.begin.device) is None else ROWS
    tiles = -(-n // rows)
    grid = tiles + (-(-m // rows) if plans_both else 0)
    if grid:
        with current_device(own.begin):
            launch(
                plan_kernel, (grid,), own, own if other is None else other, n, m, tiles,
                IS_SELF=other is None, VIEWS=views, NEGATIVES=pairs.negatives, ROWS=rows, COLUMNS=COLUMNS, num_warps=4,
            )  # fmt: skip
