"""Weights of rows: scikit-learn's results, those of repeated rows, and the same bits however the rows are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mcl_kernels import KMeans
from mcl_kernels.kmeans import initial, rows
from mcl_kernels.kmeans.assign import load_implementation
from mcl_kernels.kmeans.centers import Centers, prepare
from mcl_kernels.kmeans.dataset import Dataset
from mcl_kernels.kmeans.initial import Sample, draw_sample, initial_centers
from mcl_kernels.kmeans.lloyd import fill_empty
from mcl_kernels.kmeans.passes import Partition, Problem, sum_clusters
from mcl_kernels.kmeans.rows import open_rows
from mcl_kernels.kmeans.summary import Summary, summarize, survey_columns
from mcl_kernels.kmeans.team import Team
from mcl_kernels.kmeans.weights import Weights
from tests import kmeans_cases
from tests.conftest import Backend
from tests.kmeans_cases import composed

backend, device, impl = kmeans_cases.backend, kmeans_cases.device, kmeans_cases.impl
METRICS = pytest.mark.parametrize("metric", ["euclidean", "cosine"])


def weighted_rows(n: int = 900, d: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows in overlapping clusters, and weights, of which every fifth is 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) + torch.randn(6, d, generator=generator)[torch.arange(n) % 6]
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    weights[::5] = 0
    return x, weights


def assert_same(fitted: KMeans, expected: KMeans) -> None:
    assert torch.equal(fitted.cluster_centers_, expected.cluster_centers_)
    assert torch.equal(fitted.labels_, expected.labels_)
    assert [entry["shift"] for entry in fitted.history_] == [entry["shift"] for entry in expected.history_]
    assert fitted.inertia_ == pytest.approx(expected.inertia_, rel=1e-12)


# The far rows of weight 0 raise the variance, and with it the shift at which a fit has converged.
@composed
@pytest.mark.parametrize("far", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_fit_is_that_of_scikit_learn(impl: str, device: str, dtype: torch.dtype, far: float) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x, weights = weighted_rows()
    x[::50] += far
    x = x.to(dtype)
    expected = cluster.KMeans(8, init=x[1:9].double().numpy(), n_init=1, algorithm="lloyd")
    expected.fit(x.double().numpy(), sample_weight=weights.numpy())
    fitted = KMeans(8, init=x[1:9], max_iter=300, impl=impl).fit(x.to(device), sample_weight=weights)
    assert fitted.n_iter_ == expected.n_iter_
    assert fitted.labels_.tolist() == expected.labels_.tolist()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    found, centers = fitted.cluster_centers_.double().cpu(), torch.from_numpy(expected.cluster_centers_)
    torch.testing.assert_close(found, centers, **tolerance)
    assert fitted.inertia_ == pytest.approx(expected.inertia_, rel=1e-6)
    assert fitted.score(x.to(device), sample_weight=weights) == pytest.approx(-expected.inertia_, rel=1e-6)
    objective = fitted.history_[-1]["objective"]
    assert objective == pytest.approx(expected.inertia_, rel=1e-3)


@composed
@METRICS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_integer_weights_repeat_rows(impl: str, device: str, metric: str, dtype: torch.dtype) -> None:
    x, weights = weighted_rows()
    x, times = x.to(device, dtype), (5 * weights).long()
    options: dict[str, Any] = {"metric": metric, "init": x[1:9], "max_iter": 6, "tol": 0, "impl": impl}
    repeated = KMeans(8, **options).fit(x.repeat_interleave(times.to(device), 0))
    for sample_weight in (times, times.int().numpy(), times.tolist(), times.to(device, torch.float32)):
        fitted = KMeans(8, **options).fit(x, sample_weight=sample_weight)
        # Entries are rounded to multiples of 2^-52 times a bound of the sums, of entries up to 4 here.
        eps, rounding = torch.finfo(fitted.cluster_centers_.dtype).eps, int(times.sum()) * 2.0**-50
        tolerance = {"rtol": 4 * eps, "atol": 4 * eps + rounding}
        torch.testing.assert_close(fitted.cluster_centers_, repeated.cluster_centers_, **tolerance)
        assert torch.equal(fitted.labels_.repeat_interleave(times.to(device)), repeated.labels_)
        assert torch.equal(fitted.labels_, fitted.predict(x))
        assert fitted.inertia_ == pytest.approx(repeated.inertia_, rel=1e-6)
        for name in ("objective", "imbalance", "shift"):
            expected = [entry[name] for entry in repeated.history_]
            assert [entry[name] for entry in fitted.history_] == pytest.approx(expected, rel=1e-5, abs=1e-9)


FORMS: dict[str, Callable[[Tensor, Path], Any]] = {
    "chunks": lambda x, path: x.split(37),
    "file": lambda x, path: np.load(path, mmap_mode="r"),
    "strided": lambda x, path: x.T.contiguous().T,
}


@METRICS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"init": "random"}, {"impl": "reference"}], ids=str)
def test_every_form_of_the_rows_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, metric: str, form: str, options: dict[str, Any]
) -> None:
    x, weights = weighted_rows()
    weights[7] = 1e-9  # several levels of sums
    np.save(tmp_path / "x.npy", x.numpy())
    monkeypatch.setattr(initial, "SAMPLE_ROWS", 300)
    kmeans = KMeans(8, metric=metric, max_iter=5, **options)
    expected = KMeans(**kmeans.get_params()).fit(x, sample_weight=weights)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 100 * x.shape[1] * 4)
    monkeypatch.setattr(rows, "CHUNK_MULTIPLE", 10)
    assert_same(kmeans.fit(FORMS[form](x, tmp_path / "x.npy"), sample_weight=weights), expected)
    assert expected.init_rows_ == 300


@METRICS
@pytest.mark.parametrize("smallest", [1.0, 1e-12])
def test_a_pass_of_every_implementation_has_the_same_sums(backend: Backend, metric: str, smallest: float) -> None:
    x, weights = (part.to(backend.device) for part in weighted_rows(300))
    weights[weights > 0] += 1
    weights[7] = smallest
    x = x.round() if metric == "euclidean" else torch.nn.functional.normalize(x.round() + 0.5)  # no ties, no rounding
    summary = summarize(
        300, x.amin(0), x.amax(0), *survey_columns(x, metric).float(), metric,
        weights=Weights.of(weights.cpu(), slice(300), x.device),
    )  # fmt: skip
    centers = prepare(x[:5] + 0.25, metric, summary)
    module = load_implementation(backend.impl, x.device)
    distances, sums, counts = sum_clusters(module, x, centers, weights)
    labels = module.assign(x, centers)[0]
    expected = torch.zeros(5, 8, dtype=torch.float64, device=x.device)
    relative = torch.nn.functional.pad(x.double() - centers.offset.double(), (0, 1), value=1.0)
    expected.index_add_(0, labels, relative * weights.unsqueeze(1))
    assert len(sums) == (1 if smallest == 1 else 2)
    torch.testing.assert_close(sums.sum(0), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, torch.bincount(labels[weights > 0], minlength=5))
    assert len(distances) == 300


@METRICS
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_sums_have_the_same_bits_in_any_order_of_rows(impl: str, metric: str) -> None:
    """One row has nearly all the weight: its sums bound little of what the others leave over."""
    x, weights = weighted_rows(9000)
    weights *= 2.0**-56
    weights[0] = 1
    summary = summarize(
        9000, x.amin(0), x.amax(0), *survey_columns(x, metric).float(), metric,
        weights=Weights.of(weights, slice(9000), x.device),
    )  # fmt: skip
    centers, module = prepare(x[:5], metric, summary), load_implementation(impl, x.device)
    _, sums, counts = sum_clusters(module, x, centers, weights)
    _, reversed_sums, reversed_counts = sum_clusters(module, x.flip(0), centers, weights.flip(0))
    assert torch.equal(sums, reversed_sums)
    assert torch.equal(counts, reversed_counts)


@METRICS
@pytest.mark.parametrize("smallest", [0.1, 1e-12])
def test_any_number_of_threads_gives_the_same_bits(metric: str, smallest: float) -> None:
    x, weights = weighted_rows(9000)
    weights[weights > 0] += smallest
    weights[7] = smallest
    kmeans, threads = KMeans(20, metric=metric, max_iter=5), torch.get_num_threads()
    expected = KMeans(**kmeans.get_params()).fit(x, sample_weight=weights)
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert_same(kmeans.fit(x, sample_weight=weights), expected)
            assert kmeans.inertia_ == expected.inertia_
    finally:
        torch.set_num_threads(threads)


@composed
@pytest.mark.parametrize("small", [1e-3, 1e-10, 1e-25])
def test_rows_of_small_weights_have_an_exact_mean(impl: str, device: str, small: float) -> None:
    """Sums of the rows of weight 1 must not round the others away."""
    x, weights = weighted_rows(600)
    weights = torch.where(torch.arange(600) < 200, small * (1 + weights), 1 + weights)
    x[:200] += 20
    fitted = KMeans(2, init=x[:2], impl=impl).fit(x.to(device), sample_weight=weights)
    assert fitted.n_iter_ > 2  # many rows change their label
    first, second = fitted.labels_[[0, -1]].tolist()
    assert fitted.labels_.tolist() == [first] * 200 + [second] * 400
    for part, label in ((slice(200), first), (slice(200, None), second)):
        center = fitted.cluster_centers_[label].cpu()
        expected = (weights[part, None] * x[part].double()).sum(0) / weights[part].sum()
        torch.testing.assert_close(center, expected.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"init": "random"}, {"batch_size": 64, "max_iter": 2}], ids=str)
def test_powers_of_2_change_the_inertia_alone(options: dict[str, Any]) -> None:
    x, weights = weighted_rows()
    expected = KMeans(8, **options).fit(x, sample_weight=weights)
    for factor in (2.0**-700, 2.0**-3, 2.0**900):
        fitted = KMeans(8, **options).fit(x, sample_weight=factor * weights)
        assert torch.equal(fitted.cluster_centers_, expected.cluster_centers_)
        assert fitted.inertia_ == factor * expected.inertia_
        objectives = [factor * entry["objective"] for entry in expected.history_]
        assert [entry["objective"] for entry in fitted.history_] == objectives


@composed
@METRICS
def test_rows_of_weight_0_change_no_bit(impl: str, device: str, metric: str) -> None:
    x, weights = weighted_rows()
    x, is_kept = x.to(device), weights > 0
    x[~is_kept] *= 1.1
    options: dict[str, Any] = {"metric": metric, "init": x[1:5], "tol": 0, "impl": impl}
    fitted = KMeans(4, **options).fit(x, sample_weight=weights)
    kept = KMeans(4, **options).fit(x[is_kept.to(device)], sample_weight=weights[is_kept])
    torch.testing.assert_close(fitted.cluster_centers_, kept.cluster_centers_, rtol=1e-6, atol=1e-6)
    assert torch.equal(fitted.labels_[is_kept.to(device)], kept.labels_)
    assert torch.equal(fitted.labels_, fitted.predict(x))


def test_weights_are_not_changed() -> None:
    x, weights = weighted_rows()
    weights[3] = 1e-300
    given = weights.clone()
    KMeans(8, max_iter=2).fit(x, sample_weight=weights)
    assert torch.equal(given, weights)


@METRICS
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_an_empty_cluster_takes_a_row_with_a_weight(monkeypatch: pytest.MonkeyPatch, impl: str, metric: str) -> None:
    """A cluster of rows of weight 0 is empty, and none of these, though they are the farthest, fills it."""
    filled: list[int] = []

    def fill(partition: Partition, centers: Centers) -> int:
        filled.append(fill_empty(partition, centers))
        assert bool((partition.counts > 0).all())
        return filled[-1]

    monkeypatch.setattr("mcl_kernels.kmeans.lloyd.fill_empty", fill)
    x, weights = weighted_rows()
    x += 3
    x[::5] *= 30
    apart = torch.full((1, 7), -50.0)
    x[::45] = apart
    init = torch.cat((x[1:5], apart, apart))
    kmeans = KMeans(6, metric=metric, init=init, impl=impl, tol=0, max_iter=30).fit(x, sample_weight=weights)
    assert filled[0] == 2
    masses = torch.zeros(6, dtype=torch.float64).index_add_(0, kmeans.labels_, weights)
    assert bool((masses > 0).all())
    assert torch.equal(kmeans.labels_, kmeans.predict(x))
    rows, centers = x.double(), kmeans.cluster_centers_
    rows = torch.nn.functional.normalize(rows, dim=1) if metric == "cosine" else rows
    expected = torch.zeros(6, 7, dtype=torch.float64).index_add_(0, kmeans.labels_, rows * weights.unsqueeze(1))
    expected = torch.nn.functional.normalize(expected) if metric == "cosine" else expected / masses.unsqueeze(1)
    torch.testing.assert_close(centers, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_cluster_whose_last_rows_have_no_weight_is_filled() -> None:
    """The update moves the two outer centres to the rows of the middle one, which keeps the row of weight 0."""
    x = torch.tensor([[0.0], [2.0], [10.0], [12.0], [6.0]])
    fitted = KMeans(3, init=torch.tensor([[-3.0], [6.0], [15.0]]), max_iter=1)
    fitted.fit(x, sample_weight=[1, 1, 1, 1, 0])
    assert fitted.history_[0]["splits"] == 1
    assert fitted.labels_[:4].unique().tolist() == [0, 1, 2]


def test_weights_far_below_the_largest_count_as_0() -> None:
    x = torch.tensor([[0.0], [4.0], [9.0]])
    assert KMeans(1).fit(x, sample_weight=[1.0, 1.0, 2.0**-101]).cluster_centers_.item() == 2
    assert KMeans(3, init=x).fit(x, sample_weight=[1.0, 1.0, 2.0**-100]).cluster_centers_.tolist() == x.tolist()
    message = "n_clusters must be at most the number of rows of positive weight: got 3 for 2 of 3 rows"
    with pytest.raises(ValueError, match=message):
        KMeans(3).fit(x, sample_weight=[1.0, 1.0, 2.0**-101])


def test_a_batch_moves_a_centre_by_the_weights_of_its_rows() -> None:
    x, weights = weighted_rows()
    chunks = x.split(300)
    fitted = KMeans(3, init=x[1:4], batch_size=300, max_iter=1).fit(chunks, sample_weight=weights)
    centers, sums, masses = x[1:4].double(), torch.zeros(3, 7, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for chunk, chunk_weights in zip(chunks, weights.split(300), strict=True):
        labels = torch.cdist(chunk.double(), centers).argmin(1)
        sums.index_add_(0, labels, chunk.double() * chunk_weights.unsqueeze(1))
        masses.index_add_(0, labels, chunk_weights)
        centers = sums / masses.unsqueeze(1)
    torch.testing.assert_close(fitted.cluster_centers_, centers.float(), rtol=1e-5, atol=1e-6)
    assert fitted.history_[0]["imbalance"] == pytest.approx(float(3 * masses.max() / weights.sum()))
    once, twice = (KMeans(3, batch_size=300, tol=0, max_iter=n).fit(chunks).history_[-1] for n in (1, 2))
    assert 1 <= once["imbalance"] <= 3
    assert 1 <= twice["imbalance"] <= 3


def test_drawn_batches_have_the_weights_of_their_rows() -> None:
    x = torch.arange(1000.0).unsqueeze(1)
    data = Dataset(open_rows("x", x), Team())
    data.set_weights(torch.arange(1000))
    for batch, weights in data.batches(64, torch.Generator().manual_seed(0)):
        assert weights is not None
        assert data.weights is not None
        assert torch.equal(weights * data.weights.unit, batch[:, 0].double())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_centres_are_drawn_in_proportion_to_weights(monkeypatch: pytest.MonkeyPatch, init: str, native: bool) -> None:
    """The first of two centres is drawn by weight, the second by weight times squared distance, or by weight alone.

    With ties among the candidates of k-means++ the greedy choice is that of the largest gain.
    """
    if not native:
        monkeypatch.setattr("mcl_kernels.backends.native.unavailable_reason", lambda device: "refused by the test")
    monkeypatch.setattr("mcl_kernels.kmeans.initial.math.log", lambda k: -1.0)  # one candidate: not greedy
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    weights = torch.tensor([4.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    zeros = torch.zeros(1, dtype=torch.float64)
    summary = Summary(torch.float32, torch.zeros(1), zeros, zeros, zeros.unsqueeze(0))
    problem = Problem(Dataset.__new__(Dataset), summary, "euclidean", torch, bounds=True)
    expected, share = torch.zeros(4, 4), weights / weights.sum()
    for i in range(4):
        seconds = weights * ((x - x[i]).double().square().squeeze(1) if init == "k-means++" else torch.ones(4))
        seconds[i] = 0
        expected[i] = share[i] * seconds / seconds.sum()
    counts, generator, draws = torch.zeros(4, 4), torch.Generator().manual_seed(0), 3000
    for _ in range(draws):
        centers = initial_centers(problem, Sample(x, weights), 2, init, generator)
        first, second = (x == centers[:1]).nonzero()[0, 0], (x == centers[1:]).nonzero()[0, 0]
        counts[first, second] += 1
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert bool(((counts / draws - expected).abs() <= 5 * deviation).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_best_candidate_has_the_largest_weighted_gain(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x, weights = weighted_rows(2000, 70)
    x = x.to(dtype)
    weights[weights > 0] = weights[weights > 0] ** 8
    native = KMeans(30, max_iter=1).fit(x, sample_weight=weights)
    monkeypatch.setattr("mcl_kernels.backends.native.unavailable_reason", lambda device: "refused by the test")
    torch_steps = KMeans(30, max_iter=1).fit(x, sample_weight=weights)
    assert torch.equal(native.cluster_centers_, torch_steps.cluster_centers_)
    assert not torch.equal(native.cluster_centers_, KMeans(30, max_iter=1).fit(x).cluster_centers_)


def test_a_sample_keeps_the_expected_weights() -> None:
    x = torch.arange(60.0).unsqueeze(1)
    data = Dataset(open_rows("x", x), Team())
    weights = torch.linspace(0, 1, 60, dtype=torch.float64) ** 6
    data.set_weights(weights)
    assert data.weights is not None
    totals, draws, generator = torch.zeros(60, dtype=torch.float64), 4000, torch.Generator().manual_seed(0)
    for _ in range(draws):
        sample = draw_sample(data, 20, generator)
        assert sample.weights is not None
        assert sample.size == 20
        assert bool((sample.take().diff(dim=0) > 0).all())
        totals[sample.take().squeeze(1).long()] += sample.weights * data.weights.unit
    assert totals[0] == 0
    for part in (slice(20), slice(20, 40), slice(40, 50), slice(50, 60)):
        assert float(totals[part].sum() / draws) == pytest.approx(float(weights[part].sum()), rel=0.2)
    assert float(totals.sum() / draws) == pytest.approx(float(weights.sum()), rel=0.01)


def test_a_sample_of_few_rows_with_a_weight_holds_all_of_them() -> None:
    data = Dataset(open_rows("x", torch.arange(100.0).unsqueeze(1)), Team())
    weights = torch.zeros(100)
    weights[[3, 50, 99]] = torch.tensor([1.0, 1e-9, 7.0])
    data.set_weights(weights)
    sample = draw_sample(data, 20, torch.Generator().manual_seed(0))
    assert data.weights is not None
    assert sample.take().squeeze(1).tolist() == [3.0, 50.0, 99.0]
    assert torch.equal(sample.weights, data.weights.every[[3, 50, 99]])


@METRICS
def test_methods_that_fit_take_weights(metric: str) -> None:
    x, weights = weighted_rows()
    fitted = KMeans(6, metric=metric).fit(x, None, weights)
    assert torch.equal(KMeans(6, metric=metric).fit_predict(x, sample_weight=weights), fitted.labels_)
    assert torch.equal(KMeans(6, metric=metric).fit_transform(x, sample_weight=weights), fitted.transform(x))
    for form in (x, x.numpy(), x.split(100)):
        assert fitted.score(form, sample_weight=weights) == pytest.approx(-fitted.inertia_, rel=1e-6)
    assert fitted.score(x, sample_weight=torch.zeros(900)) == 0
    with pytest.raises(ValueError, match="sample_weight must have a weight per row of x: got 900 for 899 rows"):
        fitted.score(x[1:], sample_weight=weights)


def test_series_are_weights() -> None:
    pandas = pytest.importorskip("pandas")
    x, weights = weighted_rows()
    expected = KMeans(6).fit(x, sample_weight=weights)
    assert_same(KMeans(6).fit(x, sample_weight=pandas.Series(weights.numpy())), expected)
    assert_same(KMeans(6).fit(x, sample_weight=pandas.Series(weights.numpy(), dtype="Float64")), expected)
    with pytest.raises(ValueError, match="sample_weight must be finite and at least 0: got nan in row 0"):
        KMeans(6).fit(x, sample_weight=pandas.Series([pandas.NA] * 900, dtype="Float64"))
    with pytest.raises(TypeError, match="sample_weight must be numbers: got Series"):
        KMeans(6).fit(x, sample_weight=pandas.Series(["a"] * 900, dtype="object"))
