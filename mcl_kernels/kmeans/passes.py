"""Passes over the data set of a fit: labels, and sums of each cluster's rows that are updated from pass to pass."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mcl_kernels.kmeans.centers import Centers, Summary, prepare, serial_sum, unit_rows
from mcl_kernels.kmeans.dataset import Dataset

FAR_CENTERS = 1024  # ratio of the objective to the squares of the rows


class Problem(NamedTuple):
    """A data set to cluster, and the implementation of its passes."""

    data: Dataset
    summary: Summary
    metric: str
    implementation: ModuleType

    def prepare(self, points: Tensor) -> Centers:
        """Returns centres for passes with sums."""
        return prepare(points, self.metric, self.summary)

    def as_points(self, x: Tensor) -> Tensor:
        """Returns rows as centres, in the dtype of products; of unit length for the cosine metric."""
        x = x.to(self.summary.dtype)
        return unit_rows(x) if self.metric == "cosine" else x


class Partition:
    """Clusters of the rows as of the last pass: sums [levels, K, D], counts [K] and the objective, of all processes.

    `labels` are int32, of this process's rows. They are stored only if later passes add up changes alone, since the
    implementation has `follow` or since the sums have several levels. Otherwise `labels` is None.
    """

    def __init__(self, problem: Problem, n_clusters: int) -> None:
        self.problem = problem
        data, (levels, width) = problem.data, problem.summary.rounding.shape
        self.sums = torch.zeros(levels, n_clusters, width, dtype=torch.float64, device=data.device)
        self.counts = torch.zeros(n_clusters, dtype=torch.int64, device=data.device)
        self.objective = 0.0
        self.labels: Tensor | None = None
        if hasattr(problem.implementation, "follow") or levels > 1:
            self.labels = torch.full((len(data.held),), -1, dtype=torch.int32, device=data.device)

    def update(self, centers: Centers) -> None:
        """Assigns all rows to the centres, in one pass."""
        objective, sums, counts = 0.0, torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        implementation, data = self.problem.implementation, self.problem.data
        for here, chunk in data.chunks():
            if self.labels is None:
                distances, chunk_sums, chunk_counts = sum_clusters(implementation, chunk, centers)
            else:
                distances, chunk_sums, chunk_counts = _sum_changes(implementation, chunk, centers, self.labels[here])
            objective += serial_sum(distances)
            sums += chunk_sums
            counts += chunk_counts
        total, sums, counts = data.team.total(as_scalar(objective), sums, counts)
        self.objective = float(total)
        if self.labels is None:
            self.sums, self.counts = sums, counts
        else:
            self.sums += sums
            self.counts += counts

    def mean_variance(self, centers: Centers) -> float:
        """Variance of each column, averaged over the columns, after a pass with `centers`; for cosine of unit rows.

        The squares of all rows come from the objective, sum_i |x_i - c_i|^2, unless the centres are so far from the
        rows that digits would be lost: then from one more pass.
        """
        n, total = self.problem.data.n, self.sums.sum(0)
        mean_square = 1.0
        if not centers.cosine:
            points = centers.points.double() - centers.offset.double()
            along = 2 * (total * points).sum(1) - self.counts * points.square().sum(1)
            mean_square = (self.objective + float(along.sum())) / n
            if mean_square * n * FAR_CENTERS < self.objective:
                return mean_variance(self.problem)
        return max(mean_square - float((total.sum(0) / n).square().sum()), 0.0) / self.problem.data.width

    def move(self, position: int, row: Tensor, source: int, target: int) -> None:
        """Moves one row of the data set, [levels, D] as `Centers.rounded` gives it, to another cluster."""
        self.sums[:, source] -= row
        self.sums[:, target] += row
        self.counts[source] -= 1
        self.counts[target] += 1
        held = self.problem.data.held
        if self.labels is not None and position in held:
            self.labels[position - held.start] = target


def sum_clusters(implementation: ModuleType, x: Tensor, centers: Centers) -> tuple[Tensor, Tensor, Tensor]:
    """Returns distances [N], sums [levels, K, D] and counts [K] of one chunk."""
    if hasattr(implementation, "follow") or len(centers.rounding) == 1:
        _, distances, sums, counts = implementation.assign_and_sum(x, centers)
        return distances, _by_level(sums, centers), counts
    labels, distances = implementation.assign(x, centers)
    return distances, *centers.sum_rows(x, labels)


def _sum_changes(
    implementation: ModuleType, x: Tensor, centers: Centers, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `sum_clusters` minus the sums and counts by earlier `labels`, int32 [N], which are updated in place."""
    if hasattr(implementation, "follow"):
        distances, sums, counts = implementation.follow(x, centers, labels)
        return distances, _by_level(sums, centers), counts
    new_labels, distances = implementation.assign(x, centers)
    changed = (new_labels != labels).nonzero().squeeze(1)
    sums, counts = centers.sum_rows(x[changed], new_labels[changed])
    left = changed[labels[changed] >= 0]
    sums_before, counts_before = centers.sum_rows(x[left], labels[left].long())
    labels.copy_(new_labels)
    return distances, sums - sums_before, counts - counts_before


def _by_level(sums: Tensor, centers: Centers) -> Tensor:
    """Returns the sums of an implementation, which has no dimension for a single level, as [levels, K, D]."""
    return sums.view(len(centers.rounding), *centers.points.shape)


def label_rows(problem: Problem, centers: Centers) -> tuple[Tensor, float, Tensor]:
    """Returns the labels of this process's rows, int64; inertia and cluster sizes [K] of all rows."""
    data = problem.data
    labels = torch.empty(len(data.held), dtype=torch.int64, device=data.device)
    inertia = 0.0
    for here, chunk in data.chunks():
        labels[here], distances = problem.implementation.assign(chunk, centers)
        inertia += serial_sum(distances)
    total, counts = data.team.total(as_scalar(inertia), torch.bincount(labels, minlength=len(centers.points)))
    return labels, float(total), counts


def as_scalar(x: float) -> Tensor:
    """Returns a Python float as a tensor of the same bits."""
    return torch.tensor(x, dtype=torch.float64, device="cpu")


def mean_variance(problem: Problem) -> float:
    """Returns the variance of each column, averaged over the columns; of unit rows for the cosine metric. One pass."""
    center = problem.prepare(problem.summary.offset.unsqueeze(0))
    partition = Partition(problem, 1)
    partition.update(center)
    return partition.mean_variance(center)
