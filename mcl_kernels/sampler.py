"""Batches of few clusters with many samples each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from mcl_kernels._validate import as_integer, check_choice

Array = np.ndarray[Any, np.dtype[np.int64]]


class ClusterBatchSampler(Sampler[list[int]]):
    """A batch sampler whose batches hold few clusters, so that same-cluster negatives do not run out.

    A global batch of G = batch_size * world_size samples is `clusters_per_batch` groups of
    g = G / clusters_per_batch, each from one cluster (a large cluster may fill several groups of a batch);
    `clusters_per_batch=1` is the sampler of the paper. Rank r takes the r-th part of each global batch. A sample
    is drawn at most once an epoch; samples with a negative label match nothing and are never drawn.

    Args:
        labels: pseudo labels of the data set, integers [N] (a tensor or an array).
        batch_size: samples per rank and batch.
        clusters_per_batch: must divide G. Many where the negatives are a queue's, which other batches fill.
        seed: of the order. Every rank computes the same order from (seed, epoch), without communication.
        rank, world_size: which part of each global batch this process loads.
        small: what becomes of the rest of each cluster, less than g samples. "merge": the rests are packed,
            cluster by cluster, into mixed batches; only N mod G samples are left out of an epoch, others in the
            next one. "drop": they are left out, others in each epoch; clusters below g are never seen.

    Attributes:
        left_out: samples left out of each epoch.

    Raises:
        TypeError: labels that are not integers.
        ValueError: sizes that do not fit, or that leave not even one batch.

    Source: the public sampler of arXiv 2402.11816 (one pseudo label per batch), with its rests merged.

    Example:
        >>> sampler = ClusterBatchSampler(torch.tensor([0, 1] * 8), batch_size=4, clusters_per_batch=2)
        >>> sampler.set_epoch(1)
        >>> len(sampler), sampler.left_out, sorted(i for batch in sampler for i in batch) == list(range(16))
        (4, 0, True)
    """

    def __init__(
        self,
        labels: Tensor | Array,
        batch_size: int,
        *,
        clusters_per_batch: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        small: str = "merge",
    ) -> None:
        check_choice("small", small, ("merge", "drop"))
        batch_size = as_integer("batch_size", batch_size, least=1)
        world_size = as_integer("world_size", world_size, least=1)
        clusters_per_batch = as_integer("clusters_per_batch", clusters_per_batch, least=1)
        rank = as_integer("rank", rank, least=0)
        if rank >= world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}: got {rank}")
        self.global_size = batch_size * world_size
        if self.global_size % clusters_per_batch:
            raise ValueError(
                f"clusters_per_batch must divide batch_size * world_size = {self.global_size}: got {clusters_per_batch}"
            )
        labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise TypeError(f"labels must be integers [N]: got {labels.dtype} of shape {list(labels.shape)}")

        self.batch_size = batch_size
        self.group_size = self.global_size // clusters_per_batch
        self.clusters_per_batch = clusters_per_batch
        self.seed = as_integer("seed", seed, least=0)
        self.rank = rank
        self.small = small
        self.epoch = 0
        self._samples = np.flatnonzero(labels >= 0)
        # Dense cluster ids of the samples that have one.
        _, self._clusters, sizes = np.unique(labels[self._samples], return_inverse=True, return_counts=True)
        if small == "merge":
            self._n_batches = len(self._samples) // self.global_size
        else:
            self._n_batches = int((sizes // self.group_size).sum()) // clusters_per_batch
        if self._n_batches == 0:
            raise ValueError(
                f"batch_size * world_size = {self.global_size} leaves no full batch of {len(self._samples)} labelled "
                f"samples with small={small!r}, clusters_per_batch={clusters_per_batch}"
            )
        self.left_out = len(self._samples) - self._n_batches * self.global_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; call it before each epoch, with the same number on every rank."""
        self.epoch = as_integer("epoch", epoch, least=0)

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[list[int]]:
        start = self.rank * self.batch_size
        for batch in self._global_batches():
            yield self._samples[batch[start : start + self.batch_size]].tolist()

    def _global_batches(self) -> Array:
        """Positions in `_samples`, [batches, G], the same on every rank."""
        random = np.random.default_rng((self.seed, self.epoch))
        drawn = self._drawn_in_merge() if self.small == "merge" else np.arange(len(self._samples))

        # Shuffled within clusters, the clusters themselves in a random order.
        drawn = random.permutation(drawn)
        rank_of_cluster = random.permutation(int(self._clusters.max()) + 1)
        drawn = drawn[np.argsort(rank_of_cluster[self._clusters[drawn]], kind="stable")]

        boundaries = np.flatnonzero(np.diff(self._clusters[drawn])) + 1
        groups, rests = [], []
        for cluster in np.split(drawn, boundaries):
            full = len(cluster) - len(cluster) % self.group_size
            groups.append(cluster[:full].reshape(-1, self.group_size))
            rests.append(cluster[full:])
        of_one_cluster = random.permutation(np.concatenate(groups))
        n_full = len(of_one_cluster) - len(of_one_cluster) % self.clusters_per_batch
        batches = of_one_cluster[:n_full].reshape(-1, self.global_size)
        if self.small == "merge":
            rest = np.concatenate((of_one_cluster[n_full:].ravel(), *rests))
            batches = np.concatenate((batches, rest.reshape(-1, self.global_size)))
        return random.permutation(batches)

    def _drawn_in_merge(self) -> Array:
        """All samples but N mod G of them, which a window over one fixed permutation picks.

        The windows of two epochs in a row do not overlap (2 (N mod G) <= N for every N >= G), so that every
        sample appears within two epochs, and in the long run all are left out equally often.
        """
        n = len(self._samples)
        order = np.random.default_rng(self.seed).permutation(n)
        first = self.epoch * self.left_out
        return np.delete(order, np.arange(first, first + self.left_out) % n)
