"""Model of NT-Xent over many ranks: bytes, operations and memory of ours and of other ways to compute it.

    time = operations / rate of the device + bytes / rate of the network, for the slowest rank

The model has no latency and no overlap. Operations and bytes of ours are those of `plan_exchange`, by which the losses
choose an exchange; those of the others follow from the formulas below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.measure import Row
from mcl_kernels import ExchangePlan, plan_exchange

D = 128
WORLDS = (1, 8, 64, 512, 4096)
SAMPLES_PER_RANK = 16 << 10  # in the figure
BATCHES = (64 << 10, 1 << 20, 8 << 20, 64 << 20)  # global batches, at every number of ranks
CLUSTERS = 1000
DTYPE = torch.bfloat16

# H100 (SXM), from its data sheet: 989e12 dense bf16 operations per second, of which such kernels reach less than half;
# 400 Gb/s of InfiniBand per GPU, as in a DGX H100, of which collectives over many nodes reach most.
OPERATIONS_PER_SECOND = 0.4 * 989e12
BYTES_PER_SECOND = 0.8 * 400e9 / 8

VIEWS = 2  # rows of a sample
FP32_BYTES = 4  # gradients are summed in fp32


class Cost(NamedTuple):
    """Cost of one step by rank: arrays [W]."""

    sent: np.ndarray  # bytes of the forward pass
    received: np.ndarray
    grad_sent: np.ndarray  # bytes of the backward pass
    grad_received: np.ndarray
    operations: np.ndarray
    memory: np.ndarray  # bytes of rows, their gradients, log-sum-exps and logits

    @property
    def bytes(self) -> np.ndarray:
        """The larger of both directions, since a network card sends and receives at the same time."""
        return np.maximum(self.sent + self.grad_sent, self.received + self.grad_received)

    @property
    def seconds(self) -> float:
        return float((self.operations / OPERATIONS_PER_SECOND + self.bytes / BYTES_PER_SECOND).max())


def balanced(n: int, clusters: int) -> list[int]:
    """Equal sizes of clusters."""
    return np.diff(np.linspace(0, n, clusters + 1).round().astype(np.int64)).tolist()


def zipf(n: int, clusters: int) -> list[int]:
    """Sizes of clusters: cluster k has 1 / (k + 1) times the samples of cluster 0."""
    shares = np.cumsum(1 / np.arange(1, clusters + 1))
    return np.diff((n * shares / shares[-1]).round().astype(np.int64), prepend=0).tolist()


LABELS = {"balanced": balanced, "zipf": zipf}


def _row_bytes(samples: np.ndarray, itemsize: int) -> np.ndarray:
    """Bytes of the samples' rows in the dtype, of their gradients in fp32 and of their log-sum-exps."""
    return VIEWS * samples * (D * (itemsize + FP32_BYTES) + FP32_BYTES)


def _planned_cost(plan: ExchangePlan, memory: np.ndarray) -> Cost:
    sizes = (plan.sent, plan.received, plan.grad_sent, plan.grad_received, plan.operations)
    return Cost(*(x.numpy() for x in sizes), memory)


def ours_cluster(sizes: list[int], world: int, dtype: torch.dtype) -> Cost:
    """Cost by cluster: a rank holds its own samples, which it sends, and those of the clusters that it computes."""
    plan = plan_exchange(sizes, world, features=D, dtype=dtype, exchange="cluster")
    pieces = [(rank, n) for n, ranks in zip(sizes, plan.owners, strict=True) for rank in ranks]
    ranks, samples = np.array(pieces, dtype=np.int64).reshape(-1, 2).T
    computed = np.bincount(ranks, weights=samples, minlength=world)
    return _planned_cost(plan, _row_bytes(sum(sizes) / world + computed, dtype.itemsize))


def ours_gather(sizes: list[int], world: int, dtype: torch.dtype) -> Cost:
    """Cost by gather: a rank holds all samples, and compares its own with those of the same cluster."""
    plan = plan_exchange(sizes, world, features=D, dtype=dtype, exchange="gather")
    memory = _row_bytes(np.float64(sum(sizes) * (1 + 1 / world)), dtype.itemsize)
    return _planned_cost(plan, np.full(world, memory))


def dense_gather(sizes: list[int], world: int, dtype: torch.dtype) -> Cost:
    """Cost of open_clip's local_loss with gather_with_grad and a mask: own rows against all rows of all clusters.

    Keys are all-gathered and their gradients reduce-scattered, both in the dtype; the labels of the mask are not
    counted. Three products: logits, and the gradients of both sides. N / W x N pairs of samples, each with four pairs
    of rows. Memory: own rows, all rows, and two matrices in the dtype, logits and their gradient, which is a minimum.
    """
    n = sum(sizes)
    own = n / world
    moved = (n - own) * VIEWS * D * dtype.itemsize
    pairs = VIEWS**2 * own * n
    memory = _row_bytes(np.float64(n + own), dtype.itemsize) + 2 * pairs * dtype.itemsize
    return _uniform_cost(world, moved, moved, 3 * 2 * D * pairs, float(memory))


def ring(sizes: list[int], world: int, dtype: torch.dtype) -> Cost:
    """Cost of Inf-CL: keys travel around a ring of ranks, each of which compares its rows with the keys that it holds.

    Keys make W - 1 steps in the forward pass and again in the backward pass; their gradients, in fp32, make W steps
    back to their rank. Five products over all pairs: logits in the forward pass, and logits and a gradient for each
    side (CLIP has ten, for both directions). Memory: own rows; keys held and in transit; gradients of own rows, and of
    keys held and in transit; log-sum-exps; no logits. Keys and products are in the dtype, although inf-cl has fp32.
    """
    n = sum(sizes)
    own = n / world
    rows = VIEWS * own
    keys = (world - 1) * rows * D * dtype.itemsize
    gradients = (world * rows * D * FP32_BYTES) if world > 1 else 0.0
    memory = rows * (3 * D * dtype.itemsize + 3 * D * FP32_BYTES + FP32_BYTES)
    return _uniform_cost(world, keys, keys + gradients, 5 * 2 * D * rows * VIEWS * n, memory)


def _uniform_cost(world: int, forward: float, backward: float, operations: float, memory: float) -> Cost:
    """Cost with equal values for all ranks, which send as much as they receive."""
    return Cost(*(np.full(world, x) for x in (forward, forward, backward, backward, operations, memory)))


CONTENDERS: dict[str, Callable[[list[int], int, torch.dtype], Cost]] = {
    "ours, cluster": ours_cluster,
    "ours, gather": ours_gather,
    "dense, gather": dense_gather,
    "ring": ring,
}


def imbalance(by_rank: np.ndarray) -> float:
    """Ratio of the busiest rank to the mean."""
    mean = float(by_rank.mean())
    return float(by_rank.max()) / mean if mean else 1.0


def model_row(contender: str, labels: str, clusters: int, world: int, batch: int) -> Row:
    """Row of the model: for each quantity its maximum over ranks."""
    cost = CONTENDERS[contender](LABELS[labels](batch, clusters), world, DTYPE)
    maxima = {name: float(by_rank.max()) for name, by_rank in cost._asdict().items()}
    return {
        "kind": "model", "contender": contender, "labels": labels, "clusters": clusters, "world": world, "batch": batch,
        "features": D, "dtype": str(DTYPE).removeprefix("torch."), **maxima, "bytes": float(cost.bytes.max()),
        "bytes_imbalance": imbalance(cost.bytes), "operations_imbalance": imbalance(cost.operations),
        "seconds": cost.seconds,
    }  # fmt: skip


def model_rows() -> list[Row]:
    points = sorted({(world, n) for world in WORLDS for n in (*BATCHES, SAMPLES_PER_RANK * world)})
    return [
        model_row(contender, labels, CLUSTERS, world, n)
        for labels in LABELS
        for world, n in points
        for contender in CONTENDERS
    ]
