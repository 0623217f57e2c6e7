"""Exchanges the rows of a batch that is spread over ranks, so that each anchor and its keys are on one rank.

Every rank holds a shard of the batch. There are two exchanges:

* "gather": every rank receives all keys, and compares its own anchors with them.
* "cluster": the rows of a cluster go to the ranks that compute it (`placement`). If one rank computes the cluster, the
  samples are compared with each other there. If it is cut into blocks, each owner receives some of the anchors and all
  of the keys.

Labels and ids travel with their rows. Gradients return the way the rows came (`transport`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels.distributed.cost_model import plan_exchange
from mcl_kernels.distributed.group import Ranks, all_gather
from mcl_kernels.distributed.placement import bucket_count, label_buckets
from mcl_kernels.distributed.routes import BucketOwners, Copies, Route, make_routes, rows_per_rank
from mcl_kernels.distributed.transport import gather_tensors, transport
from mcl_kernels.logsumexp.pairs import Pairs


class LabelledRows(NamedTuple):
    """Rows that travel together: anchors, keys, or samples that are both."""

    columns: tuple[Tensor, ...]  # [N, D] or [N] each, floating point
    labels: Tensor | None  # int64 [N]
    ids: Tensor | None  # int64 [N]

    @property
    def size(self) -> int:
        return len(self.columns[0])

    @property
    def device(self) -> torch.device:
        return self.columns[0].device

    def tensors(self) -> list[Tensor]:
        return [*self.columns, *(x for x in (self.labels, self.ids) if x is not None)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> LabelledRows:
        """Other rows, whose `tensors()` are these."""
        remaining = iter(tensors)
        columns = tuple(next(remaining) for _ in self.columns)
        labels, ids = (None if x is None else next(remaining) for x in (self.labels, self.ids))
        return LabelledRows(columns, labels, ids)

    def pairs(self, negatives: str) -> Pairs:
        """Pairs of these samples with each other."""
        return Pairs(self.labels, self.labels, self.ids, self.ids, negatives)

    def take(self, index: Tensor) -> LabelledRows:
        return self.with_tensors([x.index_select(0, index) for x in self.tensors()])


class Comparison(NamedTuple):
    """Anchors and the keys that they are compared with."""

    anchors: LabelledRows
    keys: LabelledRows

    def pairs(self, negatives: str) -> Pairs:
        return Pairs(self.anchors.labels, self.keys.labels, self.anchors.ids, self.keys.ids, negatives)


class Share(NamedTuple):
    """The part that this rank computes of a batch of samples that are anchors and keys at once."""

    complete: LabelledRows | None  # samples of the clusters that this rank computes alone, compared with each other
    blocks: Comparison | None  # blocks of anchors of other clusters, with all keys
    total: int  # samples of all ranks


def share_samples(samples: LabelledRows, loss: str, exchange: str, ranks: Ranks) -> Share:
    """Sends the samples of this rank to where they are compared, and receives the share of this rank."""
    placement = _place([samples], loss, exchange, ranks)
    if placement is None:
        keys, total = _gather_keys(samples, samples, ranks)
        return Share(None, Comparison(samples, keys), total)
    owners, total = placement
    bucket = _buckets(samples, ranks)
    home = owners.home(bucket, ranks.rank)
    complete = (owners.blocks[bucket] <= 1).nonzero().squeeze(1)
    in_blocks, anchor_counts = _anchors_first(owners.copies(bucket, min_owners=2), home, ranks)
    to_home = Copies(complete, home[complete])
    (complete_route, block_route), (anchors_received,) = make_routes([to_home, in_blocks], [anchor_counts], ranks)
    if not owners.any_cut:
        (complete_samples,) = _send([(complete_route, samples)], ranks)
        return Share(complete_samples, None, total)
    complete_samples, keys = _send([(complete_route, samples), (block_route, samples)], ranks)
    anchors = keys.take(_leading_rows(block_route.received, anchors_received).to(keys.device))
    return Share(complete_samples, Comparison(anchors, keys), total)


def share_queries(queries: LabelledRows, keys: LabelledRows, exchange: str, ranks: Ranks) -> tuple[Comparison, int]:
    """Sends queries and keys to where they are compared; returns those received, and the number of all queries."""
    placement = _place([queries, keys], "masked_info_nce", exchange, ranks)
    if placement is None:
        all_keys, total = _gather_keys(queries, keys, ranks)
        return Comparison(queries, all_keys), total
    owners, total = placement
    home = owners.home(_buckets(queries, ranks), ranks.rank)
    query_copies = Copies(torch.arange(len(home), device=home.device), home)
    key_copies = owners.copies(_buckets(keys, ranks), min_owners=1)
    (query_route, key_route), _ = make_routes([query_copies, key_copies], [], ranks)
    return Comparison(*_send([(query_route, queries), (key_route, keys)], ranks)), total


def gather_vectors(vectors: Sequence[Tensor], ranks: Ranks) -> tuple[list[Tensor], slice]:
    """Concatenates the vectors of all ranks; returns them and the slice that is this rank's."""
    sizes = [n for (n,) in _counts_of_all_ranks([len(vectors[0])], ranks, vectors[0].device)]
    begin = sum(sizes[: ranks.rank])
    return gather_tensors(vectors, sizes, ranks), slice(begin, begin + len(vectors[0]))


def _place(sides: list[LabelledRows], loss: str, exchange: str, ranks: Ranks) -> tuple[BucketOwners, int] | None:
    """Owners of each bucket and the number of all anchors; None if the keys are to be gathered.

    `sides` are the anchors and, unless the anchors are the keys, the keys. All ranks make the same choice, from the
    histogram of all labels.
    """
    anchors = sides[0]
    if exchange == "gather" or (exchange == "auto" and anchors.labels is None):
        return None
    bins = bucket_count(ranks.world_size) + 1  # the first is for bucket -1: rows that match nothing
    counts = torch.stack([_buckets(side, ranks).add(1).bincount(minlength=bins) for side in sides])
    dist.all_reduce(counts, group=ranks.group)
    histograms = counts.cpu()
    plan = plan_exchange(
        histograms[0, 1:],
        ranks.world_size,
        key_histogram=histograms[1, 1:] if len(sides) > 1 else None,
        loss=loss,
        features=anchors.columns[0].shape[1],
        dtype=anchors.columns[0].dtype,
        exchange=exchange,
    )
    if plan.exchange == "gather":
        return None
    return BucketOwners.of(plan.owners, anchors.device), int(histograms[0].sum())


def _buckets(rows: LabelledRows, ranks: Ranks) -> Tensor:
    """Bucket of each row, [N]; -1 for one that matches nothing."""
    if rows.labels is None:
        return torch.zeros(rows.size, dtype=torch.int64, device=rows.device)
    return label_buckets(rows.labels, ranks.world_size)


def _anchors_first(copies: Copies, home: Tensor, ranks: Ranks) -> tuple[Copies, Tensor]:
    """Puts the copies that are anchors at their destination before all others; returns also their number per rank.

    A sample is an anchor on its home rank alone. The receiver finds the anchors by their number.
    """
    is_anchor = copies.rank == home[copies.row]
    order = torch.cat((is_anchor.nonzero(), (~is_anchor).nonzero())).squeeze(1)
    return Copies(copies.row[order], copies.rank[order]), rows_per_rank(copies.rank[is_anchor], ranks)


def _leading_rows(received: list[int], counts: list[int]) -> Tensor:
    """Indices of the first counts[r] of the received[r] rows from each rank r, on the CPU."""
    begins = accumulate(received[:-1], initial=0)
    return torch.cat([torch.arange(begin, begin + n, device="cpu") for begin, n in zip(begins, counts, strict=True)])


def _send(shipments: list[tuple[Route, LabelledRows]], ranks: Ranks) -> list[LabelledRows]:
    """Sends rows by their routes; returns the rows that arrive by each route."""
    arrived = transport([(route, rows.tensors()) for route, rows in shipments], ranks)
    return [rows.with_tensors(tensors) for (_, rows), tensors in zip(shipments, arrived, strict=True)]


def _gather_keys(anchors: LabelledRows, keys: LabelledRows, ranks: Ranks) -> tuple[LabelledRows, int]:
    """Keys of all ranks, in rank order, and the number of all anchors."""
    sizes = _counts_of_all_ranks([anchors.size, keys.size], ranks, keys.device)
    all_keys = gather_tensors(keys.tensors(), [key_count for _, key_count in sizes], ranks)
    return keys.with_tensors(all_keys), sum(anchor_count for anchor_count, _ in sizes)


def _counts_of_all_ranks(counts: Sequence[int], ranks: Ranks, device: torch.device) -> list[list[int]]:
    """Gathers `counts`, equally many on each rank, [W, counts]."""
    gathered: list[list[int]] = all_gather(torch.tensor([counts], device=device), ranks).tolist()
    return gathered
