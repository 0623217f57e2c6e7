"""One pass of k-means: nearest centres, and the exact sums of their rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mcl_kernels import KMeans, assign_clusters
from mcl_kernels.kmeans import gpu_common, reference
from mcl_kernels.kmeans.assign import find_nearest, load_implementation
from mcl_kernels.kmeans.centers import prepare
from mcl_kernels.kmeans.rows import find_extremes
from mcl_kernels.kmeans.summary import Summary, summarize, survey_columns
from mcl_kernels.kmeans.triton import tile_table
from mcl_kernels.normalize import compute_dtype
from tests import kmeans_cases
from tests.conftest import EMULATED, Backend, unavailable_reason
from tests.kmeans_cases import blobs, normal

backend, device, impl = kmeans_cases.backend, kmeans_cases.device, kmeans_cases.impl


def summary_of(x: Tensor, metric: str, n: int | None = None) -> Summary:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    low, high = x.amin(0), x.amax(0)
    return summarize(n or len(x), low, high, *survey_columns(x, metric).to(wide), metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_row_gets_the_same_label_in_any_batch(backend: Backend, metric: str) -> None:
    # Random directions and many clusters give near-ties, which another rounding would decide otherwise.
    if backend.impl == "faiss":
        pytest.skip("labels of near-ties depend on the rows around")
    x, slow = normal(3000, 48, backend.device), backend in EMULATED
    kmeans = KMeans(20 if slow else 200, metric=metric, max_iter=3, impl=backend.impl).fit(x)
    for size in (1, 7, 256, 1025):
        n_rows = min(20 * size if slow or size == 1 else 3000, 3000)
        parts = [kmeans.predict(x[i : min(i + size, 3000)]) for i in range(0, n_rows, size)]
        assert torch.equal(torch.cat(parts), kmeans.labels_[: sum(map(len, parts))])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_assign_against_all_distances(impl: str, device: str, metric: str) -> None:
    x, _ = blobs(device=device)
    centers = x[:7] + 0.1
    labels, distances = find_nearest(x, centers, metric, impl)
    if metric == "euclidean":
        all_distances = torch.cdist(x.double(), centers.double()).square()
    else:
        all_distances = 1 - torch.nn.functional.cosine_similarity(x.double()[:, None], centers.double()[None], dim=2)
    expected = all_distances.min(1)
    assert torch.equal(labels, expected.indices)
    assert torch.equal(labels, assign_clusters(x, centers, metric=metric)[0])
    torch.testing.assert_close(distances, expected.values.float(), rtol=1e-4, atol=1e-5)
    assert distances.dtype == torch.float32
    assert (distances >= 0).all()
    assert (find_nearest(x, x[:50], metric, impl)[1] >= 0).all()  # distances of the centres themselves are close to 0


def test_every_product_has_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of fewer rows may be rounded otherwise, so that a label would depend on the batch."""
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
    assert find_nearest(x, centers, "euclidean", impl)[0].tolist() == [1, 0]
    # Ties in every lane of a vector, and after the first tile of centres.
    assert find_nearest(x, centers.repeat(100, 1), "euclidean", impl)[0].tolist() == [1, 0]


def test_rows_without_a_direction(impl: str, device: str) -> None:
    """All centres are equally far from a zero row; a row close to 0 has a direction."""
    centers = torch.eye(4, device=device)[[2, 1, 0]]
    x = torch.zeros(4, 4, device=device)
    x[1, 1], x[2, 0], x[3, 2] = 1e-13, 1e-42, 3e38
    labels, distances = find_nearest(x, centers, "cosine", impl)
    assert labels.tolist() == [0, 1, 2, 0]
    assert distances.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-30)


def check_pass(backend: Backend, x: Tensor, k: int, metric: str) -> None:
    """Asserts that labels are of nearest centres, within rounding, and that sums and counts are those of the labels."""
    if backend.impl == "faiss" and x.dtype == torch.float64:
        pytest.skip("faiss computes in fp32")
    module, (n, d) = load_implementation(backend.impl, x.device), x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    centers = x[torch.arange(k, device=x.device) * n // k].to(wide)
    rows = x.to(wide)
    if metric == "cosine":
        rows, centers = (torch.nn.functional.normalize(z, dim=1) for z in (rows, centers))
    prepared = prepare(centers, metric, summary_of(x, metric))
    labels, distances, sums, counts = module.assign_and_sum(x, prepared)
    sums += counts.unsqueeze(1) * prepared.offset.double()

    exact = torch.cdist(rows.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    exact = exact / 2 if metric == "cosine" else exact
    nearest = exact.min(1).values
    tolerance = {"rtol": 1e-4, "atol": 1e-6 * d} if wide == torch.float32 else {"rtol": 1e-10, "atol": 1e-12 * d}
    torch.testing.assert_close(distances.double(), nearest, **tolerance)
    torch.testing.assert_close(exact.gather(1, labels.unsqueeze(1)).squeeze(1), nearest, **tolerance)
    assert torch.equal(counts, labels.bincount(minlength=k))
    expected = torch.zeros(k, d, dtype=torch.float64, device=x.device).index_add_(0, labels, rows.double())
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6 if wide == torch.float32 else 1e-9)
    assert torch.equal(module.assign(x, prepared)[0], labels)


# K: 1, one more than a vector, more than a tile of centres. D: less than a vector, several passes of a product. N: less
# than a group of rows, more than a thread takes at a time.
@pytest.mark.parametrize(("n", "d", "k"), [(5, 1, 1), (300, 3, 17), (2000, 130, 16), (4000, 20, 500), (3100, 512, 10)])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_pass(
    backend: Backend, poisoned_memory: None, metric: str, n: int, d: int, k: int, dtype: torch.dtype
) -> None:
    if backend in EMULATED:  # fewer centres; in one case still more than a tile
        n, k = min(n, 2100), min(k, 270 if (metric, dtype) == ("euclidean", torch.float32) else 40)
    check_pass(backend, (normal(n, 2 * d, backend.device) + 3).to(dtype)[:, ::2], k, metric)


# D: less than the smallest side of a product, several parts with a ragged last one. K: few centres, whose rows are
# summed in the pass, and many, whose rows are summed after it.
@pytest.mark.parametrize("k", [5, 33])
@pytest.mark.parametrize("d", [1, 3, 17, 64, 768, 1000, 4096])
def test_widths(backend: Backend, poisoned_memory: None, d: int, k: int) -> None:
    check_pass(backend, (normal(90, d, backend.device) + 3).half(), k, "cosine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_of_complete_vectors(backend: Backend, poisoned_memory: None, dtype: torch.dtype) -> None:
    check_pass(backend, (normal(300, 40, backend.device) + 3).to(dtype), 35, "euclidean")


@pytest.mark.parametrize("k", [7, 34])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_multiples_of_a_step(impl: str, device: str, dtype: torch.dtype, metric: str, k: int) -> None:
    """Sums of 2^28 rows are exact, since fp64 represents all multiples of the step up to them."""
    n = 1 << 28
    x = normal(900, 37, device).to(dtype).exp()
    centers = prepare(x[:k], metric, summary_of(x, metric, n))
    sums = load_implementation(impl, x.device).assign_and_sum(x, centers)[2]
    step = centers.rounding / 1.5 * 2.0**-52
    assert torch.equal(sums / step, (sums / step).round())
    assert (sums.abs().amax(0) < n * centers.largest / 2**20).all()


@pytest.mark.parametrize("k", [7, 34])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_sums_are_the_same_in_any_order(backend: Backend, metric: str, k: int) -> None:
    """The order of rows, the number of threads and the chunks change no bit."""
    if backend.impl == "faiss":
        pytest.skip("labels of near-ties depend on the rows around")
    n = 2500 if backend in EMULATED else 5000
    x = normal(n, 37, backend.device).exp()
    centers = prepare(x[:k], metric, summary_of(x, metric, n))

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        return load_implementation(backend.impl, rows.device).assign_and_sum(rows, centers)

    labels, distances, sums, counts = run(x)
    threads = torch.get_num_threads()
    try:
        for count in (1,) if backend in EMULATED else (1, 2, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(x), (labels, distances, sums, counts)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(run(x.flip(0))[2], sums)
    parts = [run(part) for part in x.split(1300 if backend in EMULATED else 700)]
    assert torch.equal(sum(part[2] for part in parts), sums)
    assert torch.equal(torch.cat([part[0] for part in parts]), labels)
    assert torch.equal(torch.cat([part[1] for part in parts]), distances)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("k", "width"), [(3, 37), (10, 64), (16, 64), (40, 37)])  # complete vectors are not copied
def test_changes_of_sums(impl: str, device: str, metric: str, k: int, width: int) -> None:
    """The sums of a pass and the changes since then add up to the sums of the later pass, bit for bit."""
    module = load_implementation(impl, torch.device(device))
    if not hasattr(module, "follow"):
        pytest.skip(f"{impl} sums all rows in every pass")
    n = 3000
    x = normal(n, width, "cpu") + 5
    summary = summary_of(x, metric)
    labels, _, sums, counts = module.assign_and_sum(x[:2000], prepare(x[:k], metric, summary))
    followed = torch.cat((labels, labels.new_full((1000,), -1))).int()
    before = followed.clone()
    later = prepare(x[k : 2 * k], metric, summary)
    distances, more_sums, more_counts = module.follow(x, later, followed)
    expected = module.assign_and_sum(x, later)
    assert all(map(torch.equal, (followed.long(), distances, sums + more_sums, counts + more_counts), expected))
    assert 0 < int((followed == before).sum()) < 2000
    _, sums, counts = module.follow(x, later, followed)
    assert not sums.any()
    assert not counts.any()


def test_distances_to_near_centers_are_differences(impl: str) -> None:
    """Rows close to their centre, far from the middle: |x|^2 + |c|^2 - 2 <x, c> would lose all digits."""
    centers = torch.tensor([[100.0] * 32, [-100.0] * 32])
    x = centers.repeat_interleave(50, 0)
    x[1::2] += 1e-3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    labels, distances = find_nearest(x, centers, "euclidean", impl)
    torch.testing.assert_close(
        distances, (x.double() - centers[labels].double()).square().sum(1).float(), rtol=1e-2, atol=0
    )
    assert not distances[::2].any()


@pytest.mark.skipif(unavailable_reason("triton", "cpu") is not None, reason="tests tiles of the interpreter")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_small_tiles(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None, metric: str, dtype: torch.dtype) -> None:
    """Several tiles of rows and of centres, programs with several tiles, clusters of several pieces: as on a GPU."""
    tiles = tile_table.Tiles(rows=32, columns=16, features=16, chunk=32, warps=4, stages=1)
    monkeypatch.setattr(tile_table, "INTERPRETED", tiles)
    monkeypatch.setattr(gpu_common, "PIECE_ROWS", 8)
    x = (normal(150, 50, "cpu") + 3).to(dtype)
    for k in (23, 35):
        check_pass(Backend("cpu", "triton"), x, k, metric)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (777, 64), (2000, 37)])
def test_the_extremes_of_columns(backend: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    module = load_implementation(backend.impl, torch.device(backend.device))
    find = getattr(module, "extremes", find_extremes)
    x = normal(*shape, backend.device).to(dtype)
    wide = torch.cat((x, x + 1), dim=1)[:, : shape[1]]  # rows that are not adjacent
    wide[:, 0] = 3.0
    middle = wide[len(wide) // 2].to(compute_dtype(x))
    middle[1::3] = math.nan
    for value in (0.0, -torch.inf, torch.inf, torch.nan):
        wide[-1, -1] = value
        low, high, nearest = find(wide, middle)
        assert low.dtype == high.dtype == nearest.dtype == middle.dtype
        torch.testing.assert_close(low, wide.amin(0).to(low.dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(high, wide.amax(0).to(low.dtype), rtol=0, atol=0, equal_nan=True)
        distances = (wide.to(middle.dtype) - middle).abs()
        expected = torch.where(distances > 0, distances, math.inf).amin(0)
        torch.testing.assert_close(nearest, expected, rtol=0, atol=0)
        assert find(wide, None)[2].isinf().all()
