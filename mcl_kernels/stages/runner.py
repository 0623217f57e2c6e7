"""The stage runner: yields the stages of a run, and resumes one that was interrupted.

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
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcl_kernels._durable import check_writable
from mcl_kernels._validate import as_integer, check_choice
from mcl_kernels.kmeans.assign import METRICS
from mcl_kernels.stages.finished_stage import FinishedStage
from mcl_kernels.stages.run_directory import read_new_stages
from mcl_kernels.stages.run_lock import only_process
from mcl_kernels.stages.run_ranks import RunRanks
from mcl_kernels.stages.sample_keys import SampleKeys
from mcl_kernels.stages.stage import Stage
from mcl_kernels.stages.stored_labels import StoredLabels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MultistageRunner:
    """Runs Multistage Contrastive Learning around a training loop of your own.

    Iterating yields the stages that are not finished yet, so the same script resumes a run that was killed.

    With a `group` (under torchrun, say) every rank has a runner and runs the same stages:
    `stage.batch_sampler` yields a rank's part of each batch, and `stage.finish` takes the embeddings of `stage.shard`
    and clusters them over all ranks. The first rank writes; all ranks must see the directory. The files do not depend
    on the number of ranks: a run can be resumed with another.

    Args:
        n_samples: size of the data set.
        n_stages: stages to run, or to read of a run that has more; a finished run can be continued with more.
        n_clusters: clusters K of each stage. In the study of feature suppression (K of 4, 8, 16, 32 and 64 for
            5,000 images) 4 was too few, and more than 16 gained little; many small clusters leave few negatives.
        directory: directory of the finished stages, relative to the working directory of this call; None keeps them in
            memory. One process at a time trains in it; others may read the finished stages.
        metric: metric of the clustering, "cosine" or "euclidean".
        seed: seed of clusterings and batch samplers.
        keys: a distinct string per sample (a file name, say), for `Stage.labels_of`.
        group: None, or a `torch.distributed` process group whose ranks share the run.

    Raises:
        ValueError: sizes that do not fit, or settings that differ between ranks; a directory that holds a run of
            another configuration (the difference is named).
        TypeError: keys that are not strings.
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
        self._keys = None if keys is None else SampleKeys(keys, self.n_samples)
        self.finished: list[FinishedStage] = []
        self.ranks = RunRanks(group)
        if self.directory is not None:
            self.ranks.run_on_each(partial(self._read_new_stages, self.directory))
        if group is not None:
            settings = {"n_stages": self.n_stages, "a directory": self.directory is not None}
            self.ranks.check_same({**self.configuration, **settings})
        self._check_same_progress()

    @property
    def configuration(self) -> dict[str, Any]:
        """The settings that must be the same for a run to be continued."""
        return {
            "n_samples": self.n_samples,
            "n_clusters": self.n_clusters,
            "metric": self.metric,
            "seed": self.seed,
            "keys": None if self._keys is None else self._keys.sha256(),
        }

    @property
    def labels(self) -> StoredLabels:
        """The pseudo labels that hold now, int64 [n_samples]; all 0 before a stage is finished."""
        if self.finished:
            return self.finished[-1].labels
        return StoredLabels(torch.zeros(1, dtype=torch.int32, device="cpu").expand(self.n_samples))

    def __iter__(self) -> Iterator[Stage]:
        with contextlib.ExitStack() as lock:
            while len(self.finished) < self.n_stages:
                if self.directory is not None:
                    self._lock_and_catch_up(self.directory, lock)
                    if len(self.finished) == self.n_stages:
                        break
                stage = Stage(self, len(self.finished))
                yield stage
                if len(self.finished) == stage.index:
                    raise RuntimeError(
                        f"stage {stage.index} is not finished: call stage.finish(embeddings) before the next one"
                    )

    def indices_of(self, keys: Sequence[str]) -> Tensor:
        """Returns the positions of the samples with these keys, int64 [B].

        Raises:
            ValueError: the runner has no keys, or not this one.
        """
        if self._keys is None:
            raise ValueError("keys were not given to the runner: MultistageRunner(..., keys=[...])")
        return self._keys.indices_of(keys)

    def _lock_and_catch_up(self, directory: Path, lock: contextlib.ExitStack) -> None:
        """Keeps other processes out of the directory, then reads the stages they finished since the last reading."""
        self.ranks.run_on_each(partial(self._lock, directory, lock))
        self.ranks.run_on_each(partial(self._read_new_stages, directory))
        self._check_same_progress()

    def _lock(self, directory: Path, lock: contextlib.ExitStack) -> None:
        if self.ranks.is_first:
            check_writable(directory)
            lock.enter_context(only_process(directory))

    def _read_new_stages(self, directory: Path) -> None:
        read_new_stages(directory, self.finished, self.n_stages, self.configuration)

    def _check_same_progress(self) -> None:
        """Raises if ranks have read different numbers of stages: a network file system may show one late."""
        self.ranks.check_same({"the number of finished stages that the directory holds": len(self.finished)})
