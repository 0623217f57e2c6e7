"""The results of a stage, composed from its clustering; they are kept in memory or read from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcl_kernels.kmeans import KMeans
from mcl_kernels.stages.pseudo_labels import compose_pairs, label_dtype, shares_of_small_labels
from mcl_kernels.stages.saved_state import State, load_state
from mcl_kernels.stages.stored_labels import StoredLabels


@dataclass(frozen=True, repr=False)
class FinishedStage:
    """Results of a stage that was finished in this process or an earlier one.

    Attributes:
        index: 0, 1, ...
        centers: cluster centres, [K, D].
        labels: pseudo labels after this stage, int64 [n_samples], which hold during the next one; stored as
            `Stage.labels` are.
        tuples: cluster ids behind each pseudo label, int64 [labels, index + 1].
        statistics: inertia, iterations, cluster_sizes, label_sizes, clustering_seconds; small_labels, the share of the
            labels that have one or two samples, and samples_in_small_labels, the share of the samples that have such a
            label.

    Example: see `Stage`.
    """

    index: int
    centers: Tensor
    labels: StoredLabels
    tuples: Tensor
    statistics: dict[str, Any]
    _read_state: Callable[[], Mapping[str, Any] | None]

    def __repr__(self) -> str:
        """The index and sizes, on one line: a run has thousands of labels."""
        k, d = self.centers.shape
        return f"FinishedStage(index={self.index}, {k} centers of width {d}, {len(self.tuples)} pseudo labels)"

    @property
    def clusters(self) -> Tensor:
        """The cluster ids of this stage alone, int64 [n_samples]."""
        return self.tuples[:, -1].index_select(0, self.labels.stored)

    @property
    def state(self) -> Mapping[str, Any] | None:
        """A copy of the state given to `finish`, on the CPU; read and checked on every access.

        Raises:
            RuntimeError: a damaged or missing file, which is named.
        """
        return self._read_state()


@dataclass(frozen=True)
class ComposedStage:
    """Results of a stage that are not stored yet; the state is serialized."""

    index: int
    centers: Tensor
    labels: Tensor
    tuples: Tensor
    statistics: dict[str, Any]
    state: State | None

    def in_memory(self) -> FinishedStage:
        """Returns the finished stage of a run without a directory."""
        return FinishedStage(
            self.index, self.centers, StoredLabels(self.labels), self.tuples, self.statistics, self._load_state
        )

    def _load_state(self) -> dict[str, Any] | None:
        return None if self.state is None else load_state(self.state)


class Clustering(NamedTuple):
    """A fitted `KMeans`, and the cluster ids of all samples, [n_samples] on the CPU."""

    kmeans: KMeans
    clusters: Tensor
    seconds: float


def compose_stage(
    index: int, previous: StoredLabels, earlier_tuples: Tensor | None, clustering: Clustering, state: State | None
) -> ComposedStage:
    """Composes the labels after a stage from the previous ones and its clusters, and the statistics of both.

    Args:
        previous: labels that held during the stage.
        earlier_tuples: cluster ids behind each of the previous labels; None in stage 0.
    """
    kmeans, clusters, seconds = clustering
    labels, pairs = compose_pairs(previous, clusters, label_dtype(len(clusters)))
    if earlier_tuples is None:
        earlier_tuples = pairs.new_empty(1, 0)
    label_sizes = labels.bincount()
    return ComposedStage(
        index,
        centers=kmeans.cluster_centers_.cpu(),
        labels=labels,
        tuples=torch.cat((earlier_tuples[pairs[:, 0]], pairs[:, 1:]), dim=1),
        statistics={
            "inertia": kmeans.inertia_,
            "iterations": kmeans.n_iter_,
            "cluster_sizes": clusters.bincount().tolist(),
            "label_sizes": label_sizes.tolist(),
            **shares_of_small_labels(label_sizes),
            "clustering_seconds": seconds,
        },
        state=state,
    )
