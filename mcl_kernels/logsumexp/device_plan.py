"""The plan of the implementations for GPUs.

Made by `csrc/cuda/plan.cuh` if that is built, else for few rows by counting in Triton, else by torch's sorts. Planning
is a large part of the step of a small batch, and nearly all of its time is that of launches: the kernels need one,
sorting a dozen. The kernel in CUDA C++ searches every tile of 1,024 rows for each row: above `MAX_ROWS` torch's sorts
are cheaper (an estimate, not measured). If a side has more than one tile, its blocks wait for one another, and all of
them must fit the GPU at once.

Sorting makes the columns contiguous that a row drops from its range: those of its id, or of its label for "different".
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mcl_kernels.backends import cuda
from mcl_kernels.logsumexp import pairs as torch_plan
from mcl_kernels.logsumexp.pairs import NEGATIVES, Pairs, Plan, Ranges

TILE = 1024  # PLAN_TILE of csrc/cuda: rows that a block sorts at a time
MAX_ROWS = 32_768  # of either side
MAX_COUNTED = 4096  # samples of either side: counting compares all of them


def make_plan(query: Tensor, key: Tensor | None, pairs: Pairs, bidirectional: bool) -> Plan:
    """The plan, as `pairs.make_plan` returns it, with the ranges that GPUs need."""
    if _is_counted(query, key, pairs):
        from mcl_kernels.logsumexp.triton.plan import count_plan

        return count_plan(query, key, _contiguous(pairs), bidirectional)
    plan = _make_order(query, key, pairs)
    key_order = plan.query_order if key is None else plan.key_order
    pairs = pairs.with_ids(query, key)
    of_queries = _with_dropped(plan.query_order, plan.key_begin, plan.key_end, key_order, pairs)
    of_keys = query_ranges(query, key, pairs, plan) if bidirectional and key is not None else (None,) * 4
    return Plan(plan.query_order, plan.key_order, *of_queries, *of_keys)


def _make_order(query: Tensor, key: Tensor | None, pairs: Pairs) -> Plan:
    n, m = query.shape[0], 0 if key is None else key.shape[0]
    if not _runs_on_kernels(query.device, n, m):
        return torch_plan.make_plan(query, key, pairs)
    labels, key_labels, ids, key_ids, negatives, _ = _contiguous(pairs.with_ids(query, key))
    order = torch.empty(n, dtype=torch.int64, device=query.device)
    begin, end, key_order = order.new_empty(n), order.new_empty(n), order.new_empty(m)
    cuda.ops().make_plan(
        order, [labels, ids, key_labels, key_ids], n, m, key is None, NEGATIVES.index(negatives),
        order, begin, end, None if key is None else key_order, _workspace(order, n, m),
    )  # fmt: skip
    return Plan(order, key_order, begin, end)


def query_ranges(query: Tensor, key: Tensor, pairs: Pairs, plan: Plan) -> Ranges:
    """Each sorted key's range of sorted queries."""
    if _is_counted(query, key, pairs):
        from mcl_kernels.logsumexp.triton.plan import count_ranges

        return count_ranges(query, key, _contiguous(pairs))
    n, m = query.shape[0], key.shape[0]
    pairs = _contiguous(pairs.with_ids(query, key))
    labels, key_labels, ids, key_ids, negatives, _ = pairs
    if not _runs_on_kernels(query.device, n, m):
        begin, end = torch_plan.key_ranges(plan.key_order, key_labels, plan.query_order, labels, negatives)
    else:
        begin, end = torch.empty_like(plan.key_order), torch.empty_like(plan.key_order)
        cuda.ops().make_plan(
            begin, [key_labels, key_ids, labels, ids], m, n, False, NEGATIVES.index(negatives),
            None, begin, end, None, _workspace(begin, n, m),
        )  # fmt: skip
    return _with_dropped(plan.key_order, begin, end, plan.query_order, pairs.swapped())


def _with_dropped(order: Tensor, begin: Tensor, end: Tensor, column_order: Tensor, pairs: Pairs) -> Ranges:
    """Ranges with those dropped among them; `pairs` has the rows first, and one side in the self form."""
    if not pairs.drops():
        return Ranges(begin, end, None, None)
    labels, key_labels, ids, key_ids, negatives, _ = _contiguous(pairs)
    values, column_values = (labels, key_labels) if negatives == "different" else (ids, key_ids)
    drop_begin, drop_end = (torch.empty(len(order), dtype=torch.int32, device=order.device) for _ in range(2))
    if _is_built(order.device):
        find_dropped = cuda.ops().find_dropped
    else:
        from mcl_kernels.logsumexp.triton.dropped import find_dropped
    columns = [column_order, values if column_values is None else column_values]
    find_dropped([order, begin, end, values], columns, drop_begin, drop_end)
    return Ranges(begin, end, drop_begin, drop_end)


def _contiguous(pairs: Pairs) -> Pairs:
    labels, key_labels, ids, key_ids = (None if values is None else values.contiguous() for values in pairs[:4])
    return Pairs(labels, key_labels, ids, key_ids, pairs.negatives, pairs.views)


def _is_counted(query: Tensor, key: Tensor | None, pairs: Pairs) -> bool:
    rows = max(query.shape[0], 0 if key is None else key.shape[0])
    return rows <= MAX_COUNTED * max(pairs.views, 1) and not _is_built(query.device)


@cache
def _is_built(device: torch.device) -> bool:
    return cuda.unavailable_reason(device) is None


def _runs_on_kernels(device: torch.device, n: int, m: int) -> bool:
    return max(n, m) <= MAX_ROWS and _is_built(device)


def _workspace(like: Tensor, n: int, m: int) -> Tensor | None:
    return like.new_empty(3 * (n + m)) if max(n, m) > TILE else None
