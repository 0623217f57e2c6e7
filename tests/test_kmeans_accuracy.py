"""Labels, centres and inertia of k-means against fp64, for data that is sensitive to rounding.

The data has any units, is far from 0, or has rows or centres far from the others.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mcl_kernels import KMeans
from mcl_kernels.kmeans.assign import find_nearest
from mcl_kernels.kmeans.centers import unit_rows
from mcl_kernels.kmeans.initial import _squared_distances_among
from mcl_kernels.kmeans.summary import survey_columns
from tests import kmeans_cases
from tests.conftest import EMULATED, Backend, use_instruction_set
from tests.hypothesis_settings import examples
from tests.kmeans_cases import normal

backend = kmeans_cases.backend  # a fixture

# By dtype: the smallest spread of a column relative to its offset at which its entries still differ.
RESOLUTION = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-7, torch.float64: 1e-15}
UNITS = {torch.float16: 2, torch.bfloat16: 30, torch.float32: 30, torch.float64: 30}  # powers of ten


class Data(NamedTuple):
    x: Tensor
    centers: Tensor


@st.composite
def data(draw: st.DrawFn, metric: str) -> Data:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(list(UNITS)))
    n, d, k = (
        draw(st.integers(30, 120)),
        draw(st.sampled_from([1, 3, 16, 33, 64])),
        draw(st.sampled_from([2, 5, 16, 40])),
    )
    x = random.normal(size=(n, d))
    if draw(st.booleans()):  # clusters, which may be narrow
        x = random.normal(size=(k, d))[np.arange(n) % k] + x * 10.0 ** draw(st.integers(-4, 0))
    if draw(st.booleans()):  # columns of different units
        x *= 10.0 ** random.integers(-2, 3, size=d)
    # An offset at which the dtype still resolves the rows; then some rows far from the others.
    x += 10.0 ** draw(st.integers(-2, int(-np.log10(RESOLUTION[dtype])) - 1)) * draw(st.sampled_from([0, 0, 1, -1]))
    unit = 10.0 ** draw(st.integers(-UNITS[dtype], UNITS[dtype]))
    largest = float(torch.finfo(dtype).max) if dtype != torch.float64 else 1e150
    x = x * min(unit, largest / 8 / np.abs(x).max())
    far = draw(st.integers(0, 3))
    if far:
        x[random.integers(n, size=far)] *= 10.0 ** draw(st.integers(1, 60))
    x = torch.from_numpy(np.clip(x, -largest / 2, largest / 2)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Rows as centres, as k-means++ draws them: some far from the others, some equal.
    centers = x[torch.from_numpy(random.choice(n, size=min(k, n)))].to(wide)
    if draw(st.booleans()):
        centers = centers + torch.from_numpy(random.normal(size=centers.shape)).to(wide) * 1e-3 * centers.abs()
    if metric == "cosine":
        if draw(st.booleans()):  # without a direction
            x[:: draw(st.integers(2, 9))] = 0.0
            centers[draw(st.integers(0, len(centers) - 1))] = 0.0
        centers = unit_rows(centers)
    return Data(x, centers)


def exact_distances(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    """Squared distances in fp64, [N, K]; for cosine 1 - <x, c> of unit vectors, 1 for a zero row or centre."""
    x, centers = x.double(), centers.double()
    if metric == "euclidean":
        return (x[:, None] - centers[None]).square().sum(2)
    x, centers = unit_rows(x), unit_rows(centers)
    halves = (x[:, None] - centers[None]).square().sum(2) / 2
    return torch.where((x == 0).all(1, keepdim=True) | (centers == 0).all(1), 1.0, halves)


def near(smallest: Tensor, metric: str) -> Tensor:
    """Largest distance equal to the smallest one within rounding; directions are rounded, differences are not."""
    return smallest * (1 + 1e-9) + (1e-14 * smallest.sqrt() + 1e-30 if metric == "cosine" else 0.0)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_labels_equal_those_of_fp64(backend: Backend, metric: str) -> None:
    @examples(100, emulated=backend in EMULATED)
    @given(data(metric))
    def check(drawn: Data) -> None:
        x, centers = drawn.x.to(backend.device), drawn.centers.to(backend.device)
        labels, distances = find_nearest(x, centers, metric, backend.impl)
        exact = exact_distances(x, centers, metric)
        own = exact.gather(1, labels.unsqueeze(1)).squeeze(1)
        assert (own <= near(exact.min(1).values, metric)).all()
        representable = (own > (1e-22 if metric == "cosine" else 1e-30)) & (own < 1e37)
        torch.testing.assert_close(distances[representable], own[representable].float(), rtol=2e-4, atol=0)

    check()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_fit_equals_that_of_fp64(backend: Backend, metric: str) -> None:
    """One iteration on all rows or on mini-batches; then labels and inertia of the resulting centres."""

    @examples(60, emulated=backend in EMULATED)
    @given(data(metric), st.sampled_from(["given", "k-means++"]), st.sampled_from([None, None, 25]))
    def check(drawn: Data, init: str, batch_size: int | None) -> None:
        x, centers = drawn.x.to(backend.device), drawn.centers.to(backend.device)
        k = len(centers) if init == "given" else 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there may be fewer clusters than n_clusters
            start = centers if init == "given" else init
            kmeans = KMeans(k, metric=metric, init=start, max_iter=1, batch_size=batch_size, impl=backend.impl)
            fit = kmeans.fit(x)
        assert torch.equal(fit.predict(x), fit.labels_)
        exact = exact_distances(x, fit.cluster_centers_, metric)
        own = exact.gather(1, fit.labels_.unsqueeze(1)).squeeze(1)
        assert (own <= near(exact.min(1).values, metric)).all()
        assert fit.inertia_ == pytest.approx(float(own.sum()), rel=1e-4, abs=1e-22 if metric == "cosine" else 1e-320)
        if init == "k-means++" or batch_size or fit.history_[0]["splits"] or len(fit.cluster_centers_) < k:
            return
        exact = exact_distances(x, centers, metric)
        two = exact.topk(2, dim=1, largest=False).values
        if metric == "cosine" or (two[:, 1] <= two[:, 0] * (1 + 1e-9)).any():
            return  # any of equally near centres may be chosen
        for j in range(k):
            own_rows = x.double()[exact.argmin(1) == j]
            if len(own_rows) == 0:
                continue
            mean = own_rows.mean(0)
            spread = (own_rows - mean).abs().amax(0)
            # The centre is rounded to its dtype, and before that relative to the middle of the data; sums keep 24 bits
            # of a column's scale.
            middle, scale = survey_columns(x, metric).to(x.device)
            rounded = 4 * torch.finfo(fit.cluster_centers_.dtype).eps * (mean.abs() + middle.abs())
            tolerance = rounded + 2.0**-24 * scale + 1e-4 * spread + 1e-44
            assert ((fit.cluster_centers_[j].double() - mean).abs() <= tolerance).all()

    check()


def test_a_centre_without_a_direction(backend: Backend) -> None:
    x = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], device=backend.device)
    centers = torch.tensor([[0.3, 0.954, 0.0], [0.3, -0.954, 0.0], [0.0, 0.0, 0.0]], device=backend.device)
    labels, distances = find_nearest(x, centers, "cosine", backend.impl)
    assert labels.tolist() == [0, 2, 0]
    assert distances.tolist() == pytest.approx([0.7, 1.0, 1.0], abs=1e-3)
    assert KMeans(1, metric="cosine", impl=backend.impl).fit(x[:2]).inertia_ == 2.0


# So many rows that one level of sums would lose digits of the narrow clusters if an entry is far from them.
@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("far", [0.0, 200.0, 5e4, 1e15])
def test_sums_keep_the_digits_of_a_narrow_cluster(impl: str, far: float) -> None:
    random = torch.Generator().manual_seed(0)
    middles = torch.tensor([-2.469, -1.2345, 1.2345, 2.469])
    x = (middles[torch.arange(1 << 17) % 4] + 1e-6 * torch.randn(1 << 17, generator=random)).unsqueeze(1)
    init = middles.unsqueeze(1)
    if far:
        x[77], init = far, torch.cat((init, torch.tensor([[far]])))
    fit = KMeans(len(init), init=init, max_iter=2, impl=impl).fit(x)
    means = [x[fit.labels_ == j].double().mean() for j in range(4)]
    torch.testing.assert_close(fit.cluster_centers_[:4, 0].double(), torch.stack(means), rtol=1.3e-7, atol=0)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_sums_keep_rare_entries(impl: str) -> None:
    """A far entry in a column whose other nonzero entries are too rare for the survey of some rows to find them."""
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    rare = torch.arange(20_000) % 2003 == 7
    x[:, 1] = torch.where(rare, 1000 + 0.1 * x[:, 1], 0.0)
    x[5, 1] = 1e15
    init = torch.tensor([[0.0, 0.0], [0.0, 1000.0], [0.0, 1e15]])
    for rows in (x, x.split(777)):
        fit = KMeans(3, init=init, max_iter=2, impl=impl).fit(rows)
        assert float(fit.cluster_centers_[1, 1]) == pytest.approx(float(x[rare, 1].double().mean()), rel=1e-6)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_precision_of_fp32_products_changes_no_label(precision: str) -> None:
    x, centers = normal(4000, 64, "cpu"), normal(200, 64, "cpu") * 0.9
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        labels = find_nearest(x, centers, "euclidean", "reference")[0]
        fit = KMeans(40, max_iter=1, impl="reference").fit(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(labels, exact_distances(x, centers, "euclidean").argmin(1))
    assert torch.equal(fit.labels_, KMeans(40, max_iter=1, impl="reference").fit(x).labels_)


@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "portable"])
def test_long_rows_of_few_centers(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of many elements of one sign, whose rounding adds up, for rows nearly halfway between two centres."""
    use_instruction_set(instruction_set, monkeypatch)
    centers = torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.7857821]).unsqueeze(1).expand(-1, 65_536).contiguous()
    x = torch.linspace(1.39280, 1.39299, 40).unsqueeze(1).expand(-1, 65_536).contiguous()
    labels = find_nearest(x, centers, "euclidean", "native")[0]
    assert torch.equal(labels, torch.cdist(x[:, :1].double(), centers[:, :1].double()).argmin(1))


def test_k_means_plus_plus_resolves_rows_whose_squares_underflow() -> None:
    x = torch.tensor([[-3.0], [0.0], [1e-25], [3.0]])
    squared = _squared_distances_among(x, torch.zeros(1))(torch.tensor([1, 2]))
    torch.testing.assert_close(squared, (x.double() - x[1:3].double().T).square().T, rtol=1e-6, atol=0)


def test_an_inertia_beyond_fp64() -> None:
    x = (torch.rand(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5) * 4.6e153
    assert KMeans(2, n_init=2).fit(x).inertia_ == float("inf")


def test_equal_directions_are_one_row() -> None:
    """Rows that equal their centre within the rounding of its direction are not moved to empty clusters."""
    x = normal(5, 3, "cpu").repeat(40, 1) * torch.rand(200, 1, generator=torch.Generator().manual_seed(0)).add(0.5)
    with pytest.warns(UserWarning, match="clusters hold a row"):
        fit = KMeans(60, metric="cosine", init=normal(60, 3, "cpu"), max_iter=5).fit(x)
    assert sum(step["splits"] for step in fit.history_) < 60


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
def test_restarts_are_compared_in_any_units(unit: float) -> None:
    random = np.random.default_rng(0)
    middles = random.uniform(-8, 8, (12, 2))
    x = np.concatenate([random.normal(middle, 0.3, (60, 2)) for middle in middles]).astype(np.float32)
    one, best = (KMeans(12, n_init=n).fit(x * np.float32(unit)).inertia_ / unit**2 for n in (1, 20))
    assert one == pytest.approx(143.7325, rel=1e-5)
    assert best == pytest.approx(125.4370, rel=1e-5)


@pytest.mark.parametrize("unit", [1e-23, 1.0, 1e30])
def test_too_few_different_rows_give_a_warning(unit: float) -> None:
    x = torch.tensor([[0.0], [1.0], [5.0], [6.0], [6.0]]) * unit
    assert KMeans(2).fit(x).labels_.tolist() in ([0, 0, 1, 1, 1], [1, 1, 0, 0, 0])
    assert len(KMeans(4).fit(x).cluster_centers_) == 4  # a warning would raise here
    with pytest.warns(UserWarning, match="n_clusters=5 but only 4 clusters hold a row"):
        KMeans(5).fit(x)


@pytest.mark.slow
def test_more_centers_than_consecutive_integers_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    use_instruction_set("portable", monkeypatch)  # its centres need the least memory
    centers = torch.full((2**24 + 6, 1), 1e6)
    centers[2**24 + 1] = 5.0
    labels, distances = find_nearest(torch.tensor([[5.0], [2e6]]), centers, "euclidean", "native")
    assert labels.tolist() == [2**24 + 1, 0]
    assert distances.tolist() == [0.0, pytest.approx(1e12)]
