"""Passes over the data set of a fit: labels, and sums of each cluster's rows that are updated from pass to pass."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mcl_kernels.kmeans.centers import Bounds, Centers, in_fp64, prepare, serial_sum, unit_rows
from mcl_kernels.kmeans.dataset import Dataset
from mcl_kernels.kmeans.summary import Summary

FAR_CENTERS = 1024  # ratio of the objective to the squares of the rows
# The objective is measured again when it has fallen by this factor since, and when it is a smaller share than this of
# the terms that it is the difference of.
LARGEST_FALL, LEAST_SHARE = 16, 2.0**-24


class Problem(NamedTuple):
    """A data set to cluster, and the implementation of its passes."""

    data: Dataset
    summary: Summary
    metric: str
    implementation: ModuleType
    bounds: bool  # skip rows that keep their label, if the implementation can

    def prepare(self, points: Tensor) -> Centers:
        """Returns centres for passes with sums."""
        return prepare(points, self.metric, self.summary)

    def without_weights(self) -> Problem:
        """Returns the problem of the same rows, each with a weight of 1."""
        data = self.data.without_weights()
        return self._replace(data=data, summary=self.summary.for_sums(data.n, None))

    def as_points(self, x: Tensor) -> Tensor:
        """Returns rows as centres, in the dtype of products; of unit length for the cosine metric."""
        x = x.to(self.summary.dtype)
        return unit_rows(x) if self.metric == "cosine" else x


class Partition:
    """Clusters of the rows as of the last pass: sums, counts [K] and the objective, of all processes.

    The sums are [levels, K, D], or with weights [levels, K, D + 1]; then rows of weight 0 are not counted.
    `labels` are int32, of this process's rows. They are stored only if later passes add up changes alone, since the
    implementation has `follow` or since the sums have several levels. Otherwise `labels` is None. `rows_read` is the
    number of rows that the last pass read.

    With `measure` in the implementation the objective comes from the sums, so that a pass need not read every row:

        objective = squares - sum_k (2 <S_k, c_k> - n_k |c_k|^2), halved for cosine

    with sums S_k and centres c_k relative to the offset. `squares`, the sum of |x_i|^2, comes from the distances of an
    earlier pass. Where digits would be lost, distances are measured again.
    """

    def __init__(self, problem: Problem, n_clusters: int) -> None:
        self.problem = problem
        data, (levels, columns) = problem.data, problem.summary.rounding.shape
        self.sums = torch.zeros(levels, n_clusters, columns, dtype=torch.float64, device=data.device)
        self.counts = torch.zeros(n_clusters, dtype=torch.int64, device=data.device)
        self.objective, self.rows_read = 0.0, 0
        self.labels: Tensor | None = None
        if hasattr(problem.implementation, "follow") or levels > 1:
            self.labels = torch.full((len(data.held),), -1, dtype=torch.int32, device=data.device)
        self.centers: Centers | None = None  # of the last pass
        measures = torch.tensor(hasattr(problem.implementation, "measure"), dtype=torch.int64, device="cpu")
        self.measures = int(data.team.total(measures)[0]) == data.team.size
        self.bounds: Bounds | None = None  # set by the first pass
        self.squares: float | None = None  # None: unknown, or too large for the digits of the objective
        self.measured = 0.0  # the objective of the pass that `squares` comes from
        self.is_measured = True  # the last objective comes from distances

    def update(self, centers: Centers) -> None:
        """Assigns all rows to the centres, in one pass."""
        shifts = None
        if self.measures and self.problem.bounds and self.bounds is None:
            self.bounds = Bounds.unknown(len(self.problem.data.held), centers.points)
        elif self.bounds is not None and self.centers is not None and self.squares is not None:
            shifts = centers.shifts(self.centers)
        objective, sums, counts = 0.0, None, torch.zeros_like(self.counts)
        rows_read = torch.zeros((), dtype=torch.int64, device="cpu")
        implementation, data = self.problem.implementation, self.problem.data
        for here, chunk in data.chunks():
            weights = data.weights_of(here)
            if self.labels is None:
                distances, chunk_sums, chunk_counts = sum_clusters(implementation, chunk, centers, weights)
            else:
                bounds = None if self.bounds is None else self.bounds.of(here)
                distances, chunk_sums, chunk_counts = _sum_changes(
                    implementation, chunk, centers, self.labels[here], bounds, shifts, weights
                )
            rows_read += len(chunk) if shifts is None else len(chunk) - int(np.isnan(distances.numpy()).sum())
            objective += serial_sum(distances, weights) if shifts is None else 0.0
            sums = chunk_sums if sums is None else _add(sums, chunk_sums)
            counts += chunk_counts
        sums = torch.zeros_like(self.sums) if sums is None else sums
        total, sums, counts, rows_read = data.team.total(as_scalar(objective), sums, counts, rows_read)
        if self.labels is None:
            self.sums, self.counts = sums, counts
        else:
            _add(self.sums, sums)
            self.counts += counts
        self.centers, self.rows_read = centers, int(rows_read)
        self._set_objective(centers, float(total) if shifts is None else None)

    def measure(self, centers: Centers) -> float:
        """Moves labels and bounds to other centres, or to the same; returns the sum of all distances. One pass."""
        assert self.bounds is not None
        assert self.centers is not None
        assert self.labels is not None
        shifts, total, data = centers.shifts(self.centers), 0.0, self.problem.data
        for here, chunk in data.chunks():
            distances = self.problem.implementation.measure(
                chunk, centers, self.labels[here], self.bounds.of(here), shifts
            )
            total += serial_sum(distances, data.weights_of(here))
        self.centers = centers
        return float(data.team.total(as_scalar(total))[0])

    def _set_objective(self, centers: Centers, measured: float | None) -> None:
        """Sets the objective of a pass; `measured` is the sum of its distances, None if not every row was read."""
        self.is_measured = True
        if not self.measures:
            assert measured is not None
            self.objective = measured
            return
        along = centers.along(self.sums, self.counts)
        total, magnitude = float(along.sum()), float(along.abs().sum())
        # The distance of a row to a centre without direction is not that of the formula.
        has_directions = not centers.cosine or bool(centers.has_direction().all())
        if self.squares is not None:
            self.objective = self.squares - total
            least = max(self.measured / LARGEST_FALL, (abs(self.squares) + magnitude) * LEAST_SHARE)
            if self.problem.data.team.decide(has_directions and self.objective > least):
                self.is_measured = False
                return
        self.objective = self.measured = self.measure(centers) if measured is None else measured
        self.squares = self.objective + total
        has_digits = self.objective > (abs(self.squares) + magnitude) * LEAST_SHARE
        if not self.problem.data.team.decide(has_directions and has_digits):
            self.squares = None

    def mean_variance(self, centers: Centers) -> float:
        """Variance of each column, averaged over the columns, after a pass with `centers`; for cosine of unit rows.

        The squares of all rows come from the objective, sum_i |x_i - c_i|^2, unless the centres are so far from the
        rows that digits would be lost: then from one more pass. So they do with weights, since the variance, as in
        scikit-learn, is of the rows without them.
        """
        if self.problem.data.weights is not None:
            return mean_variance(self.problem.without_weights())
        n, total = self.problem.data.n, self.sums.sum(0)
        mean_square = 1.0
        if not centers.cosine:
            mean_square = (self.objective + float(centers.along(self.sums, self.counts).sum())) / n
            if self.problem.data.team.decide(mean_square * n * FAR_CENTERS < self.objective):
                return mean_variance(self.problem)
        return max(mean_square - float((total.sum(0) / n).square().sum()), 0.0) / self.problem.data.width

    def move(self, position: int, row: Tensor, source: int, target: int) -> None:
        """Moves one row of the data set, [levels, columns] as `Centers.rounded` gives it, to another cluster."""
        self.sums[:, source] -= row
        self.sums[:, target] += row
        self.counts[source] -= 1
        self.counts[target] += 1
        held = self.problem.data.held
        if self.labels is not None and position in held:
            self.labels[position - held.start] = target
            if self.bounds is not None:
                # Of the new centre nothing is known, and the earlier one is among the others now.
                self.bounds.upper[position - held.start] = math.inf
                self.bounds.lower[position - held.start] = 0.0


def _add(sums: Tensor, more: Tensor) -> Tensor:
    """Adds sums [levels, K, columns] to others, in place."""
    total = in_fp64(sums)
    total += in_fp64(more)
    return sums


def sum_clusters(
    implementation: ModuleType, x: Tensor, centers: Centers, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns distances [N], sums [levels, K, columns] and counts [K] of one chunk."""
    if hasattr(implementation, "follow"):
        _, distances, sums, counts = implementation.assign_and_sum(x, centers, weights)
    elif weights is None and len(centers.rounding) == 1:
        _, distances, sums, counts = implementation.assign_and_sum(x, centers)
    else:
        labels, distances = implementation.assign(x, centers)
        sums, counts = centers.sum_rows(x, labels, weights)
    return distances, _by_level(sums, centers), counts


def _sum_changes(
    implementation: ModuleType,
    x: Tensor,
    centers: Centers,
    labels: Tensor,
    bounds: Bounds | None,
    shifts: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `sum_clusters` minus the sums and counts by earlier `labels`, int32 [N], which are updated in place."""
    if hasattr(implementation, "follow"):
        more = () if bounds is None else (bounds, shifts)
        distances, sums, counts = implementation.follow(x, centers, labels, *more, weights=weights)
        return distances, _by_level(sums, centers), counts
    new_labels, distances = implementation.assign(x, centers)
    changed = (new_labels != labels).nonzero().squeeze(1)
    left = changed[labels[changed] >= 0]
    changed_weights, left_weights = (None, None) if weights is None else (weights[changed], weights[left])
    sums, counts = centers.sum_rows(x[changed], new_labels[changed], changed_weights)
    sums_before, counts_before = centers.sum_rows(x[left], labels[left].long(), left_weights)
    labels.copy_(new_labels)
    return distances, sums - sums_before, counts - counts_before


def _by_level(sums: Tensor, centers: Centers) -> Tensor:
    """Returns the sums of an implementation, which has no dimension for a single level, as [levels, K, columns]."""
    levels, columns = centers.rounding.shape
    return sums.view(levels, len(centers.points), columns)


def label_rows(problem: Problem, centers: Centers, partition: Partition | None = None) -> tuple[Tensor, float, Tensor]:
    """Returns the labels of this process's rows, int64; inertia and counts [K] of all rows.

    The bounds of a partition, if there is one, save comparisons with all centres.
    """
    data = problem.data
    if partition is not None and partition.bounds is not None and partition.labels is not None:
        inertia = partition.measure(centers)
        labels = partition.labels.long()
        (counts,) = data.team.total(_count(data, labels, len(centers.points)))
        return labels, inertia, counts
    labels = torch.empty(len(data.held), dtype=torch.int64, device=data.device)
    inertia = 0.0
    for here, chunk in data.chunks():
        labels[here], distances = problem.implementation.assign(chunk, centers)
        inertia += serial_sum(distances, data.weights_of(here))
    total, counts = data.team.total(as_scalar(inertia), _count(data, labels, len(centers.points)))
    return labels, float(total), counts


def _count(data: Dataset, labels: Tensor, n_clusters: int) -> Tensor:
    """Returns the counts [K] of this process's rows, without those of weight 0."""
    weights = data.weights_of(slice(None))
    return torch.bincount(labels if weights is None else labels[weights > 0], minlength=n_clusters)


def as_scalar(x: float) -> Tensor:
    """Returns a Python float as a tensor of the same bits."""
    return torch.tensor(x, dtype=torch.float64, device="cpu")


def mean_variance(problem: Problem) -> float:
    """Returns the variance of each column, averaged over the columns; of unit rows for the cosine metric. One pass."""
    center = problem.prepare(problem.summary.offset.unsqueeze(0))
    partition = Partition(problem._replace(bounds=False), 1)
    partition.update(center)
    return partition.mean_variance(center)
