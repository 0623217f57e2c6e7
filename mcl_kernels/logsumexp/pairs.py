"""Kept pairs, their number, and the order in which the fused implementations visit them.

    keep_ij = match(y_i, y_j) and u_i != u_j        y: pseudo label, u: sample id

Sorted by (label, id), the kept pairs of `negatives="same"` are blocks on a diagonal, so an implementation that visits
the sorted rows computes only pairs of one cluster. Only `kept_pairs` is N x M, and no size depends on the number of
clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEGATIVES = ("same", "different", "all")


class Pairs(NamedTuple):
    """Labels y and ids u, which decide the kept pairs: int64, None on both sides or on neither.

    In the self form, where the keys are the queries, key_labels and key_ids are None.

    Default ids are not stored: with V `views` row i of either side has the id i mod (its rows / V), its index in a
    batch that is there V times, one copy after the other. Then ids and key_ids are None.
    """

    labels: Tensor | None  # [N]
    key_labels: Tensor | None  # [M]
    ids: Tensor | None  # [N]
    key_ids: Tensor | None  # [M]
    negatives: str
    views: int = 0  # 0: ids are as given, or None on both sides: nothing is excluded

    def swapped(self) -> Pairs:
        """Pairs with queries and keys exchanged."""
        return Pairs(self.key_labels, self.labels, self.key_ids, self.ids, self.negatives, self.views)

    def with_default_ids(self) -> Pairs:
        """Pairs with the index of a row as its id, where no ids are given."""
        return Pairs(self.labels, self.key_labels, None, None, self.negatives, views=1)

    def with_ids(self, query: Tensor, key: Tensor | None) -> Pairs:
        """Pairs with default ids stored, for queries and keys of these lengths."""
        if not self.views:
            return self
        ids = _default_ids(query, self.views)
        if key is None:
            return Pairs(self.labels, None, ids, None, self.negatives)
        key_ids = ids if key.shape[0] == query.shape[0] else _default_ids(key, self.views)
        return Pairs(self.labels, self.key_labels, ids, key_ids, self.negatives)

    def drops(self) -> bool:
        """Returns whether a query may drop some of the keys of its range: equal labels, or the keys of its sample."""
        return self.negatives == "different" or self.ids is not None or self.views > 0

    def repeated(self, times: int) -> Pairs:
        """Pairs of a batch that holds every row `times` times, one copy of the batch after the other."""
        labels, key_labels, ids, key_ids, negatives, views = self
        return Pairs(
            repeat(labels, times), repeat(key_labels, times), repeat(ids, times), repeat(key_ids, times), negatives,
            times * views,
        )  # fmt: skip


def repeat(values: Tensor | None, times: int) -> Tensor | None:
    """Values of a batch that holds every row `times` times, one copy of the batch after the other."""
    return values if values is None or times == 1 else torch.cat((values,) * times)


def _default_ids(rows: Tensor, views: int) -> Tensor:
    ids = repeat(torch.arange(rows.shape[0] // views, device=rows.device), views)
    assert ids is not None
    return ids


class Plan(NamedTuple):
    """The visiting order: the kept keys of sorted query i are among the sorted keys key_begin[i] .. key_end[i] - 1.

    On GPUs it also has those among them that the query drops, where queries drop any, and in a bidirectional call the
    same of each sorted key; None where it does not.
    """

    query_order: Tensor  # int64 [N], the queries by (label, id)
    key_order: Tensor  # int64 [M], the keys by (label, id); [0] in the self form, where keys are queries
    key_begin: Tensor  # int64 [N]
    key_end: Tensor  # int64 [N], equal to key_begin for a query without keys
    key_drop_begin: Tensor | None = None  # int32 [N]
    key_drop_end: Tensor | None = None
    query_begin: Tensor | None = None  # int64 [M]
    query_end: Tensor | None = None
    query_drop_begin: Tensor | None = None  # int32 [M]
    query_drop_end: Tensor | None = None


class Ranges(NamedTuple):
    """For each sorted row of a side its range of the other side's sorted rows, its columns."""

    begin: Tensor  # int64 [N]
    end: Tensor
    drop_begin: Tensor | None  # int32 [N], those among them that the row drops; None: no row drops any
    drop_end: Tensor | None


def make_plan(query: Tensor, key: Tensor | None, pairs: Pairs) -> Plan:
    """Sorts both sides and finds the range of keys of each query, without a host synchronisation.

    With labels and ids under "same" these are 12 operators in the self form and 18 otherwise, 2 and 4 of them sorts.
    """
    labels, key_labels, ids, key_ids, negatives, views = pairs
    query_order = _visiting_order(query, labels, ids, negatives, views)
    if key is None:
        key_begin, key_end = key_ranges(query_order, labels, query_order, labels, negatives)
        return Plan(query_order, query_order.new_empty(0), key_begin, key_end)
    key_order = _visiting_order(key, key_labels, key_ids, negatives, views)
    return Plan(query_order, key_order, *key_ranges(query_order, labels, key_order, key_labels, negatives))


def key_ranges(
    query_order: Tensor, labels: Tensor | None, key_order: Tensor, key_labels: Tensor | None, negatives: str
) -> tuple[Tensor, Tensor]:
    """Begin and end of each sorted query's range of sorted keys; with the sides exchanged, of each key's queries."""
    if labels is None or key_labels is None:
        return torch.zeros_like(query_order), torch.full_like(query_order, key_order.shape[0])
    row_group = _matching_group(labels, negatives)[query_order]
    same_side = labels is key_labels and query_order is key_order
    column_group = row_group if same_side else _matching_group(key_labels, negatives)[key_order]
    # "different" and "all" range over every key with a valid label, "same" over the query's own group.
    first = row_group if negatives == "same" else row_group.clamp(max=0)
    last = row_group if negatives == "same" else torch.full_like(row_group, torch.iinfo(torch.int64).max)
    begin = torch.searchsorted(column_group, first)
    return begin, torch.where(row_group < 0, begin, torch.searchsorted(column_group, last, right=True))


def _visiting_order(x: Tensor, labels: Tensor | None, ids: Tensor | None, negatives: str, views: int) -> Tensor:
    n, group = x.shape[0], None if labels is None else _matching_group(labels, negatives)
    if views <= 1:  # default ids are those of a stable order by label
        return _lexicographic_order(n, x.device, group, ids)
    samples = n // views
    order = _lexicographic_order(samples, x.device, None if group is None else group[:samples])
    return (order.unsqueeze(1) + torch.arange(0, n, samples or 1, device=x.device)[:views]).flatten()


def _matching_group(labels: Tensor, negatives: str) -> Tensor:
    """First sort key of the rows, before their id: -1 where nothing matches, then the label where it matters."""
    return labels.clamp(min=-1, max=0) if negatives == "all" else labels.clamp(min=-1)


def _lexicographic_order(size: int, device: torch.device, *columns: Tensor | None) -> Tensor:
    """The stable order of `size` rows by the first column, then the second, ...; None is a constant column."""
    order = None
    for column in reversed(columns):
        if column is not None:
            order = column.argsort(stable=True) if order is None else order[column[order].argsort(stable=True)]
    return torch.arange(size, device=device) if order is None else order


def kept_pairs(pairs: Pairs) -> Tensor | None:
    """The mask keep_ij, bool [N, M]; None without labels and ids: every pair is kept."""
    labels, key_labels, ids, key_ids, negatives, _ = pairs
    keep = None
    if labels is not None and key_labels is not None:
        rows, columns = labels.unsqueeze(1), key_labels.unsqueeze(0)
        keep = (rows >= 0) & (columns >= 0)
        if negatives == "same":
            keep &= rows == columns
        elif negatives == "different":
            keep &= rows != columns
    if ids is not None and key_ids is not None:
        distinct = ids.unsqueeze(1) != key_ids.unsqueeze(0)
        keep = distinct if keep is None else keep & distinct
    return keep


def count_kept(query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
    """Row sums of `kept_pairs`, int64 [N], in O((N + M) log(N + M)).

    Only the length and the device of `query` [N, ...] and `key` [M, ...] are used.
    """
    labels, key_labels, ids, key_ids, negatives, _ = pairs.with_ids(query, key)
    n = query.shape[0]
    matchable = torch.ones(key.shape[0], dtype=torch.int64, device=key.device)
    label, sample = [], []
    if labels is not None and key_labels is not None:
        matchable = (key_labels >= 0).long()
        label = [torch.cat((labels, key_labels))]
    if ids is not None and key_ids is not None:
        sample = [torch.cat((ids, key_ids))]

    matched = matchable.sum().expand(n)
    if negatives == "same" and label:
        matched = _count_equal(n, label, matchable)
    elif negatives == "different":
        matched = matched - _count_equal(n, label, matchable)
    if sample:
        # Matched keys of the query's own sample are not negatives.
        if negatives == "all":
            own = _count_equal(n, sample, matchable)
        else:
            own = _count_equal(n, label + sample, matchable)
            if negatives == "different":
                own = _count_equal(n, sample, matchable) - own
        matched = matched - own
    return matched.clone() if labels is None else matched.masked_fill(labels < 0, 0)


def _count_equal(n: int, columns: list[Tensor], weight: Tensor) -> Tensor:
    """For each of the first n rows, the total weight of the later rows that agree with it in every column."""
    order = _lexicographic_order(columns[0].shape[0], columns[0].device, *columns)
    starts = torch.zeros_like(order)
    for column in columns:
        ordered = column[order]
        starts[1:] |= (ordered[1:] != ordered[:-1]).long()
    group = torch.empty_like(order).scatter_(0, order, starts.cumsum(0))
    totals = torch.zeros_like(order).index_add_(0, group[n:], weight)
    return totals[group[:n]]
