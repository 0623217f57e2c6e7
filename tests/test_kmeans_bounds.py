"""Bounds of distances: a fit that skips the rows whose label cannot change has the bits of one that reads all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mcl_kernels import KMeans
from mcl_kernels.kmeans import passes
from mcl_kernels.kmeans.centers import Centers
from mcl_kernels.kmeans.passes import Partition
from tests import kmeans_cases
from tests.conftest import Backend, use_instruction_set
from tests.hypothesis_settings import examples
from tests.kmeans_fits import far_centers, grid_rows

backend = kmeans_cases.backend
HISTORY = ("objective", "shift", "imbalance", "splits")


def blobs(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=generator) + 6 * torch.randn(5, d, generator=generator)[torch.arange(n) % 5]


KINDS: dict[str, Any] = {
    "normal": lambda n, d, g: torch.randn(n, d, generator=g),
    "blobs": blobs,
    "grid": lambda n, d, g: torch.randint(-2, 3, (n, d), generator=g).float(),  # many ties
    "few distinct": lambda n, d, g: torch.randn(9, d, generator=g)[torch.randint(9, (n,), generator=g)],
    "far rows": lambda n, d, g: torch.cat((blobs(n - 2, d, g), 1e6 * torch.randn(2, d, generator=g))),
    "offset": lambda n, d, g: 1e4 + blobs(n, d, g),
    "tiny": lambda n, d, g: 1e-25 * blobs(n, d, g),
    "huge": lambda n, d, g: 1e25 * blobs(n, d, g),
    "zero rows": lambda n, d, g: blobs(n, d, g) * (torch.arange(n) % 3 > 0).unsqueeze(1),
    "sparse": lambda n, d, g: blobs(n, d, g) * (torch.rand(n, d, generator=g) > 0.9),
}


REPEATED = ("grid", "few distinct", "sparse", "zero rows")  # rows too few of which differ for many clusters


def assert_same_fit(x: Tensor, k: int, sample_weight: Tensor | None = None, **options: Any) -> KMeans:
    """Returns the fit with bounds."""
    bounded, plain = (
        KMeans(k, bounds=bounds, impl="native", **options).fit(x, sample_weight=sample_weight)
        for bounds in (True, False)
    )
    assert torch.equal(bounded.labels_, plain.labels_)
    assert torch.equal(bounded.cluster_centers_, plain.cluster_centers_)
    assert bounded.inertia_ == plain.inertia_
    for name in HISTORY:
        assert [entry[name] for entry in bounded.history_] == [entry[name] for entry in plain.history_]
    assert all(entry["read"] == 1 for entry in plain.history_)
    return bounded


@pytest.mark.parametrize("kind", KINDS)
@examples(20)
@given(data=st.data())
def test_every_bit_is_that_of_a_fit_without_bounds(
    kind: str, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    use_instruction_set(data.draw(st.sampled_from(["avx512", "avx2", "portable"])), monkeypatch)
    n, d = data.draw(st.integers(300, 1500)), data.draw(st.sampled_from([2, 5, 16, 37, 64, 150]))
    k = data.draw(st.sampled_from([1, 2, 3, 8, 16, 17, 40, *(() if kind in REPEATED else (80, 270))]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x = KINDS[kind](n, d, generator)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    if kind not in ("tiny", "huge") or dtype == torch.float64:
        x = x.to(dtype)
    metric, max_iter = data.draw(st.sampled_from(["euclidean", "cosine"])), data.draw(st.sampled_from([2, 5, 30]))
    init = x[torch.randperm(n, generator=generator)[:k]]
    weights = data.draw(st.sampled_from([None, torch.rand(n, generator=generator), torch.arange(n) % 4]))
    assert_same_fit(x, k, weights, metric=metric, init=init, max_iter=max_iter, tol=0)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [5, 40, 200])
def test_few_rows_are_read_when_few_move(backend: Backend, k: int, metric: str) -> None:
    if backend.impl != "native":
        pytest.skip("only the kernels for CPUs have bounds")
    x = blobs(20_000, 32, torch.Generator().manual_seed(0))
    fitted = assert_same_fit(x, k, metric=metric, init=x[:k], max_iter=40, tol=0)
    read = [entry["read"] for entry in fitted.history_]
    assert read[0] == 1
    assert min(read) < 0.7


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_clusters_that_are_filled(metric: str) -> None:
    x = torch.cat((grid_rows(900), blobs(300, 2, torch.Generator().manual_seed(1))))
    for weights in (None, torch.arange(1200) % 3):
        fitted = assert_same_fit(x, 7, weights, metric=metric, init=torch.from_numpy(far_centers(x)), tol=0)
        assert sum(entry["splits"] for entry in fitted.history_) > 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_clusters_that_are_filled_among_many(metric: str) -> None:
    x = torch.cat((grid_rows(900), blobs(300, 2, torch.Generator().manual_seed(1))))
    init = torch.cat((torch.from_numpy(far_centers(x)), x[-40:]))
    fitted = assert_same_fit(x, len(init), metric=metric, init=init, tol=0)
    assert sum(entry["splits"] for entry in fitted.history_) > 0


def test_a_moved_row_is_compared_with_the_centre_that_it_left() -> None:
    """A row moves to the empty cluster, and is then as near to the centre of its earlier one."""
    x = torch.zeros(18, 2)
    x[3:, 0] = 1000.0 * torch.arange(1, 16)
    init = torch.cat((torch.tensor([[100.0, 0.0], [1e6, 0.0]]), x[3:]))
    with pytest.warns(UserWarning, match="only 16 clusters"):
        fitted = assert_same_fit(x, 17, init=init, tol=0)
    assert torch.equal(fitted.labels_, fitted.predict(x))


def test_the_objective_is_that_of_the_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from sums, also where these are far larger: with a far row, and with clusters far from one another."""
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(3000, 16, generator=generator)
    far_row = torch.cat((near, torch.full((1, 16), 1e9)))
    far_clusters = near + 1e7 * (torch.arange(3000) % 3).unsqueeze(1)
    compared = []
    update = Partition.update

    def compare(partition: Partition, centers: Centers) -> None:
        update(partition, centers)
        differences = x.double().unsqueeze(1) - centers.points.double()
        nearest = differences.square().sum(2).min(1)
        assert torch.equal(partition.labels, nearest.indices.int())
        assert partition.objective == pytest.approx(float(nearest.values.sum()), rel=1e-6)
        compared.append(partition.is_measured)

    monkeypatch.setattr(Partition, "update", compare)
    for x, init in (
        (near, near[:5]),
        (far_row, far_row[:5]),
        (far_row, far_row[-5:]),
        (far_clusters, far_clusters[:6]),
    ):
        assert_same_fit(x, len(init), init=init, max_iter=30, tol=0)
    assert 0 < sum(compared) < len(compared)


def test_distances_are_measured_where_the_sums_lose_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = blobs(3000, 8, torch.Generator().manual_seed(0))
    expected = [entry["objective"] for entry in assert_same_fit(x, 5, init=x[:5], tol=0).history_]
    for name in ("LARGEST_FALL", "LEAST_SHARE"):
        with monkeypatch.context() as patched:
            patched.setattr(passes, name, 1.0 if name == "LARGEST_FALL" else 1e9)
            measured = assert_same_fit(x, 5, init=x[:5], tol=0)
        assert [entry["objective"] for entry in measured.history_] == pytest.approx(expected, rel=1e-6)
