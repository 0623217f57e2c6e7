"""A batch sampler that fills each batch with few clusters, many samples each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from mcl_kernels._validate import as_integer, check_choice, check_dense

Array = np.ndarray[Any, np.dtype[np.int64]]


class ClusterBatchSampler(Sampler[list[int]]):
    """Samples batches of few clusters, so that every sample has enough negatives of its own cluster.

    A global batch of G = batch_size * world_size samples consists of `clusters_per_batch` groups of
    g = G / clusters_per_batch samples, each group from one cluster (a large cluster may fill several groups of a
    batch); `clusters_per_batch=1` is the sampler of the paper. Rank r loads the r-th part of each global batch. A
    sample is drawn at most once an epoch; samples with a negative label have no cluster and are never drawn.

    Every iteration is a new epoch with a new order: the epoch chosen by `set_epoch`, or the one after the last.
    An iteration counts as an epoch once its first batch is drawn, even if it stops there, so all ranks have to begin
    equally many iterations, or call `set_epoch`. Lightning and accelerate call it:

    * Lightning with several processes: `Trainer(use_distributed_sampler=False)`, `rank=trainer.global_rank` and
      `world_size=trainer.world_size`. (If it resumes after an epoch, with workers, it draws batches before it calls
      `set_epoch`: that epoch has the order of the epoch to which the sampler was set before.)
    * accelerate splits the batches itself: pass `rank=0`, `world_size=1`, the `batch_size` of all processes together,
      and `DataLoaderConfiguration(split_batches=True)`; otherwise each process loads different batches. `prepare`
      refuses a sampler with a larger world_size: its `drop_last` raises a ValueError whenever it is read, also by a
      debugger or `inspect.getmembers`.

    To resume in mid-epoch, call `set_epoch` and skip the batches already drawn (accelerate's `skip_first_batches`), or
    use torchdata's `StatefulDataLoader`, which saves this sampler's `state_dict`; Lightning adds it to its checkpoints.

    Args:
        labels: pseudo labels of the data set, integers [N] (a tensor or an array).
        batch_size: samples per rank and batch.
        clusters_per_batch: must divide G. Choose a large one if the negatives come from a queue, since it is filled by
            other batches.
        seed: seed of the order. Every rank computes the same order from (seed, epoch), without communication.
        rank, world_size: part of each global batch that this process loads.
        small: treatment of the remainder of each cluster, fewer than g samples. "merge": the remainders are packed,
            cluster by cluster, into mixed batches; only N mod G samples are left out of an epoch, different ones in the
            next. "drop": they are left out, different ones in each epoch; clusters of fewer than g samples are never
            drawn.

    Attributes:
        epoch: epoch of the iteration that began last, or that `set_epoch` has chosen since.
        left_out: samples left out of each epoch.

    Raises:
        TypeError: labels that are not integers.
        ValueError: sizes that do not fit, or that leave no complete batch; from `drop_last`, if a host would split the
            batches of one rank once more.

    Source: the public sampler of arXiv 2402.11816 (one pseudo label per batch), with its remainders merged.

    Example:
        >>> sampler = ClusterBatchSampler(torch.tensor([0, 1] * 8), batch_size=4, clusters_per_batch=2)
        >>> len(sampler), sampler.left_out, sorted(i for batch in sampler for i in batch) == list(range(16))
        (4, 0, True)
        >>> first, second = list(sampler), list(sampler)
        >>> sampler.set_epoch(1)
        >>> first == second, first == list(sampler)
        (False, True)
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
        if isinstance(labels, Tensor):
            check_dense("labels", labels)
        labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise TypeError(f"labels must be integers [N]: got {labels.dtype} of shape {list(labels.shape)}")

        self.batch_size = batch_size
        self.group_size = self.global_size // clusters_per_batch
        self.clusters_per_batch = clusters_per_batch
        self.seed = as_integer("seed", seed, least=0)
        self.rank, self.world_size = rank, world_size
        self.small = small
        self.epoch, self._first, self._drawn_from = 0, 0, False
        self._is_chosen = False  # whether `set_epoch` has chosen the next epoch
        self._position = 0, 0
        self._samples = np.flatnonzero(labels >= 0)
        # Dense cluster ids of the labelled samples.
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
        """Chooses the epoch of the next iteration; the order depends only on the epoch, on every rank.

        After `load_state_dict` the loaded epoch continues where it was saved; any other epoch starts from its first
        batch.
        """
        epoch = as_integer("epoch", epoch, least=0)
        if self._drawn_from or epoch != self.epoch:
            self._begin_at(epoch, 0)
        self._is_chosen = True

    def state_dict(self) -> dict[str, int]:
        """Returns the current epoch and the number of its batches drawn; after a complete epoch, the next one and 0.

        A loader with workers draws ahead of the loop: use `StatefulDataLoader`, which accounts for that.
        """
        epoch, batches = self._position if self._drawn_from else (self.epoch, self._first)
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Makes the next iteration the remaining batches of the epoch of `state`.

        If its last batch was drawn, the next iteration is the next epoch. After `set_epoch(state["epoch"])`, however,
        it is the remainder of that epoch, which has no batches, so that no batch is drawn twice.

        Raises:
            TypeError: a state that is not a mapping.
            ValueError: a state without its keys, or with more batches than an epoch of this sampler has.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() returned: got {type(state).__name__}")
        if "epoch" not in state or "batches" not in state:
            raise ValueError(f"state must have the keys 'epoch' and 'batches': got {list(state)}")
        batches = as_integer("state['batches']", state["batches"], least=0)
        if batches > len(self):
            raise ValueError(
                f"state must have at most as many batches as this sampler: got batch {batches} of {len(self)}"
            )
        self._begin_at(as_integer("state['epoch']", state["epoch"], least=0), batches)
        self._is_chosen = False

    @property
    def sampler(self) -> ClusterBatchSampler:
        """This object: Lightning and accelerate call `loader.batch_sampler.sampler.set_epoch`."""
        return self

    @property
    def drop_last(self) -> bool:
        """Raises an AttributeError, since every batch is full; if world_size > 1, a ValueError.

        Hosts read this attribute before they split batches among their processes: they would split the batches of one
        rank once more.
        """
        if self.world_size == 1:
            raise AttributeError("every batch is full: there is none to drop")
        raise ValueError(
            f"rank and world_size must be 0 and 1 where a host splits batches among its processes: got rank "
            f"{self.rank} of {self.world_size}, whose batches would be split once more. With accelerate: world_size=1, "
            f"batch_size={self.global_size} and DataLoaderConfiguration(split_batches=True), or a loader that is not "
            "prepared. With Lightning: Trainer(use_distributed_sampler=False)"
        )

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[list[int]]:
        # This runs when the first batch is drawn. Loaders with workers create two iterators, and draw only from the
        # second.
        is_complete = self._first == len(self) and not self._is_chosen
        if self._drawn_from or is_complete:
            self._begin_at(self.epoch + 1, 0)
        self._drawn_from = True
        epoch, first = self.epoch, self._first
        start = self.rank * self.batch_size
        for number, batch in enumerate(self._global_batches()[first:], first + 1):
            self._position = epoch, number
            yield self._samples[batch[start : start + self.batch_size]].tolist()
        self._position = epoch + 1, 0

    def _begin_at(self, epoch: int, batch: int) -> None:
        """Sets the epoch and the batch with which the next iteration begins."""
        self.epoch, self._first, self._drawn_from = epoch, batch, False

    def _global_batches(self) -> Array:
        """Computes the batches of the epoch as positions in `_samples`, [batches, G]; the same on every rank."""
        random = np.random.default_rng((self.seed, self.epoch))
        drawn = self._positions_to_merge() if self.small == "merge" else np.arange(len(self._samples))

        # Shuffles the samples within clusters, and the order of the clusters.
        drawn = random.permutation(drawn)
        cluster_order = random.permutation(int(self._clusters.max()) + 1)
        drawn = drawn[np.argsort(cluster_order[self._clusters[drawn]], kind="stable")]

        boundaries = np.flatnonzero(np.diff(self._clusters[drawn])) + 1
        cluster_groups, remainders = [], []
        for cluster in np.split(drawn, boundaries):
            n_grouped = len(cluster) - len(cluster) % self.group_size
            cluster_groups.append(cluster[:n_grouped].reshape(-1, self.group_size))
            remainders.append(cluster[n_grouped:])
        groups = random.permutation(np.concatenate(cluster_groups))
        n_batched = len(groups) - len(groups) % self.clusters_per_batch
        batches = groups[:n_batched].reshape(-1, self.global_size)
        if self.small == "merge":
            mixed = np.concatenate((groups[n_batched:].ravel(), *remainders))
            batches = np.concatenate((batches, mixed.reshape(-1, self.global_size)))
        return random.permutation(batches)

    def _positions_to_merge(self) -> Array:
        """Returns all positions except N mod G of them, which a window over one fixed permutation selects.

        The windows of consecutive epochs do not overlap (2 (N mod G) <= N for every N >= G), so every sample is drawn
        within two epochs, and in the long run all samples are left out equally often.
        """
        n = len(self._samples)
        order = np.random.default_rng(self.seed).permutation(n)
        first = self.epoch * self.left_out
        return np.delete(order, np.arange(first, first + self.left_out) % n)
