"""Empty clusters: each takes the row of the largest cluster that is farthest from its centre.

Every process chooses the same moves, from the counts alone. For each move it then offers its own farthest row, and the
farthest of all offers is moved. The result is that of one process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mcl_kernels.kmeans.centers import Centers
from mcl_kernels.kmeans.passes import Partition, Problem


class Move(NamedTuple):
    """A row leaves cluster `source` for the empty cluster `target`."""

    source: int
    target: int


class _Assignment(NamedTuple):
    """Nearest centres of this process's rows."""

    labels: Tensor  # int32 [rows]
    distances: Tensor  # [rows]
    min_distance: float  # rows at most this far from their centre are equal to it within rounding


def fill_empty(partition: Partition, centers: Centers) -> int:
    """Moves a row to each centre without rows, as long as there are rows to move. Returns the number of moves."""
    if int(partition.counts.min()) > 0:
        return 0
    assignment = _assign(partition.problem, centers)
    moves = _choose_moves(partition, assignment)
    positions = _find_farthest(partition.problem, assignment, moves)
    _apply_moves(partition, centers, moves, positions)
    return len(moves)


def _assign(problem: Problem, centers: Centers) -> _Assignment:
    data = problem.data
    labels = torch.empty(len(data.held), dtype=torch.int32, device=data.device)
    distances = torch.empty(len(data.held), dtype=centers.points.dtype, device=data.device)
    for here, chunk in data.chunks():
        labels[here], distances[here] = problem.implementation.assign(chunk, centers)
    if data.weights is not None:
        distances[data.weights.held == 0] = 0.0  # as rows that are equal to their centre, which cannot be moved
    # Directions of centres are rounded to their public dtype, so that the distance of an equal row may exceed 0.
    rounding = torch.finfo(data.centers_like.dtype).eps
    return _Assignment(labels, distances, (4 * rounding) ** 2 if centers.cosine else 0.0)


def _choose_moves(partition: Partition, assignment: _Assignment) -> list[Move]:
    """Chooses the largest cluster with a movable row as the source of each move."""
    counts = partition.counts.clone()
    labels, distances, min_distance = assignment
    movable_counts = torch.bincount(labels[distances > min_distance], minlength=len(counts))
    (movable_counts,) = partition.problem.data.team.total(movable_counts)
    moves: list[Move] = []
    for target in (counts == 0).nonzero().squeeze(1).tolist():
        is_source = (movable_counts > 0) & (counts > 1)
        if not bool(is_source.any()):
            break
        source = int(torch.where(is_source, counts, -1).argmax())
        movable_counts[source] -= 1
        counts[source] -= 1
        moves.append(Move(source, target))
    return moves


def _find_farthest(problem: Problem, assignment: _Assignment, moves: list[Move]) -> list[int]:
    """Returns the position of the row of each move: farthest rows of its source first, of equally far ones the first.

    Sources get as many offers as they have moves from each process, so that the offers hold the farthest rows of all.
    """
    offers_by_source: dict[int, list[tuple[float, int]]] = {}
    for process_offers in _gather_offers(problem, assignment, moves).tolist():
        for move, (distance, position) in zip(moves, process_offers, strict=True):
            offers_by_source.setdefault(move.source, []).append((-distance, int(position)))
    farthest_first = {source: iter(sorted(offers)) for source, offers in offers_by_source.items()}
    return [next(farthest_first[move.source])[1] for move in moves]


def _gather_offers(problem: Problem, assignment: _Assignment, moves: list[Move]) -> Tensor:
    """Distance and position of the next farthest row of each process for each move, fp64 [processes, moves, 2].

    The distance is 0 if the process has no more row to offer.
    """
    team, held = problem.data.team, problem.data.held
    labels, distances, min_distance = assignment
    offers = torch.zeros(team.size, len(moves), 2, dtype=torch.float64, device="cpu")
    for number, move in enumerate(moves if held else ()):
        distance, row = torch.where(labels == move.source, distances, 0.0).max(0)
        if distance > min_distance:
            offers[team.rank, number, 0], offers[team.rank, number, 1] = float(distance), held[int(row)]
            distances[row] = 0.0  # in place: each row is offered once
    (offers,) = team.total(offers)
    return offers


def _apply_moves(partition: Partition, centers: Centers, moves: list[Move], positions: list[int]) -> None:
    """Moves the rows, in ascending order of their positions."""
    in_order = sorted(zip(positions, moves, strict=True))
    index = torch.tensor([position for position, _ in in_order], dtype=torch.int64, device="cpu")
    data = partition.problem.data
    weights = None if data.weights is None else data.weights.every[index].to(data.device)
    rows = centers.rounded(data.take(index), weights)
    for row, (position, move) in zip(rows.unbind(1), in_order, strict=True):
        partition.move(position, row, *move)
