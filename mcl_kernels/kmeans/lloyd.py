"""Lloyd's algorithm: initial centres, iterations, empty clusters. The passes over the data are an implementation's."""

from __future__ import annotations

import math
import time
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcl_kernels._rows import compute_dtype, normalize_rows
from mcl_kernels.kmeans import reference


class Clustering(NamedTuple):
    centers: Tensor  # [K, D]
    labels: Tensor  # int64 [N]
    inertia: float
    history: list[dict[str, Any]]


def initial_centers(x: Tensor, n_clusters: int, init: str, metric: str, generator: torch.Generator) -> Tensor:
    """Rows of x: distinct ones at random, or by greedy k-means++, which finds fewer where fewer differ.

    k-means++ draws each next centre with probability proportional to the squared distance to the nearest one
    so far; the greedy form draws 2 + log K candidates and keeps the best (scikit-learn does the same).
    """
    if init == "random":
        chosen = torch.randperm(len(x), generator=generator)[:n_clusters]
        return _rows(x, chosen, metric)
    n_candidates = 2 + int(math.log(n_clusters))
    first = torch.randint(len(x), (1,), generator=generator)
    centers = [_rows(x, first, metric)]
    nearest = reference.squared_distances(x, centers[0], metric).squeeze(1)
    while len(centers) < n_clusters:
        cumulative = nearest.double().cumsum(0).cpu()
        if cumulative[-1] == 0:
            break
        # side="right" never draws a row of distance 0, which is a centre already.
        drawn = torch.rand(n_candidates, dtype=torch.float64, generator=generator) * cumulative[-1]
        candidates = _rows(x, torch.searchsorted(cumulative, drawn, right=True).clamp(max=len(x) - 1), metric)
        reachable = torch.minimum(nearest.unsqueeze(1), reference.squared_distances(x, candidates, metric))
        best = int(reachable.sum(0, dtype=torch.float64).argmin())
        nearest = reachable[:, best]
        centers.append(candidates[best : best + 1])
    return torch.cat(centers)


def lloyd(
    x: Tensor, centers: Tensor, metric: str, max_iter: int, tol: float, largest: float, steps: ModuleType
) -> Clustering:
    """Iterates from `centers` until they move by at most `tol` (summed squared shift), or labels stay.

    The passes are those of `steps`, the module of an implementation; no entry of x is larger than `largest` by
    magnitude. The inertia never rises. An empty cluster takes, before the update, the row of the largest cluster that
    is farthest from its centre. One that cannot be filled, since no row is away from its centre, is left out.
    """
    history: list[dict[str, Any]] = []
    labels = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    for _ in range(max_iter):
        started = time.perf_counter()
        previous = labels
        labels, distances, sums, counts = steps.assign_and_sum(x, centers, metric, largest)
        inertia = float(distances.sum(dtype=torch.float64))
        sizes = counts.clone()
        splits = _fill_empty(x, labels, distances, sums, counts, metric)
        moved = _means(sums, counts, centers, metric)
        shift = float((moved - centers).double().square().sum())
        centers = moved
        history.append(
            {
                "objective": inertia,
                "shift": shift,
                "seconds": time.perf_counter() - started,
                "imbalance": float(sizes.max()) * len(centers) / len(x),
                "splits": splits,
            }
        )
        if splits == 0 and (shift <= tol or torch.equal(labels, previous)):
            break
    # An update can empty a cluster again: fill it as often as there are clusters, then give up.
    for _ in range(len(centers)):
        labels, distances, sums, counts = steps.assign_and_sum(x, centers, metric, largest)
        if not _fill_empty(x, labels, distances, sums, counts, metric):
            break
        centers = _means(sums, counts, centers, metric)
    labels, distances = steps.assign(x, centers, metric)
    occupied = torch.unique(labels)
    if len(occupied) < len(centers):  # without the others these have other roundings
        centers = centers[occupied]
        labels, distances = steps.assign(x, centers, metric)
    return Clustering(centers, labels, float(distances.sum(dtype=torch.float64)), history)


def _rows(x: Tensor, index: Tensor, metric: str) -> Tensor:
    """Rows of x in the dtype of the centres, of unit length for the cosine metric."""
    return torch.cat([tile for _, tile in reference.tiles(x[index.to(x.device)], compute_dtype(x), metric)])


def _means(sums: Tensor, counts: Tensor, centers: Tensor, metric: str) -> Tensor:
    means = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp(min=1).unsqueeze(1), centers.double())
    if metric == "cosine":
        means = normalize_rows(means)
    return means.to(centers.dtype)


def _fill_empty(x: Tensor, labels: Tensor, distances: Tensor, sums: Tensor, counts: Tensor, metric: str) -> int:
    """Moves rows to the empty clusters, in place; returns how many."""
    splits = 0
    for empty in (counts == 0).nonzero().squeeze(1).tolist():
        spread = torch.bincount(labels[distances > 0], minlength=len(counts)) > 0
        spread &= counts > 1
        if not bool(spread.any()):
            break
        largest = int(torch.where(spread, counts, -1).argmax())
        row = torch.where(labels == largest, distances, -1.0).argmax().reshape(1)
        moved = _rows(x, row, metric).double().squeeze(0)
        sums[largest] -= moved
        sums[empty] += moved
        counts[largest] -= 1
        counts[empty] += 1
        labels[row] = empty
        distances[row] = 0.0
        splits += 1
    return splits
