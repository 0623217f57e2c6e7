"""k-means over the shards of several ranks against k-means of one process on all rows: the same bits."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mcl_kernels import KMeans
from mcl_kernels.kmeans import api, lloyd
from mcl_kernels.kmeans.centers import Centers
from tests.conftest import unavailable_reason
from tests.kmeans_fits import (
    D,
    Fitted,
    K,
    N,
    check_is_one_process,
    ends_of,
    far_centers,
    fit,
    grid_rows,
    rows_without_structure,
    small_sizes,
)
from tests.process_pool import RankPool


@pytest.mark.parametrize("cut", ["uneven", "empty"])
@pytest.mark.parametrize("init", ["k-means++", "random", "centres"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_is_k_means_of_one_process(ranks: RankPool, metric: str, init: str, cut: str) -> None:
    x = rows_without_structure()
    given = x[:K].numpy() if init == "centres" else init
    fitted = check_is_one_process(ranks, x, ends_of(ranks, cut), n_clusters=K, metric=metric, init=given, max_iter=8)
    assert fitted.n_iter == 8
    assert fitted.init_rows == (0 if init == "centres" else 1000)


def drawn_weights(n: int = N) -> Any:
    """Weights, a third of them 0, and one that needs several levels of sums; an array, as a pipe carries it."""
    weights = np.random.default_rng(0).integers(0, 3, n) * np.linspace(0.5, 2, n)
    weights[n // 2] = 1e-9
    return weights


@pytest.mark.parametrize("cut", ["uneven", "empty"])
@pytest.mark.parametrize("form", ["tensor", "chunks", "part of a file"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "cosine", "init": "random", "n_init": 2},
        {"impl": "reference", "dtype": torch.float64},
        {"batch_size": 150},
    ],
    ids=str,
)
def test_weights_of_the_rows(ranks: RankPool, tmp_path: Path, cut: str, form: str, options: dict[str, Any]) -> None:
    x = rows_without_structure()
    if form != "tensor" and "dtype" in options:
        pytest.skip("the file has fp32 rows")
    form = "tensor" if form == "chunks" and "batch_size" in options else form
    np.save(tmp_path / "x.npy", x.numpy())
    check_is_one_process(
        ranks, x, ends_of(ranks, cut), form, str(tmp_path / "x.npy"),
        n_clusters=K, max_iter=3, sample_weight=drawn_weights(), **options,
    )  # fmt: skip


@pytest.mark.parametrize("data", [rows_without_structure, grid_rows])
def test_empty_clusters_take_rows_with_a_weight(ranks: RankPool, data: Callable[[], Tensor]) -> None:
    x = data()
    fitted = check_is_one_process(
        ranks, x, ends_of(ranks, "uneven"),
        n_clusters=7, init=far_centers(x), max_iter=3, sample_weight=drawn_weights(),
    )  # fmt: skip
    assert fitted.splits[0] >= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(ranks: RankPool, dtype: torch.dtype) -> None:
    x = rows_without_structure()
    check_is_one_process(ranks, x, ends_of(ranks, "uneven"), n_clusters=K, max_iter=5, dtype=dtype)


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("options", [{}, {"batch_size": 150}, {"impl": "reference"}], ids=str)
def test_rows_of_any_range(ranks: RankPool, unit: float, options: dict[str, Any]) -> None:
    """Rows far from the others, and units whose squares leave the range of fp32: several levels of sums, in fp64."""
    x = rows_without_structure()
    x[7], x[N // 2], x[-1] = 1e10, -1e5, 1e5
    fitted = check_is_one_process(ranks, x * unit, ends_of(ranks, "empty"), n_clusters=K, max_iter=4, **options)
    assert fitted.labels[7] not in fitted.labels[8:]
    assert fitted.inertia > 0


@pytest.mark.parametrize("cut", ["uneven", "empty"])
@pytest.mark.parametrize("form", ["array", "strided", "file", "part of a file", "chunks"])
def test_every_form_of_a_shard_is_k_means_of_one_process(ranks: RankPool, tmp_path: Path, form: str, cut: str) -> None:
    x = rows_without_structure()
    np.save(tmp_path / "x.npy", x.numpy())
    path = str(tmp_path / "x.npy")
    check_is_one_process(ranks, x, ends_of(ranks, cut), form, path, n_clusters=K, max_iter=4)


@pytest.mark.parametrize("impl", ["reference", "triton", "cuda"])
def test_every_implementation_is_k_means_of_one_process(ranks: RankPool, impl: str) -> None:
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
@pytest.mark.parametrize("data", [rows_without_structure, grid_rows])
def test_empty_clusters_take_the_same_rows_as_in_one_process(
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
    """Few rows with many ties, cut at random; some shards have no row or one."""
    chance = random.Random(0)
    for seed in range(10):
        n = chance.choice([8, 30, 200])
        x = grid_rows(n)
        ends = [0, *sorted(chance.randint(0, n) for _ in range(ranks.world_size - 1)), n]
        options = {"metric": chance.choice(["euclidean", "cosine"]), "batch_size": chance.choice([None, None, 9])}
        init = far_centers(x) if n > 8 and seed % 2 else chance.choice(["k-means++", "random"])
        check_is_one_process(ranks, x, ends, n_clusters=7, init=init, seed=seed, max_iter=4, **options)


def test_more_clusters_than_rows_of_a_shard(ranks: RankPool) -> None:
    x = rows_without_structure(60)
    check_is_one_process(ranks, x, ends_of(ranks, "uneven", 60), n_clusters=60)


COLLECTIVE_NAMES = """
    all_reduce broadcast all_gather all_gather_into_tensor all_gather_single reduce gather scatter all_to_all
    all_to_all_single reduce_scatter reduce_scatter_tensor reduce_scatter_single send recv isend irecv barrier
    broadcast_object_list all_gather_object gather_object scatter_object_list
"""
COLLECTIVES = [name for name in COLLECTIVE_NAMES.split() if hasattr(dist, name)]  # not every torch has all of them


def count_collectives(options: dict[str, Any], max_iter: int) -> tuple[Counter[str], int]:
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
    """One all-reduce of sums, counts, objective, rows read and failed ranks, and two broadcasts of one element."""
    for (few, n_few), (many, n_many) in zip(
        ranks.run(count_collectives, {}, 3), ranks.run(count_collectives, {}, 9), strict=True
    ):
        assert (n_few, n_many) == (3, 9)
        many.subtract(few)
        assert {name: count for name, count in many.items() if count} == {
            f"all_reduce of {K * D + K + 3}": 6,
            "broadcast of 1": 12,
        }
    # One all-reduce for each mini-batch, and a broadcast of the state of the generator.
    for (few, _), (many, _) in zip(
        ranks.run(count_collectives, {"batch_size": 500}, 3),
        ranks.run(count_collectives, {"batch_size": 500}, 9),
        strict=True,
    ):
        many.subtract(few)
        state = torch.Generator().get_state().numel()
        assert {name: count for name, count in many.items() if count} == {
            f"all_reduce of {K * D + K + 2}": 18,
            "broadcast of 1": 6,
            f"broadcast of {state}": 6,
        }


def fit_with_other_rounding(metric: str, batch_size: int | None) -> Fitted:
    """Fits with another rounding on every rank but the first, as on other machines."""
    x, rank = rows_without_structure()[dist.get_rank() :: dist.get_world_size()], dist.get_rank()
    kmeans = KMeans(K, metric=metric, n_init=2, batch_size=batch_size, tol=1e-3, max_iter=12, group=dist.group.WORLD)
    if rank == 0:
        return fit(kmeans, x)
    means, record, randint = Centers.means, lloyd._record, torch.randint

    def other_means(self: Centers, sums: Tensor, counts: Tensor) -> Tensor:
        return torch.nextafter(means(self, sums, counts), torch.tensor(torch.inf))

    def other_record(*arguments: Any) -> dict[str, Any]:
        return {**record(*arguments), "shift": 0.0 if rank % 2 else np.inf}

    def other_initial_centers(*arguments: Any) -> Tensor:
        randint(5, (rank,), generator=arguments[-1])  # leaves the generator in another state
        return torch.zeros(rank, D)

    with (
        mock.patch.object(Centers, "means", other_means),
        mock.patch.object(lloyd, "_record", other_record),
        mock.patch.object(api, "initial_centers", other_initial_centers),
        mock.patch.object(api, "survey_columns", lambda x, *_: 3 + x.mean(0).expand(2, -1)),
    ):
        return fit(kmeans, x)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("batch_size", [None, 300])
def test_ranks_with_other_rounding_get_the_same_results(ranks: RankPool, metric: str, batch_size: int | None) -> None:
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
    if dist.get_rank() == 1:  # the other ranks do not call predict here
        assert torch.equal(kmeans.predict(x[1 :: dist.get_world_size()]), kmeans.labels_)
    return kmeans.predict(x[: dist.get_rank()]).tolist()


def test_ranks_predict_independently(ranks: RankPool) -> None:
    results = ranks.run(predict_alone)
    assert [len(labels) for labels in results] == list(range(ranks.world_size))


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"group needs torch\.distributed"):
        KMeans(3, group=object())  # type: ignore[arg-type]
