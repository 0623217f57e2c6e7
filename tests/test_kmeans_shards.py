"""k-means over the shards of several ranks against k-means of one process, on all rows: the same bits."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels import KMeans
from mcl_kernels.kmeans import api, lloyd
from mcl_kernels.kmeans import rows as sources
from mcl_kernels.kmeans import team as shards
from mcl_kernels.kmeans.centers import Centers
from tests.conftest import unavailable_reason
from tests.process_pool import RankPool

N, D, K = 1200, 12, 7

# Where one shard ends and the next begins, of 60 rows: even, uneven, with empty ones, all on one rank.
ENDS = {
    2: {"even": [0, 30, 60], "uneven": [0, 47, 60], "empty": [0, 0, 60]},
    4: {"even": [0, 15, 30, 45, 60], "uneven": [0, 7, 40, 41, 60], "empty": [0, 0, 53, 53, 60]},
}


def rows_without_structure(n: int = N) -> Tensor:
    """Many iterations, in which every rounding shows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, D, generator=generator) + 0.3 * (torch.arange(n) % K).unsqueeze(1)


def few_places(n: int = N) -> Tensor:
    """Rows on a coarse grid: many equal ones, and many as far away as others."""
    return torch.randint(-3, 4, (n, 2), generator=torch.Generator().manual_seed(0)).float()


def far_centers(x: Tensor) -> Any:
    """Of which all but two are empty. An array, since a pipe would take the memory of a tensor with it."""
    return torch.cat((x[:2], x[:5] + 1000.0)).numpy()


class Fitted(NamedTuple):
    """What a rank has after a fit, for a pipe."""

    centers: Any
    labels: Any
    inertia: float
    n_iter: int
    init_rows: int
    splits: list[int]
    shifts: list[float]
    objectives: list[float]
    warnings: list[str]


def fit(kmeans: KMeans, x: Any) -> Fitted:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kmeans.fit(x)
    history = {key: [step[key] for step in kmeans.history_] for key in ("splits", "shift", "objective")}
    return Fitted(
        kmeans.cluster_centers_.numpy(), kmeans.labels_.numpy(), kmeans.inertia_, kmeans.n_iter_, kmeans.init_rows_,
        history["splits"], history["shift"], history["objective"], [str(each.message) for each in caught],
    )  # fmt: skip


@contextmanager
def small_sizes() -> Iterator[None]:
    """Several chunks of a shard, and of more rows than these k-means++ sees a sample."""
    with (
        mock.patch.object(sources, "CHUNK_BYTES", 100 * D * 4),
        mock.patch.object(sources, "CHUNK_MULTIPLE", 10),
        mock.patch.object(api, "INIT_ROWS", 1000),
    ):
        yield


def as_form(x: Tensor, form: str, path: str) -> Any:
    """A shard as a user may have it. An iterable has at least one row."""
    if form == "file":
        np.save(path, x.numpy())
        return np.load(path, mmap_mode="r") if len(x) else x.numpy()
    if form == "chunks":
        return list(x.split(37)) if len(x) else x
    if form == "array":
        return x.numpy()
    return x.T.contiguous().T if form == "strided" else x


def fit_shard(x: Any, ends: list[int], form: str, path: str, options: dict[str, Any]) -> Fitted:
    x = torch.as_tensor(x).to(options.pop("dtype", torch.float32))
    rank = dist.get_rank()
    here = slice(ends[rank], ends[rank + 1])
    with small_sizes():
        if form == "part of a file":
            return fit(KMeans(**options, group=dist.group.WORLD), np.load(path, mmap_mode="r")[here])
        shard = as_form(x[here], form, f"{path}.{rank}.npy")
        return fit(KMeans(**options, group=dist.group.WORLD), shard)


def check_is_one_process(
    ranks: RankPool, x: Tensor, ends: list[int], form: str = "tensor", path: str = "", **options: Any
) -> Fitted:
    """The same bits, but for sums of distances, whose order differs."""
    dtype = options.get("dtype", torch.float32)
    with small_sizes():
        expected = fit(KMeans(**{k: v for k, v in options.items() if k != "dtype"}), x.to(dtype))
    parts = ranks.run(fit_shard, x.numpy(), ends, form, path, options)
    for rank, part in enumerate(parts):
        assert len(part.labels) == ends[rank + 1] - ends[rank]
        assert (part.centers == expected.centers).all()
        assert part.centers.dtype == expected.centers.dtype
        for same in ("n_iter", "init_rows", "splits", "shifts", "warnings"):
            assert getattr(part, same) == getattr(expected, same), same
        assert part.inertia == parts[0].inertia
        assert part.inertia == pytest.approx(expected.inertia, rel=1e-12)
        assert part.objectives == pytest.approx(expected.objectives, rel=1e-12)
    assert (np.concatenate([part.labels for part in parts]) == expected.labels).all()
    return expected


def ends_of(ranks: RankPool, kind: str, n: int = N) -> list[int]:
    return [n * end // 60 for end in ENDS[ranks.world_size][kind]]


@pytest.mark.parametrize("cut", ["uneven", "empty"])
@pytest.mark.parametrize("init", ["k-means++", "random", "centres"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_is_k_means_of_one_process(ranks: RankPool, metric: str, init: str, cut: str) -> None:
    x = rows_without_structure()
    given = x[:K].numpy() if init == "centres" else init
    fitted = check_is_one_process(ranks, x, ends_of(ranks, cut), n_clusters=K, metric=metric, init=given, max_iter=8)
    assert fitted.n_iter == 8
    assert fitted.init_rows == (0 if init == "centres" else 1000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(ranks: RankPool, dtype: torch.dtype) -> None:
    x = rows_without_structure()
    check_is_one_process(ranks, x, ends_of(ranks, "uneven"), n_clusters=K, max_iter=5, dtype=dtype)


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("options", [{}, {"batch_size": 150}, {"impl": "reference"}], ids=str)
def test_rows_of_any_range(ranks: RankPool, unit: float, options: dict[str, Any]) -> None:
    """Some far from the others, and none in the range of fp32's squares: several levels of sums, in fp64."""
    x = rows_without_structure()
    x[7], x[N // 2], x[-1] = 1e10, -1e5, 1e5
    fitted = check_is_one_process(ranks, x * unit, ends_of(ranks, "empty"), n_clusters=K, max_iter=4, **options)
    assert fitted.labels[7] not in fitted.labels[8:]
    assert fitted.inertia > 0


@pytest.mark.parametrize("cut", ["uneven", "empty"])
@pytest.mark.parametrize("form", ["array", "strided", "file", "part of a file", "chunks"])
def test_forms(ranks: RankPool, tmp_path: Path, form: str, cut: str) -> None:
    x = rows_without_structure()
    np.save(tmp_path / "x.npy", x.numpy())
    path = str(tmp_path / "x.npy")
    check_is_one_process(ranks, x, ends_of(ranks, cut), form, path, n_clusters=K, max_iter=4)


@pytest.mark.parametrize("impl", ["reference", "triton", "cuda"])
def test_impls(ranks: RankPool, impl: str) -> None:
    if reason := unavailable_reason(impl, "cpu"):
        pytest.skip(reason)
    x = rows_without_structure(60)
    for options in ({}, {"batch_size": 40}):
        check_is_one_process(ranks, x, ends_of(ranks, "empty", 60), n_clusters=3, max_iter=1, impl=impl, **options)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("form", ["tensor", "part of a file"])
@pytest.mark.parametrize("n_init", [1, 2])
def test_mini_batches(ranks: RankPool, tmp_path: Path, metric: str, form: str, n_init: int) -> None:
    x = rows_without_structure()
    np.save(tmp_path / "x.npy", x.numpy())
    check_is_one_process(
        ranks, x, ends_of(ranks, "empty"), form, str(tmp_path / "x.npy"),
        n_clusters=K, batch_size=150, max_iter=2, metric=metric, n_init=n_init,
    )  # fmt: skip


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_restarts(ranks: RankPool, init: str) -> None:
    options: dict[str, Any] = {"n_clusters": K, "init": init, "max_iter": 3, "tol": 0.0}
    several = check_is_one_process(ranks, rows_without_structure(), ends_of(ranks, "uneven"), n_init=4, **options)
    with small_sizes():
        assert several.inertia < KMeans(**options).fit(rows_without_structure()).inertia_


@pytest.mark.parametrize("cut", ["even", "uneven", "empty"])
@pytest.mark.parametrize("data", [rows_without_structure, few_places])
def test_empty_clusters_take_the_rows_that_one_process_moves(
    ranks: RankPool, data: Callable[[], Tensor], cut: str
) -> None:
    x = data()
    for max_iter in (1, 4):
        fitted = check_is_one_process(
            ranks, x, ends_of(ranks, cut), n_clusters=7, init=far_centers(x), max_iter=max_iter
        )
        assert fitted.splits[0] >= 5


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("batch_size", [None, 16])
def test_fewer_distinct_rows_than_clusters(ranks: RankPool, metric: str, batch_size: int | None) -> None:
    x = torch.ones(60, 3)
    x[:3, 0] = 2.0
    for init in ("k-means++", "random"):
        fitted = check_is_one_process(
            ranks, x, ends_of(ranks, "uneven", 60), n_clusters=5, init=init, metric=metric, batch_size=batch_size
        )
        assert len(fitted.centers) == 2
        assert fitted.warnings == ["n_clusters=5 but only 2 clusters hold a row: too few rows differ"]


def test_any_cut(ranks: RankPool) -> None:
    """Few rows and many ties: of every cut, shards of no and of one row among them."""
    chance = random.Random(0)
    for seed in range(10):
        n = chance.choice([8, 30, 200])
        x = few_places(n)
        ends = [0, *sorted(chance.randint(0, n) for _ in range(ranks.world_size - 1)), n]
        options = {"metric": chance.choice(["euclidean", "cosine"]), "batch_size": chance.choice([None, None, 9])}
        init = far_centers(x) if n > 8 and seed % 2 else chance.choice(["k-means++", "random"])
        check_is_one_process(ranks, x, ends, n_clusters=7, init=init, seed=seed, max_iter=4, **options)


def test_more_clusters_than_rows_of_a_shard(ranks: RankPool) -> None:
    x = rows_without_structure(60)
    check_is_one_process(ranks, x, ends_of(ranks, "uneven", 60), n_clusters=60)


COLLECTIVES = [
    name
    for name in (
        "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce", "gather",
        "scatter", "all_to_all", "all_to_all_single", "reduce_scatter", "reduce_scatter_tensor",
        "reduce_scatter_single",
        "send", "recv", "isend", "irecv", "barrier", "broadcast_object_list", "all_gather_object", "gather_object",
        "scatter_object_list",
    )
    if hasattr(dist, name)
]  # fmt: skip


def counted(options: dict[str, Any], max_iter: int) -> tuple[Counter[str], int]:
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Any, *arguments: Any, **keywords: Any) -> Any:
            counts[f"{name} of {x.numel() if isinstance(x, Tensor) and x.numel() > 1 else 1}"] += 1
            return function(x, *arguments, **keywords)

        return call

    x = rows_without_structure()[dist.get_rank() :: dist.get_world_size()]
    kmeans = KMeans(K, tol=0.0, max_iter=max_iter, group=dist.group.WORLD, **options)
    patches = [mock.patch.object(dist, name, counting(name, getattr(dist, name))) for name in COLLECTIVES]
    for patch in patches:
        patch.start()
    try:
        kmeans.fit(x)
    finally:
        for patch in patches:
            patch.stop()
    return counts, kmeans.n_iter_


def test_communication_of_an_iteration(ranks: RankPool) -> None:
    """Sums, numbers, objective and whether a rank failed, in one all-reduce; and one broadcast number."""
    for (few, n_few), (many, n_many) in zip(ranks.run(counted, {}, 3), ranks.run(counted, {}, 9), strict=True):
        assert (n_few, n_many) == (3, 9)
        many.subtract(few)
        assert {name: count for name, count in many.items() if count} == {
            f"all_reduce of {K * D + K + 2}": 6,
            "broadcast of 1": 6,
        }
    # Of mini-batches one for each; and the state of the generator.
    for (few, _), (many, _) in zip(
        ranks.run(counted, {"batch_size": 500}, 3), ranks.run(counted, {"batch_size": 500}, 9), strict=True
    ):
        many.subtract(few)
        state = torch.Generator().get_state().numel()
        assert {name: count for name, count in many.items() if count} == {
            f"all_reduce of {K * D + K + 2}": 18,
            "broadcast of 1": 6,
            f"broadcast of {state}": 6,
        }


def fit_with_other_rounding(metric: str, batch_size: int | None) -> Fitted:
    """On other machines than the first one sums of a vector may be of another order, and so its decisions."""
    x, rank = rows_without_structure()[dist.get_rank() :: dist.get_world_size()], dist.get_rank()
    kmeans = KMeans(K, metric=metric, n_init=2, batch_size=batch_size, tol=1e-3, max_iter=12, group=dist.group.WORLD)
    if rank == 0:
        return fit(kmeans, x)
    means, record, starts = Centers.means, lloyd._record, torch.randint

    def other_means(self: Centers, sums: Tensor, counts: Tensor) -> Tensor:
        return torch.nextafter(means(self, sums, counts), torch.tensor(torch.inf))

    def other_record(*arguments: Any) -> dict[str, Any]:
        return {**record(*arguments), "shift": 0.0 if rank % 2 else np.inf}

    def other_initial_centers(*arguments: Any) -> Tensor:
        starts(5, (rank,), generator=arguments[-1])  # its generator goes on otherwise
        return torch.zeros(rank, D)

    with (
        mock.patch.object(Centers, "means", other_means),
        mock.patch.object(lloyd, "_record", other_record),
        mock.patch.object(lloyd, "initial_centers", other_initial_centers),
        mock.patch.object(api, "middle_and_scale", lambda x, *_: 3 + x.mean(0).expand(2, -1)),
    ):
        return fit(kmeans, x)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("batch_size", [None, 300])
def test_ranks_that_round_otherwise_stay_in_step(ranks: RankPool, metric: str, batch_size: int | None) -> None:
    parts = ranks.run(fit_with_other_rounding, metric, batch_size)
    assert parts[0].n_iter > 1
    for part in parts[1:]:
        assert part.n_iter == parts[0].n_iter
        assert (part.centers == parts[0].centers).all()
        assert part.inertia == parts[0].inertia


def fit_in_a_part_of_the_world() -> Fitted | str:
    members = [dist.get_world_size() - 1] if dist.get_world_size() == 2 else [1, 3]
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        try:
            KMeans(K, group=group)
        except ValueError as error:
            return str(error)
    x = rows_without_structure().chunk(len(members))[members.index(dist.get_rank())]
    return fit(KMeans(K, batch_size=200, max_iter=3, group=group), x)


def test_a_group_of_some_ranks(ranks: RankPool) -> None:
    expected = fit(KMeans(K, batch_size=200, max_iter=3), rows_without_structure())
    results = ranks.run(fit_in_a_part_of_the_world)
    assert results[0] == "group must be one that this process belongs to: got one of other ranks"
    for result in results[1::2]:
        assert (result.centers == expected.centers).all()


def predict_alone() -> list[int]:
    x = rows_without_structure()
    kmeans = KMeans(K, group=dist.group.WORLD).fit(x[dist.get_rank() :: dist.get_world_size()])
    if dist.get_rank() == 1:  # the others do not take part
        assert torch.equal(kmeans.predict(x[1 :: dist.get_world_size()]), kmeans.labels_)
    return kmeans.predict(x[: dist.get_rank()]).tolist()


def test_predict_is_of_one_rank(ranks: RankPool) -> None:
    results = ranks.run(predict_alone)
    assert [len(labels) for labels in results] == list(range(ranks.world_size))


class Changing:
    """An iterable that yields fewer rows, or raises, in a later pass."""

    def __init__(self, x: Tensor, passes: int, error: Exception | None = None) -> None:
        self.x, self.passes, self.error = x, passes, error

    def __iter__(self) -> Iterator[Tensor]:
        yield self.x[:100]
        self.passes -= 1
        if self.passes < 0 and self.error:
            raise self.error
        yield self.x[100 : 190 if self.passes < 0 else None]


def fail(case: str, path: str) -> str:
    """The error of a fit where the last rank is given something else."""
    rank, last = dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1
    x: Any = rows_without_structure(200)
    options: dict[str, Any] = {"n_clusters": K}
    if case == "rows":
        options["n_clusters"] = 200 * dist.get_world_size() + 1
    if case == "batch_size of iterables" and last:
        x = [x]
    if case in ("batch_size of iterables", "file of batches"):
        options["batch_size"] = 20
    if case == "group init":
        options["init"] = x[:K].clone()
    if last and case in ("n_clusters", "seed", "max_iter", "n_init", "batch_size"):
        options[case] = 9
    if last and case == "metric":
        options["metric"] = "cosine"
    if last and case == "tol":
        options["tol"] = 0.5
    if last and case == "init":
        options["init"] = "random"
    if last and case == "group init":
        options["init"][0, 0] += 1
    if last and case == "NaN":
        x[17, 3] = torch.nan
    if last and case == "width":
        x = x[:, :-1]
    if last and case == "dtype":
        x = x.double()
    if last and case == "none":
        x = None
    if last and case == "impl":
        options["impl"] = "faiss"
    if case == "large":
        x = x.double()
        x[5, 5] = 1e160 if last else 0
    kmeans = KMeans(**options, group=dist.group.WORLD)
    if case == "start" and rank == 0:
        mock.patch.object(lloyd, "initial_centers", mock.Mock(side_effect=RuntimeError("out of memory"))).start()
    if last and case in ("iterable", "raising iterable"):
        x = Changing(x, 4, KeyError("gone") if case == "raising iterable" else None)
    if last and "file" in case:
        np.save(path, x.numpy())
        x = np.load(path, mmap_mode="r")
        size = Path(path).stat().st_size
        if case == "file":
            with open(path, "r+b") as file:
                file.truncate(size - 70 * D * 4)
        else:  # while it is clustered
            rows = shards.ShardedRows.survey

            def survey(self: Any) -> Any:
                found = rows(self)
                with open(path, "r+b") as file:
                    file.truncate(size - 150 * D * 4)
                return found

            mock.patch.object(shards.ShardedRows, "survey", survey).start()
    try:
        with mock.patch.object(api, "INIT_ROWS", 50 if case == "file of batches" else 1 << 16):
            kmeans.fit(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        mock.patch.stopall()
    return "no error"


# On the ranks that are given the same, and on the last one, where it is another error.
ERRORS = {
    "n_clusters": (
        "ValueError: n_clusters must be alike on every rank of the group: got 7 on rank 0 and 9 on rank LAST",
    ),
    "metric": ("ValueError: metric must be alike on every rank of the group: got 'euclidean' on rank 0",),
    "init": ("ValueError: init must be alike on every rank of the group: got 'k-means++' on rank 0 and 'random'",),
    "group init": (
        "ValueError: init must be alike on every rank of the group: got 'centres [7, 12] of torch.float32, ",
    ),
    "n_init": ("ValueError: n_init must be alike on every rank of the group: got 1 on rank 0 and 9 on rank LAST",),
    "max_iter": (
        "ValueError: max_iter must be alike on every rank of the group: got 100 on rank 0 and 9 on rank LAST",
    ),
    "tol": ("ValueError: tol must be alike on every rank of the group: got 0.0001 on rank 0 and 0.5 on rank LAST",),
    "batch_size": ("ValueError: batch_size must be alike on every rank of the group: got None on rank 0 and 9",),
    "seed": ("ValueError: seed must be alike on every rank of the group: got 0 on rank 0 and 9 on rank LAST",),
    "width": (
        "ValueError: x must be alike on every rank of the group: got [rows, 12] float32 on rank 0 and [rows, 11]",
    ),
    "dtype": ("ValueError: x must be alike on every rank of the group: got [rows, 12] float32 on rank 0 and ",),
    "rows": ("ValueError: n_clusters must be at most the number of rows: got ",),
    "large": ("ValueError: x must be at most ",),
    "none": (
        "OtherRankError: rank LAST of the group met an error: TypeError: x must be a tensor, an array or an iterable",
        "TypeError: x must be a tensor, an array or an iterable of chunks of rows: got NoneType",
    ),
    "batch_size of iterables": (
        "OtherRankError: rank LAST of the group met an error: ValueError: batch_size with a group draws rows of x",
        "ValueError: batch_size with a group draws rows of x: got an iterable, which is read in order",
    ),
    "NaN": (
        "OtherRankError: rank LAST of the group met an error: ValueError: x must be finite: got NaN or infinity in",
        "ValueError: x must be finite: got NaN or infinity in row 17",
    ),
    "file": (
        "OtherRankError: rank LAST of the group met an error: ValueError: x ends in row 130 of 200",
        "ValueError: x ends in row 130 of 200",
    ),
    "file of batches": (
        "OtherRankError: rank LAST of the group met an error: ValueError: x ends in row ",
        "ValueError: x ends in row ",
    ),
    "later in a file": (
        "OtherRankError: rank LAST of the group met an error: ValueError: x ends in row 50 of 200",
        "ValueError: x ends in row 50 of 200",
    ),
    "iterable": (
        "OtherRankError: rank LAST of the group met an error: ValueError: x must yield the same rows in every pass",
        "ValueError: x must yield the same rows in every pass: got 190 after 200",
    ),
    "raising iterable": (
        "OtherRankError: rank LAST of the group met an error: KeyError: 'gone'",
        "KeyError: 'gone'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_raised_on_every_rank(ranks: RankPool, tmp_path: Path, case: str) -> None:
    *others, last = ranks.run(fail, case, str(tmp_path / "x.npy"))
    messages = [message.replace("LAST", str(ranks.world_size - 1)) for message in ERRORS[case]]
    for error in others:
        assert error.startswith(messages[0])
    assert last.startswith(messages[-1])


def test_an_error_of_the_first_rank_alone(ranks: RankPool) -> None:
    first, *others = ranks.run(fail, "start", "")
    assert first == "RuntimeError: out of memory"
    assert set(others) == {"OtherRankError: rank 0 of the group met an error: RuntimeError: out of memory"}


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"group needs torch\.distributed"):
        KMeans(3, group=object())  # type: ignore[arg-type]
