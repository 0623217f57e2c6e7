"""One stage of a multistage run: the labels it trains with, and the clustering that makes the next ones."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mcl_kernels._validate import check_embeddings
from mcl_kernels.kmeans import KMeans, assign_clusters
from mcl_kernels.kmeans.rows import Rows, RowsLike, open_rows
from mcl_kernels.stages.finished_stage import Clustering, ComposedStage, FinishedStage, compose_stage
from mcl_kernels.stages.pseudo_labels import look_up_tuples, starvation
from mcl_kernels.stages.run_directory import save_stage
from mcl_kernels.stages.run_ranks import RunRanks
from mcl_kernels.stages.sampler import ClusterBatchSampler
from mcl_kernels.stages.saved_state import State, dump_state
from mcl_kernels.stages.stored_labels import StoredLabels


class Run(Protocol):
    """Settings and progress of the run that a stage belongs to: attributes of `MultistageRunner`."""

    n_samples: int
    n_stages: int
    n_clusters: int
    metric: str
    seed: int
    directory: Path | None
    ranks: RunRanks
    finished: list[FinishedStage]

    @property
    def labels(self) -> StoredLabels: ...
    @property
    def configuration(self) -> dict[str, Any]: ...
    def indices_of(self, keys: Sequence[str]) -> Tensor: ...


class Stage:
    """One stage of a run, returned by iterating over a `MultistageRunner`.

    Attributes:
        index: 0, 1, ...
        labels: pseudo labels, int64 [n_samples] on the CPU; all 0 in stage 0, which is the plain loss. Read-only.
            Stored as int32, and in a run with a directory in the memory map of a file. `labels[index]` reads only the
            labels it returns; any other operation makes a temporary copy of all labels, 8 bytes a sample.

    Source: "Learning the Unlearned" (ECCV 2024, arXiv 2402.11816), section 3.

    Example:
        >>> from mcl_kernels import MultistageRunner
        >>> stage = next(iter(MultistageRunner(8, n_stages=2, n_clusters=2)))
        >>> finished = stage.finish(torch.eye(2).repeat(4, 1))
        >>> stage.index, stage.labels.tolist(), len(finished.labels.unique())
        (0, [0, 0, 0, 0, 0, 0, 0, 0], 2)
    """

    def __init__(self, run: Run, index: int) -> None:
        self._run = run
        self.index = index
        self.labels = run.labels

    def batch_sampler(
        self,
        batch_size: int,
        *,
        clusters_per_batch: int = 1,
        epoch: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        small: str = "merge",
    ) -> ClusterBatchSampler:
        """Returns a `ClusterBatchSampler` over this stage's labels, set to `epoch` and seeded by the run.

        A sampler that serves all epochs of the stage advances by itself. If each epoch makes its own, pass `epoch`.
        `rank` and `world_size` default to those of the runner's group, or to 0 and 1 without one. Under accelerate
        they must be 0 and 1: see `ClusterBatchSampler`, which describes the arguments and errors.
        """
        if rank is None and world_size is None:
            rank, world_size = self._run.ranks.rank, self._run.ranks.world_size
        sampler = ClusterBatchSampler(
            self.labels.stored,
            batch_size,
            clusters_per_batch=clusters_per_batch,
            seed=self._run.seed + self.index,
            rank=0 if rank is None else rank,
            world_size=1 if world_size is None else world_size,
            small=small,
        )
        sampler.set_epoch(epoch)
        return sampler

    @property
    def shard(self) -> range:
        """The samples whose embeddings this process passes to `finish`: all, or with a group an even part per rank."""
        return self._run.ranks.part_of(self._run.n_samples)

    def labels_of(self, keys: Sequence[str]) -> Tensor:
        """Returns the labels of the samples with these keys, int64 [B]; for loops whose batches have no index.

        Raises:
            ValueError: the runner has no keys, or not this one.
        """
        return self.labels[self._run.indices_of(keys)]

    def assign(self, previous_embeddings: Sequence[Tensor]) -> Tensor | None:
        """Computes labels on the fly from the embeddings of the earlier, frozen encoders.

        Args:
            previous_embeddings: one tensor per earlier stage in order, from its encoder, [B, D_s] each.

        Returns:
            int64 [B] on the device of the embeddings: `labels` for the embeddings given to `finish`, and -1 for a tuple
            of clusters that no sample of the data set has. None in stage 0, which the losses take as one cluster.

        Raises:
            ValueError: another number of tensors than earlier stages, or shapes that do not fit.
        """
        earlier_stages = self._run.finished[: self.index]
        if len(previous_embeddings) != len(earlier_stages):
            raise ValueError(
                f"previous_embeddings must hold one tensor per earlier stage: got {len(previous_embeddings)} "
                f"in stage {self.index}"
            )
        if not earlier_stages:
            return None
        stage_clusters = []
        for embeddings, stage in zip(previous_embeddings, earlier_stages, strict=True):
            name, width = f"previous_embeddings[{stage.index}]", stage.centers.shape[1]
            check_embeddings(name, embeddings)
            if embeddings.shape[1] != width:
                raise ValueError(
                    f"{name} must have {width} features, as in stage {stage.index}: got {embeddings.shape[1]}"
                )
            centers = stage.centers.to(embeddings.device)
            stage_clusters.append(assign_clusters(embeddings, centers, metric=self._run.metric)[0])
        row_counts = [len(clusters) for clusters in stage_clusters]
        if len(set(row_counts)) > 1:
            raise ValueError(f"previous_embeddings must have one row per sample each: got {row_counts} rows")
        tuples = torch.stack(stage_clusters, dim=1)
        return look_up_tuples(earlier_stages[-1].tuples, tuples).to(tuples.device)

    def finish(self, embeddings: RowsLike, state: Mapping[str, Any] | None = None) -> FinishedStage:
        """Clusters the embeddings, composes the next labels and saves the stage.

        When this returns the stage is on disk. If the process is killed earlier, the run resumes with this stage.
        Memory beyond the embeddings: that of `KMeans`, and 4 bytes a sample for the labels, which with a directory are
        mapped from their file once it is written.

        Args:
            embeddings: one row per sample of `shard` (without a group: all samples), in the order of the data set,
                [n_samples, D]: the output of the encoder, or of its projection. A tensor, an array, a memory map or an
                iterable of chunks of rows, as for `KMeans.fit`.
            state: state to save, usually `model.state_dict()`: tensors, numbers, strings and containers of them. It is
                copied, so the model may be trained further. With a group and a directory only the first rank's state
                is saved, and the other ranks may pass None.

        Returns:
            The finished stage, which is also appended to `runner.finished`.

        With a group an error of one rank is raised on every rank, on the others as a ValueError that names it.

        Raises:
            TypeError, ValueError: embeddings of another length, with NaN, ...; a state that cannot be loaded safely.
            OSError: the directory cannot be written; earlier stages are intact and finish() can be called again.
            FileExistsError: another process finished this stage.
            RuntimeError: the stage is finished already; or another rank is gone: a stage it left on disk is kept for
                the next run.

        Warns:
            RuntimeWarning: the stage is saved, but its directory could not be synced: a power failure may undo it.
            UserWarning: more than half of the samples will have a label of one or two samples in the next stage. With
                a group only the first rank warns.
        """
        run = self._run
        if self.index != len(run.finished):
            raise RuntimeError(f"stage {self.index} is finished already")
        serialized, rows = run.ranks.run_on_each(partial(self._check, embeddings, state))
        compose = partial(self._compose, self._cluster(rows), serialized)
        if run.directory is None:
            finished = compose().in_memory()
        else:
            finished = save_stage(run.directory, self.index, compose, run.configuration, run.ranks)
        run.finished.append(finished)
        if starved := self._starvation(finished):
            warnings.warn(f"stage {self.index + 1} will have few negatives: {starved}", stacklevel=2)
        return finished

    def _check(self, embeddings: RowsLike, state: Mapping[str, Any] | None) -> tuple[State | None, Rows]:
        """Checks the arguments of `finish` before the clustering starts; returns the serialized state and the rows."""
        ranks, directory = self._run.ranks, self._run.directory
        saves_state = ranks.is_first or directory is None
        serialized = dump_state(state) if state is not None and saves_state else None
        rows, n = open_rows("embeddings", embeddings), len(self.shard)
        if rows.count() != n:
            samples = f"{n} samples" if ranks.group is None else f"the {n} samples of this rank, {self.shard}"
            raise ValueError(f"embeddings must have one row per sample: got {rows.count()} rows for {samples}")
        return serialized, rows

    def _cluster(self, rows: Rows) -> Clustering:
        """Fits k-means to the embeddings of all ranks."""
        run, started = self._run, time.perf_counter()
        kmeans = KMeans(run.n_clusters, metric=run.metric, seed=run.seed + self.index, group=run.ranks.group).fit(rows)
        seconds = time.perf_counter() - started
        return Clustering(kmeans, run.ranks.concatenate(kmeans.labels_.cpu()), seconds)

    def _compose(self, clustering: Clustering, serialized: State | None) -> ComposedStage:
        finished = self._run.finished
        earlier_tuples = finished[-1].tuples if finished else None
        return compose_stage(self.index, self.labels, earlier_tuples, clustering, serialized)

    def _starvation(self, finished: FinishedStage) -> str | None:
        """Returns the text of a warning, on the first rank, if the next stage will have few negatives."""
        if self.index + 1 == self._run.n_stages or not self._run.ranks.is_first:
            return None
        return starvation(torch.tensor(finished.statistics["label_sizes"], device="cpu"))
