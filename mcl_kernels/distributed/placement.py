"""Assigns the clusters of a batch that is spread over ranks to the ranks that compute them.

Clusters are packed onto ranks by their number of pairs: the largest first, each onto the rank with the least work. A
cluster with more than a rank's fair share is cut into blocks of anchors; every owner of a block receives all keys of
the cluster. The placement follows from the histogram of the labels, so every rank computes the same one by itself.

Labels are counted in a fixed number of buckets, so the size of the histogram does not depend on the labels. A label
below that number has a bucket of its own; larger labels are spread over the buckets by a hash. Two labels in one bucket
share an owner, which still compares no row of one with a row of the other.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MIN_BUCKETS, BUCKETS_PER_RANK = 1024, 4
MULTIPLIER = 0x1E3779B97F4A7C15  # of Fibonacci hashing, reduced to fit into int64

Array = np.ndarray[Any, Any]
Owners = tuple[tuple[int, ...], ...]  # for each cluster the ranks that compute it


class Layout(NamedTuple):
    """Row size and work of a loss: columns of D features per row, operations per pair of samples and feature.

    Operations are those of forward and backward together.
    """

    key_columns: int  # of a key; of a sample, if the anchors are the keys
    query_columns: int  # of a query with its positive; 0 if the anchors are the keys
    complete_operations: int  # in a cluster that one rank computes
    block_operations: int  # in a cluster that is cut into blocks

    @property
    def anchors_are_keys(self) -> bool:
        return self.query_columns == 0

    @property
    def block_cost(self) -> int:
        """Cost of a pair in a cluster that is cut, relative to one in a complete cluster."""
        return self.block_operations // self.complete_operations


# Two operations for a multiplication and an addition. A complete cluster whose anchors are its keys takes 2 matrix
# products of all pairs (the self form), a block of anchors against all keys takes 4.
LAYOUTS = {
    "nt_xent": Layout(key_columns=2, query_columns=0, complete_operations=2 * 4 * 2, block_operations=2 * 4 * 4),
    "clip_loss": Layout(key_columns=2, query_columns=0, complete_operations=2 * 4, block_operations=2 * 8),
    "masked_info_nce": Layout(key_columns=1, query_columns=2, complete_operations=2 * 4, block_operations=2 * 4),
}


def bucket_count(world_size: int) -> int:
    return max(MIN_BUCKETS, BUCKETS_PER_RANK * world_size)


def label_buckets(labels: Tensor, world_size: int) -> Tensor:
    """Bucket in which each label is counted, [N]; -1 for a label that matches nothing."""
    n = bucket_count(world_size)
    # The upper bits of the product with a large odd number depend on all bits of a label.
    hashed = ((labels * MULTIPLIER) >> 32) % n
    return torch.where(labels < n, labels.clamp(min=-1), hashed)


def block_index(position: Tensor, rank: int, block_counts: Tensor) -> Tensor:
    """Block of its cluster that each anchor belongs to, by its position among the anchors that `rank` holds of it.

    The anchors of a rank go to the blocks in turn, beginning with another block on each rank.
    """
    return (position + rank) % block_counts


@dataclass(frozen=True)
class LabelHistogram:
    """Number of rows in each of K buckets of labels."""

    total: Array  # int64 [K]
    by_rank: Array  # int64 [W, K], or fp64 [1, K] for every rank if the rows are spread evenly

    @classmethod
    def of(cls, name: str, histogram: Tensor | Sequence[int], world_size: int) -> LabelHistogram:
        """Checks the argument called `name`, and counts labels beyond the number of buckets in theirs."""
        counts = np.asarray(histogram)
        if counts.dtype.kind not in "iu" and counts.size:
            raise TypeError(f"{name} must hold integers: got {counts.dtype}")
        if counts.ndim not in (1, 2) or (counts.ndim == 2 and len(counts) != world_size):
            raise ValueError(f"{name} must have shape [labels] or [{world_size}, labels]: got {list(counts.shape)}")
        counts = counts.astype(np.int64)
        if (counts < 0).any():
            raise ValueError(f"{name} must be at least 0: got {counts.min()}")
        labels = torch.arange(counts.shape[-1], device="cpu")
        if len(labels) > bucket_count(world_size):
            folded = np.zeros((*counts.shape[:-1], bucket_count(world_size)), dtype=np.int64)
            np.add.at(folded.T, label_buckets(labels, world_size).numpy(), counts.T)
            counts = folded
        if counts.ndim == 1:
            return cls(counts, counts[np.newaxis] / world_size)
        return cls(counts.sum(0), counts)

    @property
    def is_even(self) -> bool:
        return len(self.by_rank) == 1

    def at(self, ranks: Array, buckets: Array) -> Array:
        """Number of rows that ranks[i] holds of buckets[i]."""
        counts: Array = self.by_rank[0 if self.is_even else ranks, buckets]
        return counts


def cluster_owners(query_counts: Array, key_counts: Array, world_size: int, layout: Layout) -> Owners:
    """Owners of each bucket; none if there is nothing to compare, as for a sample alone in its bucket."""
    has_pairs = query_counts > 1 if layout.anchors_are_keys else query_counts > 0
    anchor_counts = np.where(has_pairs, query_counts, 0).tolist()
    return pack_clusters(anchor_counts, key_counts.tolist(), world_size, layout.block_cost)


def pack_clusters(query_counts: Sequence[int], key_counts: Sequence[int], world_size: int, block_cost: int) -> Owners:
    """Owners of each cluster: one rank, or one for each block of a cluster that is cut, or none without pairs.

    A pair costs `block_cost` times as much in a cluster that is cut.
    """
    pairs = [n * m for n, m in zip(query_counts, key_counts, strict=True)]
    candidates = [[1] * len(pairs)]
    fair_share = sum(pairs) / world_size
    if max(pairs, default=0) > fair_share:
        # Cutting the clusters above the fair share raises their cost, and so the fair share.
        fair_share = sum(n * block_cost if n > fair_share else n for n in pairs) / world_size
        max_blocks = [min(world_size, n) for n in query_counts]
        # Rounded down, large clusters alone fill the ranks; rounded up, they leave room that smaller clusters fill.
        for rounding in (math.floor, math.ceil):
            candidates.append(_block_counts(pairs, max_blocks, block_cost, fair_share, rounding))
    # Cutting costs bytes, and operations where `block_cost` > 1. The first candidate, which cuts nothing, wins a tie.
    packings = [_pack(pairs, block_counts, world_size, block_cost) for block_counts in candidates]
    return min(packings, key=lambda packing: packing.max_load).owners


def _block_counts(
    pairs: list[int], max_blocks: list[int], block_cost: int, fair_share: float, rounding: Callable[[float], int]
) -> list[int]:
    """Number of blocks of each cluster, such that no block has much more than a fair share."""
    fitting = [min(most, rounding(block_cost * n / fair_share)) for n, most in zip(pairs, max_blocks, strict=True)]
    # With at most `block_cost` blocks, each would take as long as the complete cluster.
    return [blocks if blocks > block_cost and n > fair_share else 1 for n, blocks in zip(pairs, fitting, strict=True)]


class _Packing(NamedTuple):
    max_load: float  # work of the busiest rank
    owners: Owners


def _pack(pairs: list[int], block_counts: list[int], world_size: int, block_cost: int) -> _Packing:
    """Places the blocks by decreasing cost, those of one cluster on different ranks, each on the least loaded ones."""
    costs = [n if blocks == 1 else block_cost * n / blocks for n, blocks in zip(pairs, block_counts, strict=True)]
    owners: list[tuple[int, ...]] = [()] * len(pairs)
    loads = [(0.0, rank) for rank in range(world_size)]  # a heap
    for k in sorted(range(len(pairs)), key=costs.__getitem__, reverse=True):
        if pairs[k] == 0:
            break
        least_loaded = [heapq.heappop(loads) for _ in range(block_counts[k])]
        owners[k] = tuple(sorted(rank for _, rank in least_loaded))
        for load, rank in least_loaded:
            heapq.heappush(loads, (load + costs[k], rank))
    return _Packing(max(loads)[0], tuple(owners))


@dataclass(frozen=True)
class Blocks:
    """All B blocks of anchors; a cluster that is not cut is one block."""

    counts: Array  # int64 [K], number of blocks of each cluster
    cluster: Array  # int64 [B], cluster of each block
    owner: Array  # int64 [B], rank that computes it
    index: Array  # int64 [B], its index among the blocks of its cluster

    @classmethod
    def of(cls, owners: Owners) -> Blocks:
        counts = np.array([len(ranks) for ranks in owners], dtype=np.int64)
        cluster = np.repeat(np.arange(len(owners)), counts)
        owner = np.array(list(chain.from_iterable(owners)), dtype=np.int64)
        first_block = counts.cumsum() - counts
        return cls(counts, cluster, owner, np.arange(len(cluster)) - first_block[cluster])

    @property
    def siblings(self) -> Array:
        """Number of blocks of the cluster of each block, itself included, [B]."""
        siblings: Array = self.counts[self.cluster]
        return siblings
