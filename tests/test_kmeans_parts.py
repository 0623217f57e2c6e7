"""The same results however many programs share the centres of few rows, in Triton and in CUDA C++."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mcl_kernels.kmeans import gpu_common
from mcl_kernels.kmeans.centers import Centers, prepare
from mcl_kernels.kmeans.gpu_common import MAX_ROUNDS, choose_parts
from mcl_kernels.kmeans.triton import tile_table
from tests import kmeans_cases
from tests.conftest import Backend
from tests.kmeans_cases import normal
from tests.test_kmeans_passes import check_pass

backend = kmeans_cases.backend
shared = pytest.mark.parametrize(
    "backend", [x for x in kmeans_cases.BACKENDS if x.impl in ("triton", "cuda")], ids=str, indirect=True
)
LAUNCHERS = {"triton": "mcl_kernels.kmeans.triton.assign", "cuda": "mcl_kernels.kmeans.cuda"}
# 7 tiles of 64 centres or 13 of 32, the last one ragged. The last number of parts is more than tiles.
CENTERS = 391
PARTS = [2, 3, 7, 20]
# Equal centres, of which a row is one: of one tile, of two, of the first and the last one. Then almost equal ones.
EQUAL = [(3, 5), (10, 300), (1, 390)]
ALMOST_EQUAL = [(7, 8), (20, 310), (0, 389)]


class Results(NamedTuple):
    labels: Tensor
    distances: Tensor
    settled: Tensor  # int64, indices of the rows that the kernels left undecided
    inverse_norms: Tensor | None  # of each row for cosine


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = tile_table.Tiles(rows=64, columns=32, features=64, chunk=32, warps=4, stages=1)
    monkeypatch.setattr(tile_table, "INTERPRETED", tiles)


def assign(backend: Backend, x: Tensor, centers: Centers, parts: int | None) -> Results:
    launcher = importlib.import_module(LAUNCHERS[backend.impl])
    if backend.impl == "cuda":
        return Results(*launcher._assign(x, centers, parts=parts))
    return Results(*launcher.run_assign(x, centers, with_sums=False, parts=parts)[:4])


def make_rows(backend: Backend, dtype: torch.dtype, metric: str, n: int = 150) -> tuple[Tensor, Centers]:
    """Rows near centres all over, the first ones as near to two centres, or almost."""
    x = normal(CENTERS, 50, "cpu").to(dtype)
    points = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = x[torch.arange(n) * 7 % CENTERS] + (normal(n, 50, "cpu") / 4).to(dtype)
    for row, (first, second) in enumerate(EQUAL + ALMOST_EQUAL):
        points[second] = points[first]
        x[row] = points[first].to(dtype)
        points[first, 0] += 2.0**-22 * (row >= len(EQUAL))
    return x.to(backend.device), prepare(points.to(backend.device), metric)


@shared
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_number_of_parts(backend: Backend, poisoned_memory: None, dtype: torch.dtype, metric: str) -> None:
    """A row that is as near to two centres is undecided, whether they are of one part or two, and gets the first."""
    x, centers = make_rows(backend, dtype, metric)
    rows, points = x.double(), centers.points.double()
    rows = torch.nn.functional.normalize(rows, dim=1) if metric == "cosine" else rows
    exact = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    expected = exact.argmin(1)
    of_one = assign(backend, x, centers, 1)
    assert torch.equal(of_one.labels, expected)
    assert set(range(len(EQUAL))) <= set(of_one.settled.tolist())
    assert len(of_one.settled) < len(x) // 2
    for parts in PARTS:
        results = assign(backend, x, centers, parts)
        for name, value, same in zip(Results._fields, results, of_one, strict=True):
            assert value is same or torch.equal(value, same), (parts, name)


@shared
@pytest.mark.parametrize("n", [1, 33, 64])
def test_ragged_tiles_of_rows(backend: Backend, poisoned_memory: None, n: int) -> None:
    x, centers = make_rows(backend, torch.float32, "cosine")
    of_all = assign(backend, x, centers, 1)
    for parts in (2, 20):
        results = assign(backend, x[-n:], centers, parts)
        assert torch.equal(results.labels, of_all.labels[-n:])
        assert torch.equal(results.distances, of_all.distances[-n:])


@shared
def test_rows_that_are_not_finite_are_undecided(backend: Backend, poisoned_memory: None) -> None:
    x, centers = make_rows(backend, torch.float32, "euclidean", n=40)
    x[5, 3], x[33, 0] = torch.nan, torch.inf
    for parts in (1, 3):
        results = assign(backend, x, centers, parts)
        assert {5, 33} <= set(results.settled.tolist())
        assert results.distances.isfinite().logical_not().nonzero().flatten().tolist() == [5, 33]


@shared
def test_few_rows_are_shared_among_programs(
    backend: Backend, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, in a pass with sums of many centres too."""
    chosen = []

    def choose(row_tiles: int, center_tiles: int, at_a_time: int) -> int:
        chosen.append(choose_parts(row_tiles, center_tiles, at_a_time))
        return chosen[-1]

    launcher = importlib.import_module(LAUNCHERS[backend.impl])
    monkeypatch.setattr(launcher, "choose_parts", choose)
    monkeypatch.setattr(launcher if backend.impl == "triton" else gpu_common, "INTERPRETED_PROGRAMS", 20)
    check_pass(backend, normal(200, 20, backend.device), 150, "euclidean")
    assert len(chosen) == 2
    assert min(chosen) > 1


@pytest.mark.parametrize("at_a_time", [108, 132, 264])
@pytest.mark.parametrize("center_tiles", [1, 2, 20, 79, 782])
def test_number_of_parts(center_tiles: int, at_a_time: int) -> None:
    """The busiest multiprocessor has at most a quarter more than an even share, or less than a tile more."""
    for row_tiles in range(1, at_a_time):
        parts = choose_parts(row_tiles, center_tiles, at_a_time)
        assert row_tiles * parts <= MAX_ROUNDS * at_a_time
        busiest = -(-row_tiles * parts // at_a_time) * -(-center_tiles // parts)
        even = row_tiles * center_tiles / at_a_time
        assert busiest <= min(center_tiles, max(1.25 * even, even + 1)), (row_tiles, parts)
    for row_tiles in (0, at_a_time, at_a_time + 1, 10 * at_a_time):
        assert choose_parts(row_tiles, center_tiles, at_a_time) == 1
