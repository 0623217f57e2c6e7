"""Routes of rows to the ranks that own their buckets of labels."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels.distributed.group import Ranks
from mcl_kernels.distributed.placement import Owners, block_index


class Copies(NamedTuple):
    """Copies of rows to send: copy i is of row[i] and goes to rank[i]."""

    row: Tensor  # int64
    rank: Tensor  # int64


class Route(NamedTuple):
    """Copies of rows that every rank sends to every rank, itself included: at most one per row and destination."""

    order: Tensor  # int64, the row of each copy, sorted by destination
    sent: list[int]  # [W], number of copies to each rank
    received: list[int]  # [W], number of copies from each rank


class BucketOwners(NamedTuple):
    """Ranks that compute each of K buckets of labels.

    The ranks of bucket k are `flat[offsets[k] : offsets[k] + blocks[k]]`. The last entry, with index -1, is for rows
    that match nothing, and has no ranks.
    """

    blocks: Tensor  # int64 [K + 1]
    offsets: Tensor  # int64 [K + 1]
    flat: Tensor  # int64
    any_cut: bool  # True if a bucket has several owners

    @classmethod
    def of(cls, owners: Owners, device: torch.device) -> BucketOwners:
        blocks = torch.tensor([*map(len, owners), 0], device="cpu")
        offsets = blocks.cumsum(0) - blocks
        flat = torch.tensor(list(chain.from_iterable(owners)), dtype=torch.int64, device="cpu")
        return cls(blocks.to(device), offsets.to(device), flat.to(device), any_cut=bool(blocks.max() > 1))

    def home(self, bucket: Tensor, this_rank: int) -> Tensor:
        """Rank that compares each row as an anchor, [N]: one of its bucket's owners, in turn, or this rank if none."""
        blocks = self.blocks[bucket]
        turn = block_index(_position_in_bucket(bucket), this_rank, blocks.clamp(min=1))
        home = torch.full_like(bucket, this_rank)
        owned = blocks > 0
        home[owned] = self.flat[(self.offsets[bucket] + turn)[owned]]
        return home

    def copies(self, bucket: Tensor, *, min_owners: int) -> Copies:
        """Copies of each row for all owners of its bucket; none for a bucket with fewer than `min_owners` owners."""
        blocks = self.blocks[bucket]
        blocks = torch.where(blocks >= min_owners, blocks, 0)
        row = torch.repeat_interleave(blocks)
        first_copy = blocks.cumsum(0) - blocks
        copy = torch.arange(len(row), device=row.device) - first_copy[row]  # among those of its row
        return Copies(row, self.flat[self.offsets[bucket][row] + copy])


def make_routes(
    shipments: list[Copies], rank_counts: list[Tensor], ranks: Ranks
) -> tuple[list[Route], list[list[int]]]:
    """Exchanges the number of copies of each shipment, and returns its route.

    Also exchanges each of `rank_counts`, [W], a number for each rank; returns the numbers received.
    """
    copy_counts = [rows_per_rank(copies.rank, ranks) for copies in shipments]
    sent = torch.stack([*copy_counts, *rank_counts], dim=1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=ranks.group)
    sent_counts, received_counts = sent.T.tolist(), received.T.tolist()
    routes = [
        Route(copies.row[copies.rank.argsort(stable=True)], sent_counts[i], received_counts[i])
        for i, copies in enumerate(shipments)
    ]
    return routes, received_counts[len(shipments) :]


def rows_per_rank(rank: Tensor, ranks: Ranks) -> Tensor:
    """Number of entries of `rank` equal to each rank, [W]."""
    return torch.bincount(rank, minlength=ranks.world_size)


def _position_in_bucket(bucket: Tensor) -> Tensor:
    """Position of each row among the rows of its bucket, [N]."""
    order = bucket.argsort(stable=True)
    sorted_bucket = bucket[order]
    position = torch.empty_like(order)
    first = torch.searchsorted(sorted_bucket, sorted_bucket)
    position[order] = torch.arange(len(order), device=order.device) - first
    return position
