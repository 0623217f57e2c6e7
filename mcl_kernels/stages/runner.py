"""The stage runner: the labels of each stage, and the clustering that makes the next ones.

The training loop stays the user's:

    runner = MultistageRunner(len(dataset), n_stages=3, n_clusters=16, directory="runs/mcl")
    for stage in runner:
        model, optimizer = build()
        for epoch in range(epochs):
            for index, a, b in loader(stage.batch_sampler(256, clusters_per_batch=4, epoch=epoch)):
                loss = nt_xent(model(a), model(b), stage.labels[index].to(a.device))
                ...
        stage.finish(embed(model), state=model.state_dict())
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mcl_kernels._durable import check_writable
from mcl_kernels._validate import as_integer, check_choice, check_embeddings
from mcl_kernels.distributed.exchange import gather_vectors
from mcl_kernels.distributed.group import (
    OtherRankError,
    check_same_on_all_ranks,
    collective_device,
    ranks_of,
    run_on_each,
    run_on_first,
)
from mcl_kernels.kmeans import KMeans, assign_clusters
from mcl_kernels.kmeans.api import METRICS
from mcl_kernels.kmeans.rows import Rows, RowsLike, open_rows
from mcl_kernels.stages import files as stage_files
from mcl_kernels.stages.pseudo_labels import (
    compose_pairs,
    label_dtype,
    look_up_tuples,
    shares_of_small_labels,
    starvation,
)
from mcl_kernels.stages.run_lock import only_process
from mcl_kernels.stages.sampler import ClusterBatchSampler
from mcl_kernels.stages.saved_state import State, dump_state, load_state
from mcl_kernels.stages.stored_labels import StoredLabels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SHOWN_WITHIN = 30.0  # seconds
T = TypeVar("T")


@dataclass(frozen=True)
class FinishedStage:
    """Results of a stage that was finished in this process or an earlier one.

    Attributes:
        index: 0, 1, ...
        centers: of its clusters, [K, D].
        labels: pseudo labels after it, int64 [n_samples]: those of the next stage, kept as in `Stage.labels`.
        tuples: cluster ids behind each pseudo label, int64 [labels, index + 1].
        statistics: inertia, iterations, cluster_sizes, label_sizes, clustering_seconds; small_labels, the share of the
            labels that have one or two samples, and samples_in_small_labels, the share of the samples that these hold.
    """

    index: int
    centers: Tensor
    labels: StoredLabels
    tuples: Tensor
    statistics: dict[str, Any]
    _read_state: Callable[[], Mapping[str, Any] | None] = field(repr=False)

    @property
    def clusters(self) -> Tensor:
        """The cluster ids of this stage alone, int64 [n_samples]."""
        return self.tuples[:, -1].index_select(0, self.labels.stored)

    @property
    def state(self) -> Mapping[str, Any] | None:
        """A copy of what `finish` was given as state, on the CPU; read, and checked, on every access."""
        return self._read_state()


class Stage:
    """One stage of a run, handed out by iterating over a `MultistageRunner`.

    Attributes:
        index: 0, 1, ...
        labels: pseudo labels, int64 [n_samples] on the CPU; all 0 in stage 0, the plain loss. Kept as int32, in a run
            with a directory in the memory map of a file: `labels[index]` reads what it needs; anything else that a
            tensor can do takes a copy of all, 8 bytes a sample, for as long as it lasts. Read-only.
    """

    def __init__(self, runner: MultistageRunner, index: int) -> None:
        self._runner = runner
        self.index = index
        self.labels = runner.labels

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
        """A `ClusterBatchSampler` over this stage's labels, set to `epoch`, its order seeded by the run.

        One for all epochs of the stage goes on by itself; where each epoch makes its own, `epoch` has to say which.
        `rank` and `world_size` are by default those of the runner's group; without one this process loads all. Under
        accelerate they are 0 and 1: see `ClusterBatchSampler`.
        """
        ranks = self._runner.ranks
        if rank is None and world_size is None and ranks is not None:
            rank, world_size = ranks.rank, ranks.world_size
        sampler = ClusterBatchSampler(
            self.labels.stored, batch_size, clusters_per_batch=clusters_per_batch, seed=self._runner.seed + self.index,
            rank=0 if rank is None else rank, world_size=1 if world_size is None else world_size, small=small,
        )  # fmt: skip
        sampler.set_epoch(epoch)
        return sampler

    @property
    def shard(self) -> range:
        """The samples whose embeddings this process gives to `finish`: all, or with a group a rank's even part."""
        n, ranks = self._runner.n_samples, self._runner.ranks
        if ranks is None:
            return range(n)
        return range(n * ranks.rank // ranks.world_size, n * (ranks.rank + 1) // ranks.world_size)

    def labels_of(self, keys: Sequence[str]) -> Tensor:
        """The labels of the samples with these keys, int64 [B]; for loops whose batches have no index."""
        return self.labels[self._runner.indices_of(keys)]

    def assign(self, previous_embeddings: Sequence[Tensor]) -> Tensor | None:
        """Labels found on the fly from the embeddings of the earlier, frozen encoders.

        Args:
            previous_embeddings: of stage 0, 1, ... up to the one before this, [B, D_s] each.

        Returns:
            int64 [B] on the device of the embeddings, -1 for a tuple of clusters that no sample had; for the
            embeddings given to `finish`, `labels`. In stage 0 there is nothing to assign by: None, which the
            losses take for one cluster.

        Raises:
            ValueError: another number of embeddings than earlier stages, or shapes that do not fit.
        """
        finished = self._runner.finished[: self.index]
        if len(previous_embeddings) != len(finished):
            raise ValueError(
                f"previous_embeddings must hold one tensor per earlier stage: got {len(previous_embeddings)} "
                f"in stage {self.index}"
            )
        if not finished:
            return None
        clusters = []
        for embeddings, stage in zip(previous_embeddings, finished, strict=True):
            name, width = f"previous_embeddings[{stage.index}]", stage.centers.shape[1]
            check_embeddings(name, embeddings)
            if embeddings.shape[1] != width:
                raise ValueError(
                    f"{name} must have {width} features, as in stage {stage.index}: got {embeddings.shape[1]}"
                )
            centers = stage.centers.to(embeddings.device)
            clusters.append(assign_clusters(embeddings, centers, metric=self._runner.metric)[0])
        if len({len(column) for column in clusters}) > 1:
            lengths = [len(column) for column in clusters]
            raise ValueError(f"previous_embeddings must have one row per sample each: got {lengths} rows")
        return look_up_tuples(finished[-1].tuples, torch.stack(clusters, dim=1)).to(clusters[0].device)

    def finish(self, embeddings: RowsLike, state: Mapping[str, Any] | None = None) -> FinishedStage:
        """Clusters the embeddings, composes the next labels and saves the stage.

        When this returns the stage is on disk; killed at any moment before, the run resumes with this stage. Memory
        beyond the embeddings: that of `KMeans`, and 4 bytes a sample for the labels; with a directory they are mapped
        from its file in the end.

        Args:
            embeddings: of the samples of `shard`, which are all of them without a group, in the order of the data set,
                [n_samples, D]: the output of the encoder, or of its projection. A tensor, an array, a memory map or an
                iterable of chunks of rows, as `KMeans.fit` takes them.
            state: what to keep, usually `model.state_dict()`: tensors, numbers, strings and containers of them.
                Copied, so that the model may be trained on. With a group and a directory that of the first rank is
                kept, and the others need none.

        Returns:
            The finished stage, also the last of `runner.finished`.

        Raises:
            TypeError, ValueError: embeddings of another length, with NaN, ...; a state that cannot be loaded safely.
            OSError: the directory cannot be written; earlier stages are intact and finish() can be called again.
            FileExistsError: another process finished this stage.
            RuntimeError: the stage is finished already. Another rank is gone: what was saved stays for the next run.
            With a group an error of one rank is raised on every rank, elsewhere as a ValueError that names it.

        Warns:
            RuntimeWarning: the stage is saved, but its directory could not be synced: a power failure may undo it.
            UserWarning: another stage follows, and more than half of the samples will have a label of one or two
            samples in it. With a group the first rank says so.
        """
        finished = self._runner._finish(self, embeddings, state)
        ranks, is_last = self._runner.ranks, self.index + 1 == self._runner.n_stages
        starved = None if is_last else starvation(torch.tensor(finished.statistics["label_sizes"], device="cpu"))
        if starved is not None and (ranks is None or ranks.rank == 0):
            warnings.warn(f"stage {self.index + 1} will have few negatives: {starved}", stacklevel=2)
        return finished


class MultistageRunner:
    """Multistage Contrastive Learning around anybody's training loop.

    Iterating yields the stages that are not finished yet, so the same script resumes a run that was killed.

    With a `group` (under torchrun, say) every rank has a runner and goes through the same stages: `stage.batch_sampler`
    hands out a rank's part of each batch, `stage.finish` takes the embeddings of `stage.shard` and clusters them over
    all ranks. One rank writes. The directory has to be one that all of them see. Nothing in it depends on the number of
    ranks: a run can be resumed with another.

    Args:
        n_samples: size of the data set.
        n_stages: stages to run, or to read of a run that has more; a finished run can be continued with more.
        n_clusters: clusters K of each stage. Where a probe of what was suppressed was measured against K (README: 4, 8,
            16, 32, 64 for 5,000 images), 4 was too few, and from 16 on there was little to gain; many small clusters
            leave few negatives.
        directory: where finished stages are kept, relative to the working directory of this call; None keeps them in
            memory. One process trains in it at a time; others may read what is finished.
        metric: of the clustering, "cosine" or "euclidean".
        seed: of clusterings and batch samplers.
        keys: a distinct string per sample (a file name, say), for `Stage.labels_of`.
        group: None, or a `torch.distributed` process group over whose ranks the run is spread.

    Raises:
        ValueError: numbers that do not fit, or differ between ranks; a directory that holds a run of another
            configuration (the difference is named).
        TypeError: keys that are no strings.
        RuntimeError: a damaged or missing file of a finished stage, which is named. On iterating: another process
            trains in the directory.

    Source: "Learning the Unlearned" (ECCV 2024, arXiv 2402.11816), section 3.

    Example:
        >>> runner = MultistageRunner(n_samples=8, n_stages=2, n_clusters=2)
        >>> for stage in runner:
        ...     finished = stage.finish(torch.randn(8, 4))
        >>> len(runner.finished), runner.finished[1].tuples.shape[1]
        (2, 2)
    """

    def __init__(
        self,
        n_samples: int,
        *,
        n_stages: int = 3,
        n_clusters: int = 16,
        directory: str | Path | None = None,
        metric: str = "cosine",
        seed: int = 0,
        keys: Sequence[str] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        check_choice("metric", metric, METRICS)
        self.n_samples = as_integer("n_samples", n_samples, least=1)
        self.n_stages = as_integer("n_stages", n_stages, least=1)
        self.n_clusters = as_integer("n_clusters", n_clusters, least=1)
        if self.n_clusters > self.n_samples:
            raise ValueError(f"n_clusters must be at most n_samples = {n_samples}: got {n_clusters}")
        # Absolute: the working directory may change during the run.
        self.directory = None if directory is None else Path(directory).absolute()
        self.metric = metric
        self.seed = as_integer("seed", seed, least=0)
        self._index_of_key = None if keys is None else _index_of_key(keys, self.n_samples)
        self.finished: list[FinishedStage] = []
        self.ranks = None if group is None else ranks_of(group)
        if self.directory is not None:
            self._on_every_rank(partial(self._read_finished, self.directory))
        if self.ranks is not None:
            run = {
                **self._configuration(), "n_stages": self.n_stages, "a directory": self.directory is not None
            }  # fmt: skip
            check_same_on_all_ranks(self.ranks, collective_device(self.ranks), run)
            self._check_progress()

    @property
    def labels(self) -> StoredLabels:
        """The pseudo labels that hold now, int64 [n_samples]; all 0 before a stage is finished."""
        if self.finished:
            return self.finished[-1].labels
        return StoredLabels(torch.zeros(1, dtype=torch.int32, device="cpu").expand(self.n_samples))

    def __iter__(self) -> Iterator[Stage]:
        with contextlib.ExitStack() as held:
            while len(self.finished) < self.n_stages:
                if self.directory is not None:
                    self._on_every_rank(partial(self._take, self.directory, held))
                    # Another process may have gone on with the run since this runner was made.
                    self._on_every_rank(partial(self._read_finished, self.directory))
                    self._check_progress()
                    if len(self.finished) == self.n_stages:
                        break
                stage = Stage(self, len(self.finished))
                yield stage
                if len(self.finished) == stage.index:
                    raise RuntimeError(
                        f"stage {stage.index} is not finished: call stage.finish(embeddings) before the next one"
                    )

    def indices_of(self, keys: Sequence[str]) -> Tensor:
        """The positions of the samples with these keys, int64 [B]."""
        if self._index_of_key is None:
            raise ValueError("keys were not given to the runner: MultistageRunner(..., keys=[...])")
        unknown = [key for key in keys if key not in self._index_of_key]
        if unknown:
            raise ValueError(f"keys must be among those given to the runner: got {unknown[0]!r}")
        return torch.tensor([self._index_of_key[key] for key in keys], dtype=torch.int64, device="cpu")

    def _on_every_rank(self, work: Callable[[], T]) -> T:
        """Returns what `work()` returns; an error on one rank is raised on every rank."""
        return work() if self.ranks is None else run_on_each(work, self.ranks, collective_device(self.ranks))

    def _take(self, directory: Path, held: contextlib.ExitStack) -> None:
        if self.ranks is None or self.ranks.rank == 0:
            check_writable(directory)
            held.enter_context(only_process(directory))

    def _check_progress(self) -> None:
        """Raises where ranks have read different numbers of stages: a network file system may show one later."""
        if self.ranks is not None:
            progress = {"the number of finished stages that the directory holds": len(self.finished)}
            check_same_on_all_ranks(self.ranks, collective_device(self.ranks), progress)

    def _configuration(self) -> dict[str, Any]:
        """Settings that must be the same for a run to be continued."""
        keys = None if self._index_of_key is None else json.dumps(list(self._index_of_key))
        return {
            "n_samples": self.n_samples,
            "n_clusters": self.n_clusters,
            "metric": self.metric,
            "seed": self.seed,
            "keys": None if keys is None else hashlib.sha256(keys.encode()).hexdigest(),
        }

    def _read_finished(self, directory: Path) -> None:
        here = self._configuration()
        # Listed first: a stage that is finished meanwhile is no gap.
        matches = (re.fullmatch(r"stage-(\d+)", path.name) for path in directory.glob("stage-*"))
        listed = [int(match[1]) for match in matches if match]
        while (
            len(self.finished) < self.n_stages and stage_files.stage_directory(directory, len(self.finished)).exists()
        ):
            index = len(self.finished)
            there, stage = _read_stage(directory, index)
            for name in here:
                if there[name] != here[name]:
                    raise ValueError(
                        f"directory {directory} holds a run of another configuration: "
                        f"{name} is {there[name]!r} there and {here[name]!r} here; choose another directory"
                    )
            self.finished.append(stage)
        later = sorted(index for index in listed if index >= len(self.finished))
        if later and len(self.finished) < self.n_stages:
            missing = stage_files.stage_directory(directory, len(self.finished))
            raise RuntimeError(f"{missing} is missing, and stage-{later[0]} builds on it; restore it, or delete both")

    def _finish(self, stage: Stage, embeddings: RowsLike, state: Mapping[str, Any] | None) -> FinishedStage:
        index = stage.index
        if index != len(self.finished):
            raise RuntimeError(f"stage {index} is finished already")
        ranks = self.ranks

        def checked() -> tuple[State | None, Rows]:
            # Before the clustering, so that what does not fit costs no time.
            is_mine = ranks is None or ranks.rank == 0 or self.directory is None
            kept = dump_state(state) if state is not None and is_mine else None
            rows, n = open_rows("embeddings", embeddings), len(stage.shard)
            if rows.count() != n:
                samples = f"{n} samples" if ranks is None else f"the {n} samples of this rank, {stage.shard}"
                raise ValueError(f"embeddings must have one row per sample: got {rows.count()} rows for {samples}")
            return kept, rows

        kept, rows = self._on_every_rank(checked)
        started = time.perf_counter()
        group = None if ranks is None else ranks.group
        kmeans = KMeans(self.n_clusters, metric=self.metric, seed=self.seed + index, group=group).fit(rows)
        seconds = time.perf_counter() - started
        clusters = kmeans.labels_.cpu()
        if ranks is not None:
            (clusters,), _ = gather_vectors([clusters.int().to(collective_device(ranks))], ranks)

        def keep() -> FinishedStage:
            return self._keep(stage, kmeans, clusters.cpu(), seconds, kept)

        if ranks is None or self.directory is None:
            self.finished.append(keep())
        else:
            device, directory = collective_device(ranks), self.directory
            written = run_on_first(keep, ranks, device)
            try:
                finished = run_on_each(lambda: written or _written_stage(directory, index), ranks, device)
            except OtherRankError:
                # All ranks are there and raise, so finish() can be called again. After any other error a rank is gone,
                # and the stage stays for the next run.
                if written is not None:
                    stage_files.withdraw_stage(directory, index)
                raise
            self.finished.append(finished)
        return self.finished[-1]

    def _keep(
        self, stage: Stage, kmeans: KMeans, clusters: Tensor, seconds: float, kept: State | None
    ) -> FinishedStage:
        """Composes the labels of all samples and saves the stage."""
        labels, pairs = compose_pairs(stage.labels, clusters, label_dtype(self.n_samples))
        earlier = self.finished[-1].tuples if self.finished else pairs.new_empty(1, 0)
        arrays = {
            "centers": kmeans.cluster_centers_.cpu(),
            "tuples": torch.cat((earlier[pairs[:, 0]], pairs[:, 1:]), dim=1),
        }
        label_sizes = labels.bincount()
        statistics = {
            "inertia": kmeans.inertia_,
            "iterations": kmeans.n_iter_,
            "cluster_sizes": clusters.bincount().tolist(),
            "label_sizes": label_sizes.tolist(),
            **shares_of_small_labels(label_sizes),
            "clustering_seconds": seconds,
        }
        if self.directory is None:
            stored, read_state = StoredLabels(labels), partial(_load_kept, kept)
        else:
            description = {"configuration": self._configuration(), "statistics": statistics}
            stage_files.write_stage(self.directory, stage.index, {**arrays, "labels": labels}, kept, description)
            stored = stage_files.mapped_labels(self.directory, stage.index, labels)
            read_state = partial(stage_files.read_state, self.directory, stage.index)
        return FinishedStage(stage.index, labels=stored, **arrays, statistics=statistics, _read_state=read_state)


def _written_stage(directory: Path, index: int) -> FinishedStage:
    """Reads the stage that the first rank wrote; waits for it, since a network file system may show it later."""
    path, patience = stage_files.stage_directory(directory, index), time.monotonic() + SHOWN_WITHIN
    while not path.exists():
        if time.monotonic() > patience:
            raise RuntimeError(f"directory must be one that all ranks see: this one finds no {path}, which was written")
        time.sleep(0.1)
    return _read_stage(directory, index)[1]


def _read_stage(directory: Path, index: int) -> tuple[dict[str, Any], FinishedStage]:
    """The configuration of a stage's run, and the stage."""
    arrays, labels, description = stage_files.read_stage(directory, index)
    statistics, read_state = description["statistics"], partial(stage_files.read_state, directory, index)
    stage = FinishedStage(index, labels=labels, **arrays, statistics=statistics, _read_state=read_state)
    return description["configuration"], stage


def _load_kept(state: State | None) -> dict[str, Any] | None:
    return None if state is None else load_state(state)


def _index_of_key(keys: Sequence[str], n_samples: int) -> dict[str, int]:
    if len(keys) != n_samples:
        raise ValueError(f"keys must have one entry per sample: got {len(keys)} keys for {n_samples} samples")
    index_of_key: dict[str, int] = {}
    for index, key in enumerate(keys):
        if not isinstance(key, str):
            raise TypeError(f"keys must be strings: got {type(key).__name__} at {index}; use str(key)")
        if index_of_key.setdefault(key, index) != index:
            raise ValueError(f"keys must be distinct: {key!r} is at {index_of_key[key]} and {index}")
    return index_of_key
