"""Lloyd's algorithm: initial centres, iterations, empty clusters. The passes over the data are an implementation's."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcl_kernels.kmeans.centers import Centers, Summary, multiply, prepare, serial_sum, unit_rows
from mcl_kernels.kmeans.rows import Rows
from mcl_kernels.normalize import compute_dtype

_log = logging.getLogger(__name__)


class Problem(NamedTuple):
    """Rows to cluster by the passes of an implementation."""

    rows: Rows
    summary: Summary
    metric: str
    steps: ModuleType

    def prepare(self, points: Tensor) -> Centers:
        return prepare(points, self.metric, self.summary)

    def points(self, x: Tensor) -> Tensor:
        """Rows as centres, in the dtype of products: of unit length for the cosine metric."""
        x = x.to(self.summary.dtype)
        return unit_rows(x) if self.metric == "cosine" else x


class Clustering(NamedTuple):
    centers: Tensor  # [K, D]
    labels: Tensor  # int64 [N]
    inertia: float
    history: list[dict[str, Any]]


class Partition:
    """Which rows are nearest to which centre, followed from pass to pass: sums, numbers and the objective.

    Labels, of the rows that this process has, are kept as int32 where what changed is followed: by the implementation,
    or here where sums have several levels.
    """

    def __init__(self, problem: Problem, n_clusters: int) -> None:
        self.problem = problem
        device, (levels, width) = problem.rows.device, problem.summary.rounding.shape
        self.sums = torch.zeros(levels, n_clusters, width, dtype=torch.float64, device=device)
        self.counts = torch.zeros(n_clusters, dtype=torch.int64, device=device)
        self.labels: Tensor | None = None
        if hasattr(problem.steps, "follow") or levels > 1:
            self.labels = torch.full((len(problem.rows.held),), -1, dtype=torch.int32, device=device)

    def follow(self, centers: Centers) -> None:
        """One pass over all rows."""
        objective, begin = 0.0, 0
        sums, counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        for chunk in self.problem.rows.chunks():
            followed = None if self.labels is None else self.labels[begin : begin + len(chunk)]
            distances, of_chunk, in_chunk = _pass(self.problem.steps, chunk, centers, followed)
            objective += serial_sum(distances)
            sums += of_chunk
            counts += in_chunk
            begin += len(chunk)
        self.objective, (sums, counts) = self.problem.rows.total(objective, sums, counts)
        if self.labels is None:
            self.sums, self.counts = sums, counts
        else:
            self.sums += sums
            self.counts += counts

    def move(self, row: int, x: Tensor, source: int, to: int) -> None:
        """Row `row`, [levels, D] rounded as it is summed, to another centre."""
        self.sums[:, source] -= x
        self.sums[:, to] += x
        self.counts[source] -= 1
        self.counts[to] += 1
        held = self.problem.rows.held
        if self.labels is not None and row in held:
            self.labels[row - held.start] = to


def _pass(
    steps: ModuleType, x: Tensor, centers: Centers, followed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances, sums [levels, K, D] and numbers; of these, what changed since the labels `followed`, if given."""
    if hasattr(steps, "follow") or len(centers.rounding) == 1:
        if followed is None:
            _, distances, sums, counts = steps.assign_and_sum(x, centers)
        else:
            distances, sums, counts = steps.follow(x, centers, followed)
        return distances, sums.view(len(centers.rounding), *centers.points.shape), counts
    labels, distances = steps.assign(x, centers)
    if followed is None:
        return distances, *centers.sum_rows(x, labels)
    moved = (labels != followed).nonzero().squeeze(1)
    sums, counts = centers.sum_rows(x[moved], labels[moved])
    left = moved[followed[moved] >= 0]
    sums_before, counts_before = centers.sum_rows(x[left], followed[left].long())
    followed.copy_(labels)
    return distances, sums - sums_before, counts - counts_before


def initial_centers(problem: Problem, sample: Tensor, n_clusters: int, init: str, generator: torch.Generator) -> Tensor:
    """Rows of a sample: distinct ones at random, or by greedy k-means++, which finds fewer where fewer differ.

    k-means++ draws each next centre with probability proportional to the squared distance to the nearest one
    so far; the greedy form draws 2 + log K candidates and keeps the best (scikit-learn does the same).
    """
    if init == "random":
        chosen = torch.randperm(len(sample), generator=generator, device="cpu")[:n_clusters]
        return problem.points(sample[chosen.to(sample.device)])
    x = problem.points(sample)
    squared_distances = _squared_distances_among(x, problem.summary.offset)
    n_candidates = 2 + int(math.log(n_clusters))
    centers = torch.randint(len(x), (1,), generator=generator, device="cpu").to(x.device)
    nearest = squared_distances(centers)[0]
    while len(centers) < n_clusters:
        _log.info("k-means++: %d of %d centres", len(centers), n_clusters)
        cumulative = nearest.cumsum(0).cpu()
        if cumulative[-1] == 0:
            break
        # side="right" never draws a row of distance 0, which is a centre already.
        drawn = torch.rand(n_candidates, dtype=torch.float64, generator=generator, device="cpu") * cumulative[-1]
        candidates = torch.searchsorted(cumulative, drawn, right=True).clamp(max=len(x) - 1).to(x.device)
        reachable = torch.minimum(nearest, squared_distances(candidates))
        best = int(reachable.sum(1).argmin())
        nearest = reachable[best]
        centers = torch.cat((centers, candidates[best : best + 1]))
    return x[centers]


def mean_variance(problem: Problem) -> float:
    """The variance of each column, averaged over the columns; for cosine of the unit rows. One pass."""
    center, all_rows = problem.prepare(problem.summary.offset.unsqueeze(0)), Partition(problem, 1)
    all_rows.follow(center)
    n = problem.summary.rows
    mean_square = 1.0 if center.cosine else all_rows.objective / n
    return max(mean_square - float((all_rows.sums.sum(0) / n).square().sum()), 0.0) / problem.rows.width


def lloyd(problem: Problem, points: Tensor, max_iter: int, tol: float) -> Clustering:
    """Iterates from the centres `points` until they move by at most `tol` (summed squared shift).

    They do not move where no label changes. The inertia never rises. An empty cluster takes, before the update, the row
    of the largest cluster that is farthest from its centre.
    """
    history: list[dict[str, Any]] = []
    partition = Partition(problem, len(points))
    for _ in _with_bar(max_iter, problem.rows):
        started = time.perf_counter()
        centers = problem.prepare(points)
        partition.follow(centers)
        largest = int(partition.counts.max())
        splits = _fill_empty(partition, centers)
        moved = centers.means(partition.sums, partition.counts)
        history.append(_record(started, problem, points, moved, partition.objective, largest, splits))
        points = moved
        if problem.rows.decide(splits == 0 and history[-1]["shift"] <= tol):
            break
    return _finish(problem, points, history)


def mini_batches(
    problem: Problem, points: Tensor, max_iter: int, tol: float, batch_size: int, generator: torch.Generator
) -> Clustering:
    """Each batch moves the centres to the mean of all rows they were ever given (Sculley 2010, rate 1 / count).

    An iteration is as many batches as make up the data; then come labels and inertia of all rows, and no cluster is
    empty.
    """
    history: list[dict[str, Any]] = []
    sums = points.new_zeros(len(problem.summary.rounding), *points.shape, dtype=torch.float64)
    counts = points.new_zeros(len(points), dtype=torch.int64)
    for _ in _with_bar(max_iter, problem.rows):
        started, before, before_counts = time.perf_counter(), points, counts.clone()
        objective = 0.0
        for batch in problem.rows.batches(batch_size, problem.summary.rows, generator):
            centers = problem.prepare(points)
            distances, of_batch, in_batch = _pass(problem.steps, batch, centers)
            of_rows, (of_batch, in_batch) = problem.rows.total(serial_sum(distances), of_batch, in_batch)
            sums += of_batch
            counts += in_batch
            points = centers.means(sums, counts)
            objective += of_rows
        largest = int((counts - before_counts).max())
        history.append(_record(started, problem, before, points, objective, largest, 0))
        if problem.rows.decide(history[-1]["shift"] <= tol):
            break
    return _finish(problem, points, history)


def _with_bar(max_iter: int, rows: Rows) -> Iterator[int]:
    """The iterations, logged; where they last, with a bar on a terminal. The first shard shows those of all."""
    from tqdm import tqdm

    disable = None if rows.shard == 0 else True
    for number in tqdm(range(max_iter), desc="k-means", unit="iteration", delay=2, leave=False, disable=disable):
        if rows.shard == 0:
            _log.info("k-means: iteration %d of at most %d", number + 1, max_iter)
        yield number


def _record(
    started: float, problem: Problem, before: Tensor, after: Tensor, objective: float, largest: int, splits: int
) -> dict[str, Any]:
    return {
        "objective": objective,
        "shift": float((after - before).double().square().sum()),
        "seconds": time.perf_counter() - started,
        "imbalance": largest * len(after) / problem.summary.rows,
        "splits": splits,
    }


def _finish(problem: Problem, points: Tensor, history: list[dict[str, Any]]) -> Clustering:
    """Labels, as `predict` gives them, and inertia of the last centres. Empty ones are filled, or else left out."""
    fills_left = len(points)  # an update can empty a cluster again
    while True:
        points = _of_first(problem.rows, points.to(compute_dtype(problem.rows.like)))
        labels, objective, counts = _label(problem, prepare(points, problem.metric, dtype=problem.summary.dtype))
        occupied = counts > 0
        if bool(occupied.all()):
            return Clustering(points, labels, objective, history)
        partition, centers = Partition(problem, len(points)), problem.prepare(points)
        partition.follow(centers)
        if fills_left and (splits := _fill_empty(partition, centers)):
            fills_left -= 1
            history[-1]["splits"] += splits
            points = centers.means(partition.sums, partition.counts)
        else:
            points = points[occupied]


def _of_first(rows: Rows, points: Tensor) -> Tensor:
    return rows.from_first(lambda: points)


def _label(problem: Problem, centers: Centers) -> tuple[Tensor, float, Tensor]:
    """Labels of the rows that this process has; the inertia and the sizes of the clusters of all."""
    labels = torch.empty(len(problem.rows.held), dtype=torch.int64, device=problem.rows.device)
    objective, begin = 0.0, 0
    for chunk in problem.rows.chunks():
        labels[begin : begin + len(chunk)], distances = problem.steps.assign(chunk, centers)
        objective += serial_sum(distances)
        begin += len(chunk)
    objective, (counts,) = problem.rows.total(objective, torch.bincount(labels, minlength=len(centers.points)))
    return labels, objective, counts


def _fill_empty(partition: Partition, centers: Centers) -> int:
    """Moves rows to the centres that have none; returns how many.

    Numbers alone tell which clusters give rows. Then each process offers, for each move, its next farthest row.
    """
    problem, counts = partition.problem, partition.counts.clone()
    rows, held = problem.rows, problem.rows.held
    if int(counts.min()) > 0:
        return 0
    all_empty = (counts == 0).nonzero().squeeze(1).tolist()
    labels = torch.empty(len(held), dtype=torch.int32, device=counts.device)
    distances = torch.empty(len(held), dtype=centers.points.dtype, device=counts.device)
    begin = 0
    for chunk in rows.chunks():
        here = slice(begin, begin + len(chunk))
        labels[here], distances[here] = problem.steps.assign(chunk, centers)
        begin += len(chunk)
    least = 0.0  # above it a row differs from its centre, whose direction is rounded
    if centers.cosine:
        least = (4 * torch.finfo(compute_dtype(rows.like)).eps) ** 2
    away = torch.bincount(labels[distances > least], minlength=len(counts))  # rows that can be moved
    _, (away,) = rows.total(0.0, away)
    moves: list[tuple[int, int]] = []
    for empty in all_empty:
        movable = (away > 0) & (counts > 1)
        if not bool(movable.any()):
            break
        largest = int(torch.where(movable, counts, -1).argmax())
        away[largest] -= 1
        counts[largest] -= 1
        moves.append((largest, empty))
    offers = torch.zeros(rows.shards, len(moves), 2, dtype=torch.float64, device="cpu")  # distance and position
    for number, (largest, _) in enumerate(moves if held else ()):
        distance, row = torch.where(labels == largest, distances, 0.0).max(0)
        if distance > least:
            offers[rows.shard, number, 0], offers[rows.shard, number, 1] = float(distance), held[int(row)]
            distances[row] = 0.0
    _, (offers,) = rows.total(0.0, offers)
    farthest: dict[int, list[tuple[float, int]]] = {}
    for of_shard in offers.tolist():
        for (largest, _), (distance, row) in zip(moves, of_shard, strict=True):
            farthest.setdefault(largest, []).append((-distance, int(row)))
    in_order = {largest: iter(sorted(offered)) for largest, offered in farthest.items()}
    moved = sorted((next(in_order[largest])[1], largest, empty) for largest, empty in moves)
    taken = rows.take(torch.tensor([row for row, _, _ in moved], dtype=torch.int64, device="cpu"))
    for x, move in zip(centers.rounded(taken).unbind(1), moved, strict=True):
        partition.move(move[0], x, *move[1:])
    return len(moves)


def _squared_distances_among(x: Tensor, offset: Tensor) -> Callable[[Tensor], Tensor]:
    """|x_i - x_j|^2 of the rows i of an index and all j, fp64 [rows, N]; exactly 0 between equal rows."""
    relative = x - offset
    squares, tiny = relative.square().sum(1), torch.finfo(x.dtype).tiny

    def squared_distances(index: Tensor) -> Tensor:
        scale = squares[index].unsqueeze(1) + squares
        squared = scale - 2 * multiply(relative[index], relative)
        close = squared <= 1e-3 * scale + tiny  # rounding of the product would show: their differences are taken
        squared = squared.double()
        for i, row in enumerate(index.tolist()):
            near = close[i].nonzero().squeeze(1)
            squared[i, near] = (x[near].double() - x[row].double()).square().sum(1)
        return squared

    return squared_distances
