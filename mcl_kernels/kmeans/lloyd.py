"""Lloyd's algorithm, on all rows or on mini-batches, from given initial centres."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcl_kernels.kmeans.centers import prepare, serial_sum, squared_shifts
from mcl_kernels.kmeans.empty_clusters import fill_empty
from mcl_kernels.kmeans.passes import Partition, Problem, as_scalar, label_rows, mean_variance, sum_clusters
from mcl_kernels.kmeans.team import Team

_log = logging.getLogger(__name__)


class Restart(NamedTuple):
    """Result of one restart."""

    centers: Tensor  # [K, D]
    labels: Tensor  # int64, of the rows of this process
    inertia: float
    history: list[dict[str, Any]]


def lloyd(problem: Problem, points: Tensor, max_iter: int, tol: float) -> Restart:
    """Clusters the rows: iterates from the centres `points` until they have converged.

    That is when their summed squared shift is at most `tol` times the mean variance of the columns. Centres do not move
    if no label changes. The inertia never rises. Empty clusters are filled before the update (`fill_empty`).
    """
    history: list[dict[str, Any]] = []
    partition = Partition(problem, len(points))
    largest_shift = 0.0
    for _ in _with_bar(max_iter, problem.data.team):
        started = time.perf_counter()
        centers = problem.prepare(points)
        partition.update(centers)
        if tol and not history:
            largest_shift = tol * partition.mean_variance(centers)
        largest = float(centers.split(partition.sums, partition.counts)[1].max())
        splits = fill_empty(partition, centers)
        new_points = centers.means(partition.sums, partition.counts)
        entry = _record(started, problem, points, new_points, partition.objective, largest, splits)
        history.append(entry | {"read": partition.rows_read / problem.data.n})
        points, before = new_points, points
        if problem.data.team.decide(splits == 0 and history[-1]["shift"] <= largest_shift):
            break
    is_settled = splits == 0 and torch.equal(points, before) and int(partition.counts.min()) > 0
    return _finish(problem, points, history, partition, is_settled=is_settled)


def mini_batches(
    problem: Problem, points: Tensor, max_iter: int, tol: float, batch_size: int, generator: torch.Generator
) -> Restart:
    """Clusters the rows by mini-batches (Sculley 2010, rate 1 / count).

    Each batch moves a centre to the mean of all rows that batches have assigned to it so far. An iteration is a number
    of batches of N rows in all. Labels and inertia of all rows are computed at the end, where empty clusters are
    filled.
    """
    largest_shift = tol * mean_variance(problem) if tol else 0.0
    history: list[dict[str, Any]] = []
    levels, columns = problem.summary.rounding.shape
    sums = points.new_zeros(levels, len(points), columns, dtype=torch.float64)
    counts = points.new_zeros(len(points), dtype=torch.int64)
    sizes = counts.clone()
    for _ in _with_bar(max_iter, problem.data.team):
        started, before, sizes_before = time.perf_counter(), points, sizes
        objective = 0.0
        for batch, weights in problem.data.batches(batch_size, generator):
            centers = problem.prepare(points)
            distances, batch_sums, batch_counts = sum_clusters(problem.implementation, batch, centers, weights)
            batch_objective, batch_sums, batch_counts = problem.data.team.total(
                as_scalar(serial_sum(distances, weights)), batch_sums, batch_counts
            )
            sums += batch_sums
            counts += batch_counts
            points = centers.means(sums, counts)
            objective += float(batch_objective)
        sizes = centers.split(sums, counts)[1].clone()
        largest = float((sizes - sizes_before).max())
        history.append(_record(started, problem, before, points, objective, largest, 0) | {"read": 1.0})
        if problem.data.team.decide(history[-1]["shift"] <= largest_shift):
            break
    return _finish(problem, points, history)


def _with_bar(max_iter: int, team: Team) -> Iterator[int]:
    """Yields iteration numbers. The first process logs them, and after 2 s shows a progress bar on a terminal."""
    from tqdm import tqdm

    disable = None if team.rank == 0 else True  # None: only if the output is not a terminal
    for number in tqdm(range(max_iter), desc="k-means", unit="iteration", delay=2, leave=False, disable=disable):
        if team.rank == 0:
            _log.info("k-means: iteration %d of at most %d", number + 1, max_iter)
        yield number


def _record(
    started: float, problem: Problem, before: Tensor, after: Tensor, objective: float, largest: float, splits: int
) -> dict[str, Any]:
    """Entry of the history for one iteration, which began at time `started`; `largest` is a cluster's size."""
    return {
        "objective": objective,
        "shift": float(squared_shifts(after, before).sum()),
        "seconds": time.perf_counter() - started,
        "imbalance": largest * len(after) / problem.data.total_weight,
        "splits": splits,
    }


def _finish(
    problem: Problem,
    points: Tensor,
    history: list[dict[str, Any]],
    last: Partition | None = None,
    *,
    is_settled: bool = False,
) -> Restart:
    """Returns labels, as `predict` finds them, and inertia for the last centres.

    They are those of the partition of the last pass, if it is settled, no centre having moved since, and measured, else
    of one more pass. Then empty clusters are filled, or left out if there is no row to move.
    """
    public = _as_public(problem, points)
    labels = None
    if is_settled and last is not None and last.is_measured and torch.equal(points, public):
        labels = last.labels
    (passes_needed,) = problem.data.team.total(torch.tensor(labels is None, dtype=torch.int64, device="cpu"))
    if last is not None and labels is not None and int(passes_needed) == 0:
        return Restart(public, labels.long(), last.objective, history)
    points, fills_left = public, len(points)  # a bound: the update after a fill can empty a cluster again
    while True:
        final_centers = prepare(points, problem.metric, dtype=problem.summary.dtype)
        labels, inertia, counts = label_rows(problem, final_centers, last)
        last = None  # its centres are others from here on
        is_occupied = counts > 0
        if bool(is_occupied.all()):
            return Restart(points, labels, inertia, history)
        # One pass has no use for bounds.
        partition, centers = Partition(problem._replace(bounds=False), len(points)), problem.prepare(points)
        partition.update(centers)
        if fills_left and (splits := fill_empty(partition, centers)):
            fills_left -= 1
            history[-1]["splits"] += splits
            points = _as_public(problem, centers.means(partition.sums, partition.counts))
        else:
            points = points[is_occupied]


def _as_public(problem: Problem, points: Tensor) -> Tensor:
    """Returns the centres of the first process in their public dtype."""
    points = points.to(problem.data.centers_like.dtype)
    return problem.data.compute_on_first(lambda: points)
