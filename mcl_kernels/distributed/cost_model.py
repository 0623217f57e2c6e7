"""Which rank computes which cluster of a batch that is spread over ranks, and what that costs.

Clusters are packed onto ranks by their number of pairs, the largest first, each onto the rank that has least to do. A
cluster with more than a rank's fair share is cut into blocks of anchors for several ranks, to each of which all of its
keys are sent. All of it follows from the histogram of the labels, so every rank comes to the same result by itself.

Labels are counted in a fixed number of buckets: what is sent before the rows does not depend on the labels. A label
below that number has a bucket of its own; others are spread over them, and two labels in one bucket share an owner,
which still compares none of one with the other.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mcl_kernels._validate import FLOAT_DTYPES, as_integer, check_choice, check_positive
from mcl_kernels.normalize import compute_dtype

EXCHANGES = ("auto", "cluster", "gather")
LEAST_BUCKETS, BUCKETS_PER_RANK = 1024, 4
MULTIPLIER = 0x1E3779B97F4A7C15  # of Fibonacci hashing, as it fits into int64
INTEGER_BYTES = 8
DIGEST_BYTES = 2 * INTEGER_BYTES  # of the arguments, which have to be alike

Array = np.ndarray[Any, Any]


class Layout(NamedTuple):
    """Of a loss: columns of D features that travel, and operations per pair of samples and feature."""

    sample_columns: int  # of an anchor where it is a key too, or else of a key
    query_columns: int  # of an anchor that is no key: itself and its positive; 0 where it is one
    whole: int  # forward and backward where the anchors of a cluster are its keys
    blocks: int  # where they are a block of them


# Two operations for a multiplication and an addition; a self form is 2 products of all pairs, a rectangle 4.
LAYOUTS = {
    "nt_xent": Layout(sample_columns=2, query_columns=0, whole=2 * 4 * 2, blocks=2 * 4 * 4),
    "clip_loss": Layout(sample_columns=2, query_columns=0, whole=2 * 4, blocks=2 * 8),
    "masked_info_nce": Layout(sample_columns=1, query_columns=2, whole=2 * 4, blocks=2 * 4),
}


@dataclass(frozen=True)
class ExchangePlan:
    """What a step costs each of W ranks; see `plan_exchange`.

    Attributes:
        exchange: "cluster" or "gather", which the figures are of.
        owners: of each bucket of labels the ranks that compute its anchors: one, or several where it is cut into
            blocks, or none where its rows stay where they are (nothing to compare). Empty for "gather".
        sent, received: bytes of the forward pass, int64 [W], those that count and check included.
        grad_sent, grad_received: bytes of the backward pass, int64 [W].
        operations: floating-point operations of both passes, fp64 [W].
    """

    exchange: str
    owners: tuple[tuple[int, ...], ...]
    sent: Tensor
    received: Tensor
    grad_sent: Tensor
    grad_received: Tensor
    operations: Tensor

    @property
    def bytes(self) -> Tensor:
        """Of both passes, the larger of both directions, int64 [W]."""
        return torch.maximum(self.sent + self.grad_sent, self.received + self.grad_received)

    @property
    def bytes_imbalance(self) -> float:
        """Those of the busiest rank over the mean."""
        return _imbalance(self.bytes)

    @property
    def operations_imbalance(self) -> float:
        """Those of the busiest rank over the mean."""
        return _imbalance(self.operations)


def plan_exchange(
    histogram: Tensor | Sequence[int],
    world_size: int,
    *,
    key_histogram: Tensor | Sequence[int] | None = None,
    loss: str = "nt_xent",
    features: int = 128,
    dtype: torch.dtype = torch.float32,
    exchange: str = "auto",
    operations_per_byte: float = 1000.0,
) -> ExchangePlan:
    """Bytes and operations of each rank for one step of a loss over `world_size` ranks, without running it.

    `group=` of the losses decides by this function.

    Args:
        histogram: samples (of `masked_info_nce`: queries) of each label in the global batch, integers [K], taken as
            spread evenly over the ranks; or of each rank and label, [W, K], and the bytes are exact.
        world_size: W, any number: nothing is communicated.
        key_histogram: of the keys of `masked_info_nce`, like histogram; None: one key for each query.
        loss: "nt_xent", "clip_loss" or "masked_info_nce" (twice that is `clip_loss` with `text_labels`).
        features: D.
        dtype: of the embeddings.
        exchange: "cluster", "gather", or "auto": the one whose busiest rank is done first.
        operations_per_byte: what a rank computes in the time that it takes to send a byte; only "auto" asks for it.

    Returns:
        An `ExchangePlan`.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> plan = plan_exchange([1000] * 64, world_size=16)
        >>> plan.exchange, plan.owners[:3], round(plan.operations_imbalance, 2)
        ('cluster', ((0,), (1,), (2,)), 1.0)
    """
    world_size = as_integer("world_size", world_size, least=1)
    features = as_integer("features", features, least=1)
    check_choice("loss", loss, tuple(LAYOUTS))
    check_choice("exchange", exchange, EXCHANGES)
    check_positive("operations_per_byte", operations_per_byte)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64: got {dtype}")
    layout = LAYOUTS[loss]
    if key_histogram is not None and not layout.query_columns:
        raise ValueError(f"key_histogram is for loss='masked_info_nce': got it with {loss!r}")
    queries = _Histogram.of("histogram", histogram, world_size)
    keys = queries if key_histogram is None else _Histogram.of("key_histogram", key_histogram, world_size)
    if len(keys.total) != len(queries.total):
        raise ValueError(
            "key_histogram must have as many labels as histogram: "
            f"got {len(keys.total)} labels for {len(queries.total)}"
        )
    model = _Model(queries, keys, world_size, layout, features, dtype)
    plans = [model.plan(kind, counted=exchange != "gather") for kind in EXCHANGES[1:] if exchange in ("auto", kind)]
    return min(plans, key=lambda plan: float((plan.operations + operations_per_byte * plan.bytes).max()))


def buckets_of(labels: Tensor, world_size: int) -> Tensor:
    """Where a label is counted; -1 for one that matches nothing."""
    n = bucket_count(world_size)
    # The upper bits of a product with an odd number of many digits depend on all bits of a label.
    spread = ((labels * MULTIPLIER) >> 32) % n
    return torch.where(labels < n, labels.clamp(min=-1), spread)


def bucket_count(world_size: int) -> int:
    return max(LEAST_BUCKETS, BUCKETS_PER_RANK * world_size)


def block_of(position: Tensor, rank: int, blocks: Tensor) -> Tensor:
    """Which block of its cluster an anchor is in, by its position among those of its rank: in turns."""
    return (position + rank) % blocks


def pack_clusters(queries: Sequence[int], keys: Sequence[int], world_size: int, block_cost: int) -> Owners:
    """The ranks that compute each cluster; a pair costs `block_cost` times as much in a cluster that is cut."""
    work = [n * m for n, m in zip(queries, keys, strict=True)]
    candidates = [[1] * len(work)]
    fair = sum(work) / world_size
    if max(work, default=0) > fair:
        # A rank's share of what there is to do when the clusters above it are cut.
        fair = sum(pairs * block_cost if pairs > fair else pairs for pairs in work) / world_size
        # Rounded down large clusters alone fill the ranks; rounded up smaller ones fill what they leave.
        candidates += [
            _blocks(work, queries, world_size, block_cost, fair, rounded) for rounded in (math.floor, math.ceil)
        ]
    # Cutting costs bytes, and where anchors are no longer the keys operations: only where it ends earlier.
    packings = [_pack(work, blocks, world_size, block_cost) for blocks in candidates]
    return min(packings, key=lambda packing: packing[0])[1]


Owners = tuple[tuple[int, ...], ...]


def _blocks(
    work: list[int], queries: Sequence[int], world_size: int, block_cost: int, fair: float,
    rounded: Callable[[float], int],
) -> list[int]:  # fmt: skip
    """Into how many each cluster is cut, so that none has much more than a fair share."""
    most = [min(world_size, n, rounded(block_cost * pairs / fair)) for pairs, n in zip(work, queries, strict=True)]
    # As many blocks as the cost of a pair grows to would each take as long as the whole.
    return [n if n > block_cost and pairs > fair else 1 for pairs, n in zip(work, most, strict=True)]


def _pack(work: list[int], blocks: list[int], world_size: int, block_cost: int) -> tuple[float, Owners]:
    """The work of the busiest rank, and the owners."""
    cost = [pairs if n == 1 else block_cost * pairs / n for pairs, n in zip(work, blocks, strict=True)]
    owners: list[tuple[int, ...]] = [()] * len(work)
    loads = [(0.0, rank) for rank in range(world_size)]
    for k in sorted(range(len(work)), key=cost.__getitem__, reverse=True):
        if work[k] == 0:
            break
        if blocks[k] == 1:
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + cost[k], rank))
            owners[k] = (rank,)
            continue
        least = [heapq.heappop(loads) for _ in range(blocks[k])]
        owners[k] = tuple(sorted(rank for _, rank in least))
        for load, rank in least:
            heapq.heappush(loads, (load + cost[k], rank))
    return max(loads)[0], tuple(owners)


class _Histogram(NamedTuple):
    """Samples of each bucket."""

    total: Array  # int64 [K]
    by_rank: Array  # [W, K], or fp64 [1, K] of every rank alike

    @classmethod
    def of(cls, name: str, histogram: Tensor | Sequence[int], world_size: int) -> _Histogram:
        counts = np.asarray(histogram)
        if counts.dtype.kind not in "iu" and counts.size:
            raise TypeError(f"{name} must hold integers: got {counts.dtype}")
        if counts.ndim not in (1, 2) or (counts.ndim == 2 and len(counts) != world_size):
            raise ValueError(f"{name} must have shape [labels] or [{world_size}, labels]: got {list(counts.shape)}")
        counts = counts.astype(np.int64)
        if (counts < 0).any():
            raise ValueError(f"{name} must be at least 0: got {counts.min()}")
        if counts.shape[-1] > bucket_count(world_size):
            folded = np.zeros((*counts.shape[:-1], bucket_count(world_size)), dtype=np.int64)
            np.add.at(folded.T, buckets_of(torch.arange(counts.shape[-1], device="cpu"), world_size).numpy(), counts.T)
            counts = folded
        if counts.ndim == 1:
            return cls(counts, counts[np.newaxis] / world_size)
        return cls(counts.sum(0), counts)

    def of_rank(self, ranks: Array, clusters: Array) -> Array:
        counts: Array = self.by_rank[ranks if len(self.by_rank) > 1 else 0, clusters]
        return counts


class _Model(NamedTuple):
    """The costs of one step."""

    queries: _Histogram
    keys: _Histogram
    world_size: int
    layout: Layout
    features: int
    dtype: torch.dtype

    def plan(self, exchange: str, counted: bool) -> ExchangePlan:
        return self.cluster() if exchange == "cluster" else self.gather(counted)

    def gather(self, counted: bool) -> ExchangePlan:
        """Every rank receives all keys, and compares its own anchors."""
        others, layout = self.world_size - 1, self.layout
        rows = math.ceil(self.keys.by_rank.sum(1).max())  # the others are padded
        sizes = others * 2 * INTEGER_BYTES + self._shared_bytes(counted)
        forward = others * rows * self._row_bytes(layout.sample_columns) + sizes
        wide = compute_dtype(torch.empty(0, dtype=self.dtype, device="cpu")).itemsize  # gradients are summed in it
        backward = others * rows * layout.sample_columns * self.features * wide
        operations = (self.queries.by_rank @ self.keys.total.astype(np.float64)) * layout.blocks * self.features
        return self._plan("gather", (), [forward, forward, backward, backward], operations)

    def cluster(self) -> ExchangePlan:
        """Every cluster at its owners."""
        layout, world_size = self.layout, self.world_size
        one_sided = layout.query_columns == 0
        owners = owners_of(self.queries.total, self.keys.total, world_size, layout)
        blocks = np.array([len(ranks) for ranks in owners], dtype=np.int64)
        clusters = np.repeat(np.arange(len(owners)), blocks)  # of each piece
        ranks = np.array([rank for of_cluster in owners for rank in of_cluster], dtype=np.int64)
        of_cluster = blocks[clusters]
        block = np.arange(len(clusters)) - (blocks.cumsum() - blocks)[clusters]
        anchors, own_anchors = self._anchors(clusters, ranks, block, of_cluster)

        def summed(weights: Array) -> Array:
            return np.bincount(ranks, weights=weights, minlength=world_size)

        # Each key goes to every owner of its cluster, a query to one.
        own = summed(self.keys.of_rank(ranks, clusters))
        sent = (self.keys.by_rank * blocks).sum(1) - own
        received = summed(self.keys.total[clusters]) - own
        columns = layout.sample_columns
        counts = (
            3 if one_sided else 2
        )  # rows that go to each rank: whole, cut and anchors among these; queries and keys
        shared = self._shared_bytes(counted=True) + (world_size - 1) * counts * INTEGER_BYTES
        of_row, of_grad = self._row_bytes(columns), columns * self.features * self.dtype.itemsize
        forward = [sent * of_row + shared, received * of_row + shared]
        backward = [sent * of_grad, received * of_grad]
        if not one_sided:
            own = summed(own_anchors)
            sent, received = (self.queries.by_rank * (blocks > 0)).sum(1) - own, summed(anchors) - own
            columns = layout.query_columns
            of_row, of_grad = self._row_bytes(columns), columns * self.features * self.dtype.itemsize
            forward = [forward[0] + sent * of_row, forward[1] + received * of_row]
            backward = [backward[0] + sent * of_grad, backward[1] + received * of_grad]
        per_pair = np.where(of_cluster > 1, layout.blocks, layout.whole)
        operations = summed(anchors * self.keys.total[clusters].astype(np.float64) * per_pair) * self.features
        # A gradient goes back the way its row came.
        return self._plan("cluster", owners, [*forward, *reversed(backward)], operations)

    def _anchors(self, clusters: Array, ranks: Array, block: Array, blocks: Array) -> tuple[Array, Array]:
        """Those of each piece, and of them those that were at its rank before."""
        if len(self.queries.by_rank) == 1:
            anchors = self.queries.total[clusters] / blocks
            return anchors, anchors / self.world_size
        of_rank = self.queries.by_rank[:, clusters]  # [W, pieces]
        turn = (block - np.arange(self.world_size)[:, np.newaxis]) % blocks  # the first position in the block
        in_piece = (of_rank + blocks - 1 - turn) // blocks
        return in_piece.sum(0), in_piece[ranks, np.arange(len(ranks))]

    def _row_bytes(self, columns: int) -> int:
        """With its label and its id."""
        return columns * self.features * self.dtype.itemsize + 2 * INTEGER_BYTES

    def _shared_bytes(self, counted: bool) -> int:
        """That a rank sends, and receives, to check and to count: all-reduced."""
        sides = 1 if self.layout.query_columns == 0 else 2
        histogram = sides * (bucket_count(self.world_size) + 1) * INTEGER_BYTES if counted else 0
        return all_reduced_bytes(DIGEST_BYTES, self.world_size) + all_reduced_bytes(histogram, self.world_size)

    def _plan(self, exchange: str, owners: Owners, sizes: list[Any], operations: Array) -> ExchangePlan:
        of_ranks = [np.broadcast_to(np.asarray(x), self.world_size) for x in (*sizes, operations)]
        sent, received, grad_sent, grad_received = (torch.from_numpy(np.rint(x).astype(np.int64)) for x in of_ranks[:4])
        flops = torch.from_numpy(of_ranks[4].astype(np.float64))
        return ExchangePlan(exchange, owners, sent, received, grad_sent, grad_received, flops)


def owners_of(queries: Array, keys: Array, world_size: int, layout: Layout) -> Owners:
    """Of each bucket; a sample that is alone in its bucket stays where it is."""
    compared = queries > 1 if layout.query_columns == 0 else queries > 0
    n = np.where(compared, queries, 0).tolist()
    return pack_clusters(n, keys.tolist(), world_size, layout.blocks // layout.whole)


def all_reduced_bytes(size: int, world_size: int) -> int:
    """Sent, and received, by each rank for an all-reduce of `size` bytes: by a ring, the least there is."""
    return round(2 * size * (world_size - 1) / world_size)


def _imbalance(of_ranks: Tensor) -> float:
    mean = float(of_ranks.double().mean())
    return float(of_ranks.max()) / mean if mean else 1.0
