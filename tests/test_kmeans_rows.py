"""Sources of rows: arrays, memory maps, slices, chunks. Results do not depend on the source; memory is bounded."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mcl_kernels import KMeans, assign_clusters
from mcl_kernels.kmeans import initial
from mcl_kernels.kmeans import rows as row_sources
from mcl_kernels.kmeans.dataset import Dataset
from mcl_kernels.kmeans.passes import FAR_CENTERS, Partition
from mcl_kernels.kmeans.rows import FileRows, Rows, TensorRows, open_rows

N, D, K = 9000, 24, 7


@pytest.fixture
def x() -> Tensor:
    """Rows that need many iterations, so that a difference in rounding changes the result."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=generator) + 0.3 * (torch.arange(N) % K).unsqueeze(1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "CHUNK_BYTES", 1024 * D * 4)


class Shuffled:
    """Iterable that yields other rows in every pass."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        yield self.x
        self.x = self.x.flip(0)


class Shrinking(Shuffled):
    def __iter__(self) -> Iterator[Tensor]:
        yield self.x
        self.x = self.x[:-1]


def mapped(x: Tensor, path: Path) -> Any:
    np.save(path / "x.npy", x.numpy())
    return np.load(path / "x.npy", mmap_mode="r")


FORMS: dict[str, Callable[[Tensor, Path], Any]] = {
    "array": lambda x, path: x.numpy(),
    "read-only array": lambda x, path: np.frombuffer(x.numpy().tobytes(), np.float32).reshape(x.shape),
    "memory map": mapped,
    "part of a memory map": lambda x, path: mapped(torch.cat((x[:5], x, x[:3])), path)[5 : 5 + N],
    "columns of a memory map": lambda x, path: mapped(torch.cat((x[:, :3], x, x[:, :2]), dim=1), path)[:, 3 : 3 + D],
    "every other row": lambda x, path: mapped(x.repeat_interleave(2, 0), path)[1::2],
    "small chunks": lambda x, path: x.split(77),
    "chunks of arrays": lambda x, path: [chunk.numpy() for chunk in x.split(3000)],
    "chunks as long as its own": lambda x, path: x.split(1024),
    "DataLoader": lambda x, path: DataLoader(TensorDataset(x), batch_size=500),
    "raw file": lambda x, path: (
        x.numpy().tofile(path / "raw"),
        np.memmap(path / "raw", np.float32, "r", 0, (N, D)),
    )[1],
}


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_clusters_do_not_depend_on_the_source(x: Tensor, tmp_path: Path, impl: str, metric: str) -> None:
    iterations = 15 if impl == "native" else 5
    expected = KMeans(K, metric=metric, n_init=2, max_iter=iterations, impl=impl).fit(x)
    assert expected.n_iter_ == iterations
    for name, form in FORMS.items():
        rows = form(x, tmp_path)
        kmeans = KMeans(K, metric=metric, n_init=2, max_iter=iterations, impl=impl).fit(rows)
        assert torch.equal(kmeans.cluster_centers_, expected.cluster_centers_), name
        assert torch.equal(kmeans.labels_, expected.labels_), name
        assert torch.equal(kmeans.predict(rows), expected.labels_), name
        assert kmeans.init_rows_ == N
        assert kmeans.inertia_ == pytest.approx(expected.inertia_, rel=1e-12)


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_sample_of_a_tensor_is_that_of_chunks(x: Tensor, metric: str, dtype: torch.dtype, init: str) -> None:
    """It is not copied, with weights either."""
    x = torch.cat((x.to(dtype), torch.zeros(N, 1, dtype=dtype)), dim=1)
    x[::50, -1] = 1  # a column that few rows of the sample show to vary
    for weights in (None, torch.arange(N) % 3):
        kmeans = KMeans(K, metric=metric, init=init, max_iter=3)
        with mock.patch.object(initial, "SAMPLE_ROWS", 400):
            with mock.patch.object(Dataset, "take", side_effect=AssertionError):
                labels = kmeans.fit_predict(x, sample_weight=weights)
            centers = kmeans.cluster_centers_
            assert kmeans.init_rows_ == 400
            kmeans.fit(x.split(1000), sample_weight=weights)
        assert torch.equal(kmeans.cluster_centers_, centers)
        assert torch.equal(kmeans.labels_, labels)


def test_assign_clusters_takes_chunks(x: Tensor, tmp_path: Path) -> None:
    labels, distances = assign_clusters(x, x[:K])
    for rows in (mapped(x, tmp_path), x.split(1000)):
        assert all(map(torch.equal, assign_clusters(rows, x[:K]), (labels, distances)))


def test_a_file_without_rows(x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    rows = FileRows("x", path, 0, (0, D), torch.float32)
    assert assign_clusters(rows, x[:K])[0].tolist() == []
    with pytest.raises(ValueError, match="n_clusters must be at most the number of rows: got 7 for 0 rows"):
        KMeans(K).fit(rows)


def test_empty_clusters_of_a_file_are_filled(x: Tensor, tmp_path: Path) -> None:
    init = torch.cat((x[:3], x[:4] + 1000))
    expected = KMeans(K, init=init, max_iter=3).fit(x)
    assert expected.history_[0]["splits"] == 4
    for rows in (mapped(x, tmp_path), x.split(1000)):
        assert torch.equal(KMeans(K, init=init, max_iter=3).fit(rows).labels_, expected.labels_)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_files_of_other_dtypes(x: Tensor, tmp_path: Path, dtype: torch.dtype) -> None:
    """NumPy has no bfloat16, but files of it exist."""
    x = x.to(dtype)
    path = tmp_path / "x.bin"
    path.write_bytes(b"header" + x.view(torch.uint8).numpy().tobytes())
    rows = FileRows("x", path, 6, (N, D), dtype)
    assert torch.equal(rows.load(), x)
    assert torch.equal(rows.take(torch.tensor([0, 17, N - 1])), x[[0, 17, N - 1]])
    assert torch.equal(KMeans(K, max_iter=5).fit(rows).labels_, KMeans(K, max_iter=5).fit(x).labels_)


def test_writes_to_a_map_are_read(x: Tensor, tmp_path: Path) -> None:
    """Mode "r+" writes to the file, mode "c" to a copy of the page in memory."""
    mapped(x, tmp_path)
    for mode in ("r+", "c"):
        rows = np.load(tmp_path / "x.npy", mmap_mode=mode)
        rows[5000:] *= -1
        expected = torch.from_numpy(np.array(rows))
        assert torch.equal(open_rows("x", rows).load(), expected)
        assert torch.equal(open_rows("x", rows * 2).load(), 2 * expected)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (lambda x: iter([x]), TypeError, "x must be iterable more than once: got list_iterator, which is read once"),
        (lambda x: (chunk for chunk in [x]), TypeError, "x must be iterable more than once: got generator"),
        (lambda x: [], ValueError, "x must yield at least one chunk: got none"),
        (lambda x: [x, x[:0]], ValueError, "chunk 1 of x must have at least one row: got 0"),
        (lambda x: [x, x[:, :5]], ValueError, "chunk 1 of x must have 24 features .* as the first one: got 5"),
        (lambda x: [x, x.double()], ValueError, "chunk 1 of x must have .* torch.float32 .*: got 24 of torch.float64"),
        (lambda x: [x.long()], TypeError, "chunk 0 of x must be float16, .*: got torch.int64"),
        (lambda x: [x.tolist()], TypeError, "chunk 0 of x must be a tensor or an array of rows: got list; for rows"),
        (lambda x: [(x, x)], TypeError, "chunk 0 of x must be a tensor or an array of rows: got a tuple of 2"),
        (lambda x: "x.npy", TypeError, "x must be a tensor, an array or an iterable of chunks of rows: got str"),
        (Shuffled, ValueError, r"x must yield the same rows in every pass \(no shuffling\): row 0 differs"),
        (Shrinking, ValueError, "x must yield the same rows in every pass: got 8999 after 9000"),
        (lambda x: x.numpy().astype(">f4"), TypeError, "x must have the byte order of this machine: got >f4"),
    ],
)
def test_rows_that_cannot_be_clustered(x: Tensor, rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KMeans(K).fit(rows(x))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda m: m.T, "x must be a memory map whose rows are contiguous"),
        (lambda m: m[:, ::-1], "x must be a memory map whose rows are contiguous"),
        (lambda m: m[::-1], "x must be a memory map whose rows are contiguous"),
        (lambda m: m.T, r"save the array in C order: np.save\(path, np.ascontiguousarray\(x\)\)"),
        (lambda m: m[0], r"x must have shape \[rows, features\]"),
    ],
)
def test_maps_that_cannot_be_read_in_order(x: Tensor, tmp_path: Path, part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KMeans(K).fit(part(mapped(x, tmp_path)))


@pytest.mark.parametrize("row", [0, 5000, N - 1])
def test_a_row_that_is_not_finite_is_named_in_any_chunk(x: Tensor, tmp_path: Path, row: int) -> None:
    kmeans = KMeans(K, max_iter=2).fit(x)
    x[row, 3] = torch.nan
    for rows in (x, mapped(x, tmp_path), x.split(777)):
        for function in (KMeans(K).fit, kmeans.predict):
            with pytest.raises(ValueError, match=f"x must be finite: got NaN or infinity in row {row}"):
                function(rows)


@pytest.mark.parametrize("shape", [(1, D), (N, 1)], ids=str)
def test_a_single_row_or_column_in_any_order_is_read(tmp_path: Path, shape: tuple[int, int]) -> None:
    x = np.arange(N * D, dtype=np.float32)[: shape[0] * shape[1]].reshape(shape)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    rows = open_rows("x", np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert isinstance(rows, FileRows)
    assert np.array_equal(rows.load().numpy(), x)


def test_an_empty_file_of_a_huge_width_needs_no_memory(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    rows = FileRows("x", tmp_path / "x", 0, (0, 2**40), torch.float32)
    with pytest.raises(ValueError, match="n_clusters must be at most the number of rows: got 1 for 0 rows"):
        KMeans(1).fit(rows)
    assert [chunk.shape for chunk in rows.chunks()] == [(0, 2**40)]


def test_a_file_shorter_than_its_rows_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=f"x ends in row 2 of {2**60}: .* is truncated"):
        FileRows("x", tmp_path / "x", 20, (2**60, 8), torch.float32)


def test_arrays_of_other_types_than_numbers_are_refused_by_name() -> None:
    for x in (np.array([["a"]]), np.zeros((3, 3), np.longdouble), np.array([[{}]])):
        with pytest.raises(TypeError, match="x must hold integers or floating point numbers: got dtype"):
            KMeans(1).fit(x)


def test_a_file_that_was_replaced(x: Tensor, tmp_path: Path) -> None:
    rows = mapped(x, tmp_path)
    np.save(tmp_path / "other.npy", x.numpy() + 1)
    (tmp_path / "other.npy").replace(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"x must be a map of what .*x\.npy holds now: its first row is another one"):
        KMeans(K).fit(rows)


def test_an_iterable_that_can_be_read_only_once(x: Tensor) -> None:
    class Spent:
        def __init__(self) -> None:
            self.chunks = iter(x.split(N))

        def __iter__(self) -> Iterator[Tensor]:
            return self.chunks

    for function in (KMeans(K).fit, lambda rows: assign_clusters(rows, x[:K])):
        with pytest.raises(ValueError, match="x must yield the same rows in every pass: got 0 after at least one"):
            function(Spent())


def test_a_file_that_became_shorter(x: Tensor, tmp_path: Path) -> None:
    rows = mapped(x, tmp_path)
    with (tmp_path / "x.npy").open("r+b") as file:
        file.truncate(128 + 6000 * D * 4 + 10)
    with pytest.raises(ValueError, match=f"x ends in row 6000 of {N}: .*x.npy is truncated"):
        KMeans(K).fit(rows)


def test_the_initialisation_draws_from_a_sample(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is for the initialisation of a large data set; iterations read all rows."""
    monkeypatch.setattr(initial, "SAMPLE_ROWS", 500)
    kmeans = KMeans(K, n_init=3).fit(x)
    assert kmeans.init_rows_ == 500
    assert len(kmeans.labels_) == N
    assert kmeans.inertia_ == pytest.approx(float(assign_clusters(x, kmeans.cluster_centers_)[1].sum()), rel=1e-5)
    assert torch.equal(kmeans.labels_, KMeans(K, n_init=3).fit(x.split(100)).labels_)
    assert KMeans(K, init=x[:K]).fit(x).init_rows_ == 0


@pytest.mark.parametrize("form", ["array", "memory map", "small chunks"])
def test_mini_batches(x: Tensor, tmp_path: Path, form: str) -> None:
    rows = FORMS[form](x, tmp_path)
    all_rows = KMeans(K).fit(x)
    kmeans = KMeans(K, batch_size=700, tol=1e-3).fit(rows)
    assert kmeans.inertia_ <= 1.02 * all_rows.inertia_
    assert kmeans.n_iter_ == len(kmeans.history_) < 100
    assert kmeans.labels_.unique().tolist() == list(range(K))
    assert torch.equal(kmeans.labels_, KMeans(K, batch_size=700, tol=1e-3).fit(rows).labels_)


def test_splits_after_mini_batches_are_counted(x: Tensor) -> None:
    init = torch.cat((x[:3], x[:4] + 1000))
    kmeans = KMeans(K, init=init, max_iter=2, batch_size=N).fit(x)
    assert kmeans.history_[-1]["splits"] >= 4
    assert kmeans.labels_.unique().tolist() == list(range(K))


def test_a_batch_of_more_rows_than_there_are(x: Tensor) -> None:
    assert len(KMeans(K, max_iter=2, batch_size=10**13).fit(x.split(1000)).labels_) == N


def test_one_batch_of_all_rows_moves_centres_to_their_means(x: Tensor) -> None:
    """The first batch has all rows, in order, since x is an iterable."""
    batch = KMeans(K, init=x[:K], max_iter=1, batch_size=N).fit([x])
    assert torch.equal(batch.cluster_centers_, KMeans(K, init=x[:K], max_iter=1).fit(x).cluster_centers_)


def test_a_long_fit_shows_a_progress_bar(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tqdm

    original = tqdm.tqdm
    KMeans(K, max_iter=2).fit(x)
    assert capsys.readouterr().err == ""  # not a terminal
    monkeypatch.setattr(tqdm, "tqdm", lambda *args, **options: original(*args, **{**options, "disable": False}))
    KMeans(K, max_iter=2).fit(x)
    assert capsys.readouterr().err == ""  # ends before the delay
    monkeypatch.setattr(
        tqdm, "tqdm", lambda *args, **options: original(*args, **{**options, "disable": False, "delay": 0})
    )
    KMeans(K, max_iter=2).fit(x)
    assert "k-means" in capsys.readouterr().err


MEASURED = """
import sys
import numpy as np
import torch
from mcl_kernels import KMeans

def peak():  # of this process alone: ru_maxrss includes the process that it was forked from
    status = open("/proc/self/status").read().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])

KMeans(2).fit(torch.randn(10, 4))
start = peak()
if sys.argv[2] == "held":
    x = np.load(sys.argv[1])
else:
    kmeans = KMeans(10, max_iter=2).fit(np.load(sys.argv[1], mmap_mode="r"))
    assert len(kmeans.labels_) == int(sys.argv[2])
print(peak() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak memory of Linux")
def test_a_file_larger_than_its_memory(tmp_path: Path) -> None:
    """A file of 1.1 GiB needs less than 0.5 GiB: two chunks, the sample of the initialisation, labels."""
    n, width = 600_000, 512
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (n, width))
    block = np.random.default_rng(0).standard_normal((20_000, width), dtype=np.float32)
    for start in range(0, n, len(block)):
        file[start : start + len(block)] = block + start % 7
    file.flush()

    def peak_bytes(argument: str) -> int:
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "x.npy"), argument]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert peak_bytes(str(n)) < 0.5 * 2**30 < 2**30 < peak_bytes("held")


class Counted(TensorRows):
    """Rows that count how often all of them are read; `take` and `load` read them too."""

    def __init__(self, x: Tensor) -> None:
        super().__init__("x", x)
        self.reads = 0

    def chunks(self) -> Iterator[Tensor]:
        self.reads += 1
        yield from super().chunks()

    take, load = Rows.take, Rows.load


@pytest.mark.parametrize("tol", [0.0, 1e-4])
@pytest.mark.parametrize("max_iter", [1, 4])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_reads_of_a_fit(x: Tensor, impl: str, metric: str, max_iter: int, tol: float) -> None:
    x = torch.cat((x, torch.zeros(len(x), 1)), dim=1)
    x[-1, -1] = 1.0  # a column that no sample shows to vary costs no read
    for init, weights in itertools.product((x[:K], "k-means++"), (None, 1 + torch.arange(len(x)) % 3)):
        rows = Counted(x)
        kmeans = KMeans(K, init=init, max_iter=max_iter, tol=tol, metric=metric, impl=impl)
        with mock.patch.object(initial, "SAMPLE_ROWS", 1000):
            fitted = kmeans.fit(rows, sample_weight=weights)
        assert sum(entry["splits"] for entry in fitted.history_) == 0
        # With weights the variance is not that of the first pass.
        assert rows.reads <= fitted.n_iter_ + 3 + (weights is not None and tol > 0)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_labels_of_a_last_pass_without_moves_are_final(x: Tensor, metric: str) -> None:
    converged = KMeans(K, init=x[:K], tol=0, max_iter=300, metric=metric).fit(x)
    assert converged.history_[-1]["shift"] == 0
    again = KMeans(K, init=converged.cluster_centers_, tol=0, metric=metric).fit(rows := Counted(x))
    assert again.n_iter_ == 1
    assert rows.reads == 2  # a survey and one pass: a sample of a tensor is no read
    assert torch.equal(again.labels_, again.predict(x))
    assert again.inertia_ == pytest.approx(float(assign_clusters(x, again.cluster_centers_, metric=metric)[1].sum()))


def test_reads_of_a_fit_that_refills_clusters(x: Tensor) -> None:
    rows = Counted(x)
    rows.take = MethodType(TensorRows.take, rows)  # not a read of all rows: some of them
    fitted = KMeans(K, init=torch.cat((x[:2], x[:5] + 1000.0)), tol=0).fit(rows)
    refills = sum(entry["splits"] > 0 for entry in fitted.history_)
    assert refills > 0
    assert rows.reads <= fitted.n_iter_ + 3 + refills


@pytest.mark.parametrize("shift", [0.0, 30.0, 1e5])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_variance_of_the_first_pass(x: Tensor, metric: str, shift: float) -> None:
    """Its objective says little of the variance if the centres are far from the rows."""
    rows = F.normalize(x.double(), dim=1) if metric == "cosine" else x.double()
    variances: list[float] = []
    of_partition = Partition.mean_variance

    def recorded(*arguments: Any) -> float:
        variances.append(of_partition(*arguments))
        return variances[-1]

    with mock.patch.object(Partition, "mean_variance", recorded):
        for weights in (None, torch.arange(len(x)) % 2):  # which do not change it
            KMeans(K, init=x[:K] + shift, max_iter=1, metric=metric).fit(x, sample_weight=weights)
    expected = float(rows.var(0, correction=0).mean())
    rounding = FAR_CENTERS * 2.0**-24  # of fp32 distances
    assert variances == pytest.approx([expected] * len(variances), rel=rounding)
    assert len(variances) >= 2
