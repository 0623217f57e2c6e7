"""Bytes and operations of one step of a loss over ranks, computed from the histogram of its labels.

The losses with `group=` choose their exchange by this model. It counts what every rank sends, receives and computes;
latency and overlap are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mcl_kernels._validate import FLOAT_DTYPES, as_integer, check_choice, check_positive
from mcl_kernels.distributed.placement import (
    LAYOUTS,
    Array,
    Blocks,
    LabelHistogram,
    Layout,
    Owners,
    bucket_count,
    cluster_owners,
)
from mcl_kernels.normalize import compute_dtype

EXCHANGES = ("auto", "cluster", "gather")
INTEGER_BYTES = 8
DIGEST_BYTES = 2 * INTEGER_BYTES  # all-reduced to check that the ranks have the same arguments


@dataclass(frozen=True)
class ExchangePlan:
    """Costs of one step for each of W ranks; see `plan_exchange`.

    Attributes:
        exchange: "cluster" or "gather": the exchange of these costs.
        owners: for each bucket of labels the ranks that compute its anchors: one rank, several if the bucket is cut
            into blocks, or none if it has no pairs and its rows stay on their rank. Empty for "gather".
        sent, received: bytes of the forward pass, int64 [W], with those of the argument check and the histogram.
        grad_sent, grad_received: bytes of the backward pass, int64 [W].
        operations: floating-point operations of both passes, fp64 [W].

    Example:
        >>> plan = plan_exchange([1000] * 64, world_size=16, exchange="gather")
        >>> plan.owners, plan.bytes.shape, plan.bytes_imbalance
        ((), torch.Size([16]), 1.0)
    """

    exchange: str
    owners: Owners
    sent: Tensor
    received: Tensor
    grad_sent: Tensor
    grad_received: Tensor
    operations: Tensor

    @property
    def bytes(self) -> Tensor:
        """Bytes of both passes, sent or received, whichever is more, int64 [W]."""
        return torch.maximum(self.sent + self.grad_sent, self.received + self.grad_received)

    @property
    def bytes_imbalance(self) -> float:
        """Bytes of the busiest rank over the mean."""
        return _imbalance(self.bytes)

    @property
    def operations_imbalance(self) -> float:
        """Operations of the busiest rank over the mean."""
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
    """Computes bytes and operations of each rank for one step of a loss over `world_size` ranks, without running it.

    The losses with `group=` choose their exchange by this function.

    Args:
        histogram: number of samples (of `masked_info_nce`: queries) with each label in the global batch, integers [K],
            taken as spread evenly over the ranks; or that of each rank and label, [W, K], for exact bytes.
        world_size: W, any number of ranks: no process group is needed.
        key_histogram: number of keys of `masked_info_nce`, like histogram; None: one key for each query.
        loss: "nt_xent", "clip_loss" or "masked_info_nce" (`clip_loss` with `text_labels` costs twice the latter).
        features: D.
        dtype: of the embeddings.
        exchange: "cluster", "gather", or "auto": the one whose busiest rank has the lower estimated time.
        operations_per_byte: operations that a rank computes in the time of sending one byte; used by "auto" alone.

    Returns:
        An `ExchangePlan`.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value.

    Source: an all-reduce is counted as a ring (Patarasuk and Yuan 2009), which sends the fewest bytes.

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
    if key_histogram is not None and layout.anchors_are_keys:
        raise ValueError(f"key_histogram is for loss='masked_info_nce': got it with {loss!r}")
    queries = LabelHistogram.of("histogram", histogram, world_size)
    keys = queries if key_histogram is None else LabelHistogram.of("key_histogram", key_histogram, world_size)
    if len(keys.total) != len(queries.total):
        raise ValueError(
            "key_histogram must have as many labels as histogram: "
            f"got {len(keys.total)} labels for {len(queries.total)}"
        )
    model = _CostModel(queries, keys, world_size, layout, features, dtype)
    plans = []
    if exchange in ("auto", "cluster"):
        plans.append(model.cluster())
    if exchange in ("auto", "gather"):
        plans.append(model.gather(counts_labels=exchange == "auto"))
    return min(plans, key=lambda plan: float((plan.operations + operations_per_byte * plan.bytes).max()))


def all_reduce_bytes(size: int, world_size: int) -> int:
    """Bytes that each rank sends, and receives, for an all-reduce of `size` bytes by a ring, the minimum."""
    return round(2 * size * (world_size - 1) / world_size)


@dataclass(frozen=True)
class _Transfer:
    """Rows of one kind that each rank sends to other ranks and receives from them in the forward pass, [W]."""

    columns: int  # of D features
    sent: Array
    received: Array


@dataclass(frozen=True)
class _Traffic:
    """Bytes of a step, [W], or a number that holds for every rank."""

    sent: Array | float
    received: Array | float
    grad_sent: Array | float
    grad_received: Array | float


@dataclass(frozen=True)
class _CostModel:
    """Computes the costs of one step by either exchange."""

    queries: LabelHistogram
    keys: LabelHistogram
    world_size: int
    layout: Layout
    features: int
    dtype: torch.dtype

    def gather(self, *, counts_labels: bool) -> ExchangePlan:
        """Costs if every rank receives all keys and compares its own anchors; "auto" counts the labels before."""
        others, columns = self.world_size - 1, self.layout.key_columns
        rows = math.ceil(self.keys.by_rank.sum(1).max())  # smaller shards are padded
        size_bytes = others * 2 * INTEGER_BYTES  # number of anchors and of keys
        forward = others * rows * self._row_bytes(columns) + size_bytes + self._agreement_bytes(counts_labels)
        # The reduce-scatter sums gradients in this dtype.
        sum_bytes = compute_dtype(torch.empty(0, dtype=self.dtype, device="cpu")).itemsize
        backward = others * rows * columns * self.features * sum_bytes
        pairs = self.queries.by_rank @ self.keys.total.astype(np.float64)
        operations = pairs * self.layout.block_operations * self.features
        return self._plan("gather", (), _Traffic(forward, forward, backward, backward), operations)

    def cluster(self) -> ExchangePlan:
        """Costs if the rows of every cluster are sent to its owners."""
        owners = cluster_owners(self.queries.total, self.keys.total, self.world_size, self.layout)
        blocks = Blocks.of(owners)
        anchors, local_anchors = self._anchors(blocks)
        transfers = [self._key_transfer(blocks)]
        if not self.layout.anchors_are_keys:
            transfers.append(self._query_transfer(blocks, anchors, local_anchors))
        operations = self._block_operations(blocks, anchors)
        return self._plan("cluster", owners, self._traffic(transfers), operations)

    def _anchors(self, blocks: Blocks) -> tuple[Array, Array]:
        """Anchors of each block, and how many of them its owner already holds, [B] each."""
        siblings = blocks.siblings
        if self.queries.is_even:
            anchors = self.queries.total[blocks.cluster] / siblings
            return anchors, anchors / self.world_size
        rank = np.arange(self.world_size)[:, np.newaxis]
        held = self.queries.by_rank[:, blocks.cluster]  # [W, B], anchors of the cluster on each rank
        # A rank's anchors go to the blocks in turn (`block_index`): this is the first position that goes to the block.
        first = (blocks.index - rank) % siblings
        contributed = (held + siblings - 1 - first) // siblings  # [W, B]
        return contributed.sum(0), contributed[blocks.owner, np.arange(len(blocks.owner))]

    def _key_transfer(self, blocks: Blocks) -> _Transfer:
        """Keys, or samples that are both: each is sent to every owner of its cluster."""
        local = self._by_owner(blocks, self.keys.at(blocks.owner, blocks.cluster))
        sent = (self.keys.by_rank * blocks.counts).sum(1) - local
        received = self._by_owner(blocks, self.keys.total[blocks.cluster]) - local
        return _Transfer(self.layout.key_columns, sent, received)

    def _query_transfer(self, blocks: Blocks, anchors: Array, local_anchors: Array) -> _Transfer:
        """Queries with their positives: each is sent to one owner of its cluster."""
        local = self._by_owner(blocks, local_anchors)
        sent = (self.queries.by_rank * (blocks.counts > 0)).sum(1) - local
        received = self._by_owner(blocks, anchors) - local
        return _Transfer(self.layout.query_columns, sent, received)

    def _block_operations(self, blocks: Blocks, anchors: Array) -> Array:
        """Operations of each rank, [W]."""
        is_cut = blocks.siblings > 1
        per_pair = np.where(is_cut, self.layout.block_operations, self.layout.complete_operations)
        pairs = anchors * self.keys.total[blocks.cluster].astype(np.float64)
        return self._by_owner(blocks, pairs * per_pair) * self.features

    def _by_owner(self, blocks: Blocks, values: Array) -> Array:
        """Sum of the values of the blocks that each rank computes, fp64 [W]."""
        return np.bincount(blocks.owner, weights=values, minlength=self.world_size)

    def _traffic(self, transfers: list[_Transfer]) -> _Traffic:
        """Bytes of the transfers, of the counts sent before them, and of the gradients, which return the same way."""
        # Every rank first sends every other the number of rows that follow: those of complete clusters, those of cut
        # ones and the anchors among these; or the queries and the keys.
        row_counts = 3 if self.layout.anchors_are_keys else 2
        shared = self._agreement_bytes(counts_labels=True) + (self.world_size - 1) * row_counts * INTEGER_BYTES
        sent: Array | float = shared
        received: Array | float = shared
        grad_sent: Array | float = 0
        grad_received: Array | float = 0
        for transfer in transfers:
            row_bytes, grad_bytes = self._row_bytes(transfer.columns), self._gradient_bytes(transfer.columns)
            sent = sent + transfer.sent * row_bytes
            received = received + transfer.received * row_bytes
            grad_sent = grad_sent + transfer.received * grad_bytes
            grad_received = grad_received + transfer.sent * grad_bytes
        return _Traffic(sent, received, grad_sent, grad_received)

    def _row_bytes(self, columns: int) -> int:
        """Bytes of a row with its label and its id."""
        return self._gradient_bytes(columns) + 2 * INTEGER_BYTES

    def _gradient_bytes(self, columns: int) -> int:
        return columns * self.features * self.dtype.itemsize

    def _agreement_bytes(self, counts_labels: bool) -> int:
        """Bytes all-reduced for the argument check and, if labels are counted, for the histograms."""
        sides = 1 if self.layout.anchors_are_keys else 2
        histogram = sides * (bucket_count(self.world_size) + 1) * INTEGER_BYTES if counts_labels else 0
        return all_reduce_bytes(DIGEST_BYTES, self.world_size) + all_reduce_bytes(histogram, self.world_size)

    def _plan(self, exchange: str, owners: Owners, traffic: _Traffic, operations: Array) -> ExchangePlan:
        def per_rank(values: Array | float) -> Array:
            return np.broadcast_to(np.asarray(values), self.world_size)

        def rounded(values: Array | float) -> Tensor:
            return torch.from_numpy(np.rint(per_rank(values)).astype(np.int64))

        return ExchangePlan(
            exchange,
            owners,
            sent=rounded(traffic.sent),
            received=rounded(traffic.received),
            grad_sent=rounded(traffic.grad_sent),
            grad_received=rounded(traffic.grad_received),
            operations=torch.from_numpy(per_rank(operations).astype(np.float64)),
        )


def _imbalance(values: Tensor) -> float:
    mean = float(values.double().mean())
    return float(values.max()) / mean if mean else 1.0
