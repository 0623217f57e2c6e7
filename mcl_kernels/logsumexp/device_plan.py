"""The plan of the implementations for GPUs: by `csrc/cuda/plan.cuh` where that is built, else by torch's sorts.

Of a small batch planning is a large part of the step, and nearly all of that are launches: here it is one. Each row is
looked for in every tile of 1,024: beyond `MOST_ROWS` torch's sorts do less. That number is not measured. With more than
a tile a side its blocks wait for one another, and for room on the GPU for all of them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mcl_kernels.backends import cuda
from mcl_kernels.logsumexp import pairs as plan
from mcl_kernels.logsumexp.pairs import NEGATIVES, Pairs, Plan

TILE = 1024  # PLAN_TILE of csrc/cuda: rows that a block sorts at a time; of a side with more, each tile is sorted once
MOST_ROWS = 32_768  # of either side


def make_plan(query: Tensor, key: Tensor | None, pairs: Pairs) -> Plan:
    """What `plan.make_plan` returns."""
    n, m = len(query), 0 if key is None else len(key)
    if not _by_kernels(query.device, n, m):
        return plan.make_plan(query, key, pairs)
    labels, key_labels, ids, key_ids = _contiguous(pairs)
    order = torch.empty(n, dtype=torch.int64, device=query.device)
    begin, end, key_order = order.new_empty(n), order.new_empty(n), order.new_empty(m)
    cuda.ops().make_plan(
        order, [labels, ids, key_labels, key_ids], n, m, key is None, NEGATIVES.index(pairs.negatives),
        order, begin, end, None if key is None else key_order, _work_space(order, n, m),
    )  # fmt: skip
    return Plan(order, key_order, begin, end)


def query_ranges(pairs: Pairs, made: Plan) -> tuple[Tensor, Tensor]:
    """Begin and end of the sorted queries that each sorted key meets, int64 [M]."""
    n, m = len(made.query_order), len(made.key_order)
    labels, key_labels, ids, key_ids = _contiguous(pairs)
    if not _by_kernels(made.key_order.device, n, m):
        return plan.key_ranges(made.key_order, key_labels, made.query_order, labels, pairs.negatives)
    begin, end = torch.empty_like(made.key_order), torch.empty_like(made.key_order)
    cuda.ops().make_plan(
        begin, [key_labels, key_ids, labels, ids], m, n, False, NEGATIVES.index(pairs.negatives),
        None, begin, end, None, _work_space(begin, n, m),
    )  # fmt: skip
    return begin, end


def _contiguous(pairs: Pairs) -> list[Tensor | None]:
    return [None if values is None else values.contiguous() for values in pairs[:4]]


@cache
def _is_built(device: torch.device) -> bool:
    return cuda.unavailable_reason(device) is None


def _by_kernels(device: torch.device, n: int, m: int) -> bool:
    return max(n, m) <= MOST_ROWS and _is_built(device)


def _work_space(like: Tensor, n: int, m: int) -> Tensor | None:
    return like.new_empty(3 * (n + m)) if max(n, m) > TILE else None
