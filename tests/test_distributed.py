"""The losses over several ranks against the same loss of one process, on the concatenated batch."""

from __future__ import annotations

import copy
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scale import counted
from mcl_kernels import (
    ClipLoss,
    MaskedInfoNCE,
    NTXentLoss,
    cached_backward,
    clip_loss,
    masked_info_nce,
    nt_xent,
    objectives,
)
from mcl_kernels.distributed.cost_model import (
    ExchangePlan,
    all_reduce_bytes,
    plan_exchange,
)
from mcl_kernels.distributed.group import describe
from mcl_kernels.distributed.placement import bucket_count, label_buckets, pack_clusters
from mcl_kernels.distributed.routes import Route
from mcl_kernels.distributed.transport import sum_copies
from tests.process_pool import RankPool

N, M, D = 60, 84, 8
OBJECTIVES = {
    "decoupled": objectives.decoupled,
    "decoupled_weighted": objectives.decoupled_weighted(),
    "ifm": objectives.ifm(),
    "debiased": objectives.debiased(),
    "hard_negative": objectives.hard_negative(0.5),
}
# Of N samples, where the shards begin and end: as many for each rank, or not, or for one rank none. Keys are spread
# in the same way.
SHARDS = {
    2: {"even": [0, 30, 60], "uneven": [0, 47, 60], "empty": [0, 0, 60]},
    4: {"even": [0, 15, 30, 45, 60], "uneven": [0, 7, 40, 41, 60], "empty": [0, 20, 20, 53, 60]},
}


def labels_of(kind: str, n: int, seed: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "balanced":
        return torch.arange(n) % 8
    if kind == "one":
        return torch.full((n,), 3)
    if kind == "alone":
        return torch.arange(n) * 1000
    assert kind == "zipf"  # a few large clusters and many small ones, rows without a label, huge labels
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(1.0 / torch.arange(1, 12), n, replacement=True, generator=generator)
    labels[::13] = -1
    labels[5:8] = torch.tensor([10**15 + 3, 10**15 + 3, 10**15 + 4])
    return labels


def make_batch(labels: str, temperature: str = "learned", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Whatever the losses take; what begins with "key" has M rows, all else N, a learned temperature none."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, D, generator=generator, dtype=torch.float64)  # so that similarities are not all about 0
    a, b, key = (torch.randn(n, D, generator=generator, dtype=torch.float64) + common for n in (N, N, M))
    b = a + 0.5 * b
    batch: dict[str, Any] = {"a": a.to(dtype), "b": b.to(dtype), "key": key.to(dtype)}
    batch |= {"labels": labels_of(labels, N, 0), "text_labels": labels_of(labels, N, 1)}
    batch |= {"key_labels": labels_of(labels, M, 2), "ids": torch.arange(N) % 50, "key_ids": torch.arange(M)}
    if temperature != "vector":
        return {**batch, "temperature": torch.tensor(0.3 if temperature == "learned" else [0.3], dtype=dtype)}
    of_row = 0.2 + torch.rand(2, N, generator=generator).to(dtype)
    return {**batch, "temperature_a": of_row[0], "temperature_b": of_row[1]}


def shard_of(batch: dict[str, Any], shards: str) -> dict[str, Any]:
    """That of this rank."""
    ends, rank = SHARDS[dist.get_world_size()][shards], dist.get_rank()
    begin, end = ends[rank], ends[rank + 1]

    def part(name: str, x: Tensor | None) -> Tensor | None:
        if x is None or name == "temperature":
            return x
        return x[begin * M // N : end * M // N] if name.startswith("key") else x[begin:end]

    return {name: part(name, x) for name, x in batch.items()}


def _temperature(x: dict[str, Any], *names: str) -> Any:
    return x["temperature"] if "temperature" in x else torch.cat([x[f"temperature_{name}"] for name in names])


def _nt_xent(x: dict[str, Any], **options: Any) -> Tensor:
    return nt_xent(x["a"], x["b"], x["labels"], temperature=_temperature(x, "a", "b"), **options)


def _nt_xent_with_ids(x: dict[str, Any], **options: Any) -> Tensor:
    return _nt_xent(x, ids=x["ids"], **options)


def _clip(x: dict[str, Any], **options: Any) -> Tensor:
    return clip_loss(x["a"], x["b"], x["labels"], logit_scale=1 / x["temperature"], normalize=True, **options)


def _clip_text_labels(x: dict[str, Any], **options: Any) -> Tensor:
    return _clip(x, text_labels=x["text_labels"], **options)


def _info_nce(x: dict[str, Any], **options: Any) -> Tensor:
    return masked_info_nce(x["a"], x["b"], x["labels"], temperature=_temperature(x, "a"), **options)


def _extra_keys(x: dict[str, Any], **options: Any) -> Tensor:
    key_labels = None if x["labels"] is None else torch.cat((x["labels"], x["key_labels"]))
    key = torch.cat((x["b"], x["key"]))
    return masked_info_nce(x["a"], key, x["labels"], key_labels, temperature=_temperature(x, "a"), **options)


def _queue(x: dict[str, Any], **options: Any) -> Tensor:
    return masked_info_nce(
        x["a"], x["key"], x["labels"], x["key_labels"], positive=x["b"], temperature=_temperature(x, "a"), **options
    )


def _queue_with_ids(x: dict[str, Any], **options: Any) -> Tensor:
    return _queue(x, ids=x["ids"], key_ids=x["key_ids"], **options)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "nt_xent": _nt_xent,
    "nt_xent, ids": _nt_xent_with_ids,
    "clip_loss": _clip,
    "clip_loss, text_labels": _clip_text_labels,
    "masked_info_nce": _info_nce,
    "masked_info_nce, extra keys": _extra_keys,
    "masked_info_nce, queue": _queue,
    "masked_info_nce, queue, ids": _queue_with_ids,
}


def value_and_gradients(loss: str, batch: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    floating = {k: x for k, x in batch.items() if x is not None and x.is_floating_point()}
    leaves = {name: x.clone().requires_grad_() for name, x in floating.items()}
    value = LOSSES[loss]({**batch, **leaves}, **options)
    if value.ndim:  # not all alike
        weight = torch.cat([batch["ids"] + 1.0] * (len(value) // max(len(batch["ids"]), 1)))
        (value * weight).sum().backward()
    else:
        value.backward()
    return value.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def total_of(x: Tensor) -> Tensor:
    """The sum over the ranks."""
    x = x.clone()
    dist.all_reduce(x)
    return x


def check_contract(
    loss: str,
    labels: str,
    shards: str,
    exchange: str,
    *,
    temperature: str = "learned",
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
    objective: str | None = None,
    **options: Any,
) -> None:
    """The mean of the ranks' losses is that of one process, and so are gradients as DDP averages them."""
    if objective is not None:
        options["objective"] = OBJECTIVES[objective]
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    world, batch = dist.get_world_size(), make_batch(labels, temperature, dtype)
    whole, expected = value_and_gradients(loss, batch, **options)
    value, grads = value_and_gradients(
        loss, shard_of(batch, shards), group=dist.group.WORLD, exchange=exchange, **options
    )
    assert grads.keys() == expected.keys()
    if options.get("reduction") == "none":
        world = 1
        rows = [shard_of({"a": part}, shards)["a"] for part in whole.view(-1, N)]
        close(value, torch.cat(rows))
    else:
        close(total_of(value) / world, whole)
    for name, of_rows in shard_of(expected, shards).items():
        of_ranks = total_of(grads[name]) if name == "temperature" else grads[name]
        assert of_ranks.dtype == dtype
        close(of_ranks / world, of_rows)


SPREAD = [(labels, shards) for labels in ("balanced", "zipf", "one", "alone") for shards in ("uneven", "empty")]


@pytest.mark.parametrize(("labels", "shards"), [("balanced", "even"), *SPREAD, ("none", "empty")])
@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", LOSSES)
def test_is_the_loss_of_one_process(ranks: RankPool, loss: str, exchange: str, labels: str, shards: str) -> None:
    ranks.run(check_contract, loss, labels, shards, exchange)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "clip" not in loss])
def test_a_temperature_for_each_row_travels_with_it(ranks: RankPool, loss: str, exchange: str) -> None:
    ranks.run(partial(check_contract, temperature="vector"), loss, "zipf", "uneven", exchange)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_temperature_of_shape_1_is_one_number(ranks: RankPool, loss: str, exchange: str) -> None:
    """On a rank with a single row, too (4 ranks, uneven), where a vector of temperatures has that shape."""
    for shards in ("uneven", "empty"):
        ranks.run(partial(check_contract, temperature="[1]"), loss, "zipf", shards, exchange)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_objective(ranks: RankPool, loss: str, objective: str) -> None:
    ranks.run(partial(check_contract, objective=objective), loss, "zipf", "uneven", "auto")
    if objective != "decoupled_weighted":
        ranks.run(partial(check_contract, objective=objective), loss, "zipf", "empty", "cluster")


@pytest.mark.parametrize("objective", ["decoupled_weighted"])
def test_an_objective_that_mixes_anchors_sees_all_of_them(ranks: RankPool, objective: str) -> None:
    check = partial(check_contract, objective=objective, temperature="vector")
    ranks.run(check, "nt_xent", "zipf", "empty", "gather")
    ranks.run(check, "masked_info_nce, queue", "alone", "uneven", "auto")


@pytest.mark.parametrize("options", [{"negatives": "different"}, {"negatives": "all"}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_needs_more_than_a_cluster_is_gathered(ranks: RankPool, loss: str, options: dict[str, str]) -> None:
    ranks.run(partial(check_contract, **options), loss, "zipf", "uneven", "auto")
    ranks.run(check_refused, loss, options)


def check_refused(loss: str, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="exchange='cluster' keeps each cluster by itself: "):
        LOSSES[loss](make_batch("balanced"), group=dist.group.WORLD, exchange="cluster", **options)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
def test_a_sum_is_spread_like_a_mean(ranks: RankPool, exchange: str) -> None:
    for loss in LOSSES:
        ranks.run(partial(check_contract, reduction="sum"), loss, "zipf", "uneven", exchange)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("impl", ["native", "blockwise", "reference"])
def test_every_implementation(ranks: RankPool, impl: str, exchange: str) -> None:
    for loss in ("nt_xent", "clip_loss", "masked_info_nce, queue"):
        check = partial(check_contract, impl=impl, dtype=torch.float32, tolerance=2e-5)
        ranks.run(check, loss, "zipf", "uneven", exchange)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
def test_half_precision_rows(ranks: RankPool, exchange: str) -> None:
    for loss in ("nt_xent", "clip_loss", "masked_info_nce, queue"):
        check = partial(check_contract, dtype=torch.bfloat16, tolerance=2e-2)
        ranks.run(check, loss, "zipf", "uneven", exchange)


# --- what is sent ---------------------------------------------------------------------------------------------


def check_bytes(loss: str, labels: str, shards: str, exchange: str, dtype: torch.dtype) -> ExchangePlan:
    batch = make_batch(labels, dtype=dtype)
    mine = shard_of(batch, shards)
    name = loss.split(",")[0]
    with counted() as forward:
        leaves = {k: mine[k].requires_grad_() for k in ("a", "b", "key")}
        value = LOSSES[loss]({**mine, **leaves}, group=dist.group.WORLD, exchange=exchange)
    with counted() as backward:
        value.backward()
    values = sorted({*batch["labels"].tolist(), *batch["key_labels"].tolist()})
    histograms = []
    for labels_here in (mine["labels"], mine["key_labels"]):
        counts = torch.zeros(dist.get_world_size(), values[-1] + 1, dtype=torch.int64)
        counts[dist.get_rank()] = torch.bincount(labels_here, minlength=values[-1] + 1)
        dist.all_reduce(counts)
        histograms.append(counts)
    keys = histograms[1] if "queue" in loss else None
    options = {"loss": name, "features": D, "dtype": dtype}
    # What a rank decides by is the histogram of all ranks together.
    of_all = plan_exchange(
        histograms[0].sum(0), dist.get_world_size(), key_histogram=None if keys is None else keys.sum(0),
        exchange=exchange, **options,
    )  # fmt: skip
    plan = plan_exchange(histograms[0], dist.get_world_size(), key_histogram=keys, exchange=of_all.exchange, **options)
    rank, histogram = dist.get_rank(), 0
    if (exchange, plan.exchange) == ("auto", "gather"):  # had to count first
        histogram = all_reduce_bytes(
            (2 if name == "masked_info_nce" else 1) * 8 * (bucket_count(len(histograms[0])) + 1), len(histograms[0])
        )
    assert (*(forward.bytes - histogram),) == (plan.sent[rank], plan.received[rank])
    assert (*backward.bytes,) == (plan.grad_sent[rank], plan.grad_received[rank])
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", ["balanced", "one", "alone"])
@pytest.mark.parametrize("exchange", ["gather", "cluster", "auto"])
@pytest.mark.parametrize("loss", ["nt_xent", "clip_loss", "masked_info_nce", "masked_info_nce, queue, ids"])
def test_bytes_are_those_of_the_plan(
    ranks: RankPool, loss: str, exchange: str, labels: str, dtype: torch.dtype
) -> None:
    plans = ranks.run(check_bytes, loss, labels, "uneven", exchange, dtype)
    assert len({plan.exchange for plan in plans}) == 1


@pytest.mark.parametrize("world", [2, 8, 64, 4096])
def test_cluster_sends_about_its_own_batch_whatever_the_world_size(world: int) -> None:
    per_rank, features = 1024, 128
    own = per_rank * 2 * features * 4
    plan = plan_exchange([per_rank // 4] * (4 * world), world, features=features, exchange="cluster")
    assert max(plan.sent.max(), plan.received.max(), plan.grad_sent.max(), plan.grad_received.max()) <= 2.2 * own
    gathered = plan_exchange([per_rank // 4] * (4 * world), world, features=features, exchange="gather")
    assert gathered.received.min() >= (world - 1) * own


def check_measured_bytes() -> None:
    """What the plan promises for balanced clusters, counted: 4 labels for each rank, samples in no order."""
    world, per_rank, features = dist.get_world_size(), 512, 64
    generator = torch.Generator().manual_seed(dist.get_rank())
    a, b = torch.randn(2, per_rank, features, generator=generator).requires_grad_()
    labels = torch.randint(4 * world, (per_rank,), generator=generator)
    own = 2 * a.nbytes
    with counted() as forward:
        loss = nt_xent(a, b, labels, group=dist.group.WORLD, exchange="cluster")
    with counted() as backward:
        loss.backward()
    assert max(*forward.bytes, *backward.bytes) <= 2.2 * own
    with counted() as gathered:
        nt_xent(a, b, labels, group=dist.group.WORLD, exchange="gather")
    assert gathered.bytes.min() >= (world - 1) * own


def test_cluster_sends_at_most_twice_its_own_batch(ranks: RankPool) -> None:
    ranks.run(check_measured_bytes)


def test_clusters_are_packed_by_their_pairs() -> None:
    sizes = [40, 30, 30, 20, 20, 20, 10]
    owners = pack_clusters(sizes, sizes, 2, 2)
    loads = [sum(n * n for n, of in zip(sizes, owners, strict=True) if rank in of) for rank in (0, 1)]
    assert max(loads) - min(loads) <= 20**2
    assert all(len(of) == 1 for of in owners)


@pytest.mark.parametrize("world", [2, 3, 8, 61])
def test_packing_is_never_worse_than_whole_clusters_and_gives_each_an_owner(world: int) -> None:
    generator = torch.Generator().manual_seed(world)
    for _ in range(50):
        k = int(torch.randint(1, 40, (), generator=generator))
        sizes = (1000 / torch.randint(1, 200, (k,), generator=generator)).long().tolist()
        plan = plan_exchange(sizes, world, exchange="cluster")
        assert all(
            of == () if n < 2 else 0 < len(of) == len(set(of)) <= n for n, of in zip(sizes, plan.owners, strict=True)
        )
        assert plan.operations.sum() >= 16 * 128 * sum(n * n for n in sizes if n > 1)
        largest = max([n * n for n in sizes if n > 1], default=0)
        bound = max(largest, sum(n * n for n in sizes) / world + largest)
        assert plan.operations.max() <= 16 * 128 * bound


def test_labels_above_the_number_of_buckets_are_spread_over_them() -> None:
    """Packed pairs of labels, a * 1024 + b say, would otherwise all be one."""
    for step in (1, 1000, 1024, 4096, 2**20, 10**15):
        buckets = label_buckets(torch.arange(64) * step, 16)
        assert len(buckets.unique()) >= 58, step
        assert int(buckets.min()) >= 0
        assert int(buckets.max()) < bucket_count(16)
    assert label_buckets(torch.tensor([-1, -(2**63), 0, 1023]), 2).tolist() == [-1, -1, 0, 1023]
    histogram = torch.zeros(3000, dtype=torch.int64)
    histogram[[5, 2005, 2006]] = torch.tensor([10, 20, 4])
    plan = plan_exchange(histogram, 2, exchange="cluster")
    owned = [k for k, of in enumerate(plan.owners) if of]
    assert owned == sorted(label_buckets(torch.tensor([5, 2005, 2006]), 2).tolist())


def test_operations_do_not_overflow() -> None:
    plan = plan_exchange([[5 * 10**8] * 4] * 8, 8, loss="clip_loss", features=4096, exchange="gather")
    assert plan.operations.sum() == pytest.approx(16.0 * 4096 * 4 * (4e9) ** 2)


@pytest.mark.parametrize(
    ("histogram", "world", "exchange"),
    [
        ([1000] * 64, 8, "cluster"),
        ([8000], 8, "gather"),  # one cluster goes to every rank anyway
        ([1] * 40, 8, "cluster"),  # every sample stays where it is
        ([20000, *[10] * 400], 4, "cluster"),
    ],
)
def test_auto_takes_what_is_done_first(histogram: list[int], world: int, exchange: str) -> None:
    plan = plan_exchange(histogram, world)
    assert plan.exchange == exchange
    both = [plan_exchange(histogram, world, exchange=name) for name in ("cluster", "gather")]
    seconds = [float((each.operations + 1000.0 * each.bytes).max()) for each in both]
    assert seconds.index(min(seconds)) == ("cluster", "gather").index(exchange)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"histogram": [1.5]}, TypeError, "histogram must hold integers: got float64"),
        ({"histogram": [-1]}, ValueError, "histogram must be at least 0: got -1"),
        (
            {"histogram": [[1, 2]] * 3},
            ValueError,
            r"histogram must have shape \[labels\] or \[2, labels\]: got \[3, 2\]",
        ),
        ({"world_size": 0}, ValueError, "world_size must be at least 1: got 0"),
        ({"loss": "triplet"}, ValueError, "loss must be one of"),
        ({"exchange": "ring"}, ValueError, "exchange must be one of 'auto', 'cluster', 'gather': got 'ring'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float16"),
        ({"key_histogram": [1]}, ValueError, "key_histogram is for loss='masked_info_nce': got it with 'nt_xent'"),
        (
            {"loss": "masked_info_nce", "key_histogram": [1, 2]},
            ValueError,
            "key_histogram must have as many labels as histogram",
        ),
    ],
)
def test_errors_of_plan_exchange(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_exchange(**{"histogram": [3], "world_size": 2, **arguments})


# --- inside a training loop -----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Two layers and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), self.log_scale.exp()


def _losses_of_embeddings(name: str, model: nn.Module, x: dict[str, Any], **options: Any) -> Tensor:
    both, scale = model(torch.cat((x["a"], x["b"])))
    a, b = both.chunk(2)
    if name == "nt_xent":
        return NTXentLoss(1.0 / scale, **options)(a, b, x["labels"])
    if name == "clip_loss":
        return ClipLoss(normalize=True, **options)(a, b, scale, x["labels"])
    return MaskedInfoNCE(1.0 / scale, **options)(a, x["key"], x["labels"], x["key_labels"], positive=b)


def check_training(loss: str, labels: str, shards: str, exchange: str, compiled: bool = False) -> None:
    batch = make_batch(labels, dtype=torch.float32)
    mine = shard_of(batch, shards)
    parameters = []
    for wrapped in (False, True):
        encoder = Encoder()
        model: Any = DistributedDataParallel(encoder) if wrapped else encoder
        if wrapped and compiled:
            model = torch.compile(model)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
        for _ in range(5):
            options = {"group": dist.group.WORLD, "exchange": exchange} if wrapped else {}
            value = _losses_of_embeddings(loss, model, mine if wrapped else batch, **options)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        parameters.append(list(encoder.parameters()))
    moved = [
        float((after - before).abs().max()) for after, before in zip(parameters[0], Encoder().parameters(), strict=True)
    ]
    assert min(moved) > 1e-3
    for single, spread in zip(*parameters, strict=True):
        torch.testing.assert_close(spread, single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", ["nt_xent", "clip_loss", "masked_info_nce"])
def test_five_steps_with_ddp_are_those_of_one_process(ranks: RankPool, loss: str, exchange: str) -> None:
    for labels, shards in (("balanced", "even"), ("zipf", "empty"), ("alone", "uneven")):
        if labels != "alone" or loss == "masked_info_nce":
            ranks.run(check_training, loss, labels, shards, exchange)


@pytest.mark.slow
def test_with_a_compiled_encoder() -> None:
    with RankPool(2) as pool:
        pool.run(check_training, "nt_xent", "zipf", "uneven", "cluster", True)


class ModelWithLoss(nn.Module):
    """A layer and the loss of its output, with a temperature of the shape that FSDP2 takes, which is not []."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.layer, self.temperature = name, nn.Linear(D, D), nn.Parameter(torch.tensor([0.3]))
        if name == "clip_loss":
            self.loss: nn.Module = ClipLoss(normalize=True, **options)
        else:
            self.loss = {"nt_xent": NTXentLoss, "masked_info_nce": MaskedInfoNCE}[name](self.temperature, **options)
            del self.temperature  # it is that of the loss

    def forward(self, x: dict[str, Any]) -> Tensor:
        a, b = self.layer(x["a"]), self.layer(x["b"])
        if self.name == "clip_loss":
            return self.loss(a, b, 1 / self.temperature, x["labels"])  # type: ignore[no-any-return]
        return self.loss(a, b, x["labels"])  # type: ignore[no-any-return]


def check_fsdp(loss: str, exchange: str) -> None:
    batch = make_batch("zipf", dtype=torch.float32)
    parameters = []
    for sharded in (False, True):
        model = ModelWithLoss(loss, **({"group": dist.group.WORLD, "exchange": exchange} if sharded else {}))
        if sharded:
            for module in (model.loss, model):
                fully_shard(module)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(shard_of(batch, "uneven") if sharded else batch).backward()
            optimizer.step()
        whole = {name: x.full_tensor() if sharded else x for name, x in model.named_parameters()}
        parameters.append({name: x.detach() for name, x in whole.items()})
    single, spread = parameters
    (temperature,) = (x for name, x in single.items() if "temperature" in name)
    assert temperature.shape == (1,)
    assert abs(float(temperature) - 0.3) > 1e-3
    for name, x in single.items():
        torch.testing.assert_close(spread[name], x, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch computes on GPUs only")
@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", ["nt_xent", "clip_loss", "masked_info_nce"])
def test_three_steps_with_fsdp_are_those_of_one_process(ranks: RankPool, loss: str, exchange: str) -> None:
    ranks.run(check_fsdp, loss, exchange)


def check_copies() -> None:
    """An average of a model that holds its loss, as torch.optim.swa_utils makes it."""
    loss = NTXentLoss(nn.Parameter(torch.tensor(0.5)), group=dist.group.WORLD, exchange="cluster")
    twin = copy.deepcopy(loss)
    assert f"group={dist.get_world_size()} ranks, exchange=cluster" in repr(twin)
    assert twin.temperature is not loss.temperature
    mine = shard_of(make_batch("zipf"), "uneven")
    assert twin(mine["a"], mine["b"], mine["labels"]).equal(loss(mine["a"], mine["b"], mine["labels"]))


def test_modules_are_copied(ranks: RankPool) -> None:
    ranks.run(check_copies)


def check_double_backward(exchange: str) -> None:
    """The gradient of a gradient's norm: exact with the reference, refused by what is fused."""
    batch = make_batch("zipf")

    def second(x: dict[str, Any], scale: float, **options: Any) -> list[Tensor]:
        a, b = (x[name].clone().requires_grad_() for name in ("a", "b"))
        value = _nt_xent({**x, "a": a, "b": b}, **options) * scale
        of_a, of_b = torch.autograd.grad(value, (a, b), create_graph=True)
        return list(torch.autograd.grad(of_a.square().sum() + (of_b**3).sum(), (a, b)))

    expected = second(batch, 1.0, impl="reference")
    mine, world = shard_of(batch, "uneven"), dist.get_world_size()
    options = {"group": dist.group.WORLD, "exchange": exchange}
    # The gradients of the sum of all ranks' losses; their norm is a sum over the ranks too.
    for got, of_whole in zip(second(mine, 1.0 / world, impl="reference", **options), expected, strict=True):
        torch.testing.assert_close(got, shard_of({"a": of_whole}, "uneven")["a"])
    with pytest.raises(RuntimeError, match=r"impl='reference'"):
        second(mine, 1.0, **options)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
def test_double_backward_is_exact_or_refused(ranks: RankPool, exchange: str) -> None:
    ranks.run(check_double_backward, exchange)


def check_single_rows(exchange: str) -> None:
    """A rank that sends or receives one row, of any width in bytes, in any layout."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group = {"group": dist.group.WORLD, "exchange": exchange}
    generator = torch.Generator().manual_seed(0)
    for d in (1, 3, 8):
        for dtypes in ((torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2):
            rows = torch.randn(2, world + 5, d, generator=generator)
            a, b = (x.to(dtype) for x, dtype in zip(rows, dtypes, strict=True))
            labels = torch.tensor([0] * (world + 4) + [1])
            here = slice(rank, rank + 1 if rank < world - 1 else None)
            x, y = a[here].T.contiguous().T, b[here]
            temperature = torch.full((len(x),), 0.5)
            key_labels = 1 - labels
            value = masked_info_nce(x, y, labels[here], key_labels[here], positive=y, temperature=temperature, **group)
            whole = masked_info_nce(a, b, labels, key_labels, positive=b, temperature=torch.full((len(a),), 0.5))
            torch.testing.assert_close(total_of(value) / world, whole, rtol=1e-4, atol=1e-4)
            value = clip_loss(x, y, labels[here], logit_scale=2.0, **group)
            whole = clip_loss(a, b, labels, logit_scale=2.0)
            torch.testing.assert_close(total_of(value) / world, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
def test_single_rows_of_any_width(ranks: RankPool, exchange: str) -> None:
    ranks.run(check_single_rows, exchange)


def test_copies_are_summed_in_fp32() -> None:
    """256 + 1 is 256 in bf16."""
    grad = torch.tensor([[256.0], [1.0], [1.0], [1.0], [7.0]]).bfloat16()
    move = Route(torch.tensor([0, 0, 0, 0, 1]), [1, 1, 1, 2], [])
    assert sum_copies(grad, move, 3).tolist() == [[260.0], [7.0], [0.0]]


@dataclass(frozen=True)
class Wrapped:
    """An objective around another one."""

    inner: Callable[..., Tensor]
    weight: float = 1.0

    def __call__(self, *arguments: Any) -> Tensor:
        return self.weight * self.inner(*arguments)


def check_own_objectives() -> None:
    x, group = torch.ones(3, 8), {"group": dist.group.WORLD}
    nt_xent(x, x, objective=Wrapped(objectives.info_nce), **group)
    nt_xent(x, x, objective=partial(objectives.info_nce), **group)
    for objective in (Wrapped(objectives.info_nce, weight=1.0 + dist.get_rank()), partial(_weighted, dist.get_rank())):
        with pytest.raises(ValueError, match="objective must be alike on every rank"):
            nt_xent(x, x, objective=objective, **group)


def _weighted(weight: float, *arguments: Any) -> Tensor:
    return weight * objectives.info_nce(*arguments)


def test_own_objectives_are_compared_by_what_they_are(ranks: RankPool) -> None:
    ranks.run(check_own_objectives)


def check_alone() -> None:
    """No anchor has a negative on any rank: the loss is 0, and every gradient is exactly 0."""
    batch = make_batch("alone")
    for exchange in ("cluster", "gather"):
        value, grads = value_and_gradients(
            "nt_xent", shard_of(batch, "uneven"), group=dist.group.WORLD, exchange=exchange
        )
        assert value == 0
        assert all(bool((grad == 0).all()) for grad in grads.values())


def test_anchors_that_are_alone(ranks: RankPool) -> None:
    ranks.run(check_alone)


def check_nan() -> None:
    """A NaN on one rank reaches the loss of the rank that compares it."""
    for labels in ("balanced", "one"):
        mine = shard_of(make_batch(labels), "uneven")
        if dist.get_rank() == 0:
            mine["a"][0, 0] = torch.nan
        for exchange in ("cluster", "gather"):
            value = nt_xent(mine["a"], mine["b"], mine["labels"], group=dist.group.WORLD, exchange=exchange)
            assert total_of(value).isnan()


def test_a_nan_is_never_lost(ranks: RankPool) -> None:
    ranks.run(check_nan)


def check_empty() -> None:
    x = torch.empty(0, D, requires_grad=True)
    for exchange in ("gather", "cluster"):
        value = nt_xent(x, x, x[:, 0].long(), group=dist.group.WORLD, exchange=exchange)
        assert value == 0
        value.backward()
        assert x.grad is not None


def test_no_rank_has_a_sample(ranks: RankPool) -> None:
    ranks.run(check_empty)


def check_same_bits() -> None:
    mine = shard_of(make_batch("zipf", dtype=torch.float32), "uneven")
    for exchange in ("gather", "cluster"):
        runs = [value_and_gradients("nt_xent", mine, group=dist.group.WORLD, exchange=exchange) for _ in range(3)]
        for value, grads in runs[1:]:
            assert value.equal(runs[0][0])
            assert all(grads[name].equal(runs[0][1][name]) for name in grads)


def test_the_same_bits_on_every_run(ranks: RankPool) -> None:
    ranks.run(check_same_bits)


def check_a_part_of_the_ranks() -> None:
    """Ranks 0 and 1 by themselves; the others are no members."""
    group = dist.new_group([0, 1])
    batch = make_batch("zipf")
    half = N // 2
    if dist.get_rank() > 1:
        with pytest.raises(ValueError, match=r"group must be one that this process belongs to: got one of other ranks"):
            nt_xent(batch["a"], batch["b"], group=group)
        return
    here = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    value = nt_xent(batch["a"][here], batch["b"][here], batch["labels"][here], group=group, exchange="cluster")
    dist.all_reduce(value, group=group)
    torch.testing.assert_close(value / 2, nt_xent(batch["a"], batch["b"], batch["labels"]))


def test_a_group_of_some_ranks(ranks: RankPool) -> None:
    ranks.run(check_a_part_of_the_ranks)


# --- what goes wrong ------------------------------------------------------------------------------------------

UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "features": (
        {"view_a": torch.ones(3, 9), "view_b": torch.ones(3, 9)},
        r"view_a .* got \[rows, 8\] float32 on rank 0 and \[rows, 9\]",
    ),
    "dtype": (
        {"view_b": torch.ones(3, 8).half()},
        r"view_b .* got \[rows, 8\] float32 on rank 0 and \[rows, 8\] float16 on rank 1",
    ),
    "label dtype": (
        {"labels": torch.zeros(3, dtype=torch.int32)},
        r"labels .* got \[rows\] int64 on rank 0 and \[rows\] int32 on rank 1",
    ),
    "no labels": ({"labels": None}, r"labels .* got \[rows\] int64 on rank 0 and None on rank 1"),
    "gradient": ({"view_a": torch.ones(3, 8, requires_grad=True)}, "view_a .* and .* that requires grad on rank 1"),
    "temperature": ({"temperature": 0.2}, "temperature .* got 0.5 on rank 0 and 0.2 on rank 1"),
    "temperatures": (
        {"temperature": torch.full((6,), 0.5)},
        r"temperature .* got 0.5 on rank 0 and \[rows\] float32 on rank 1",
    ),
    "objective": (
        {"objective": objectives.ifm(0.2)},
        r"objective .* got info_nce on rank 0 and ifm\(eps=0.2, alpha=1\)",
    ),
    "exchange": ({"exchange": "gather"}, "exchange must be alike .* got 'auto' on rank 0 and 'gather' on rank 1"),
    "negatives": ({"negatives": "all"}, "negatives must be alike .* got 'same' on rank 0 and 'all' on rank 1"),
    "loss": ({"loss": clip_loss, "logit_scale": 1.0}, "loss must be alike .* got 'nt_xent' on rank 0 and 'clip_loss'"),
}


def check_unlike(name: str) -> None:
    """The last rank is called with something else: every rank hears of it, and the group goes on."""
    arguments: dict[str, Any] = {
        "view_a": torch.ones(3, 8),
        "view_b": torch.ones(3, 8),
        "labels": torch.zeros(3).long(),
    }
    changed, message = UNLIKE[name]
    if dist.get_rank() == dist.get_world_size() - 1:
        arguments |= changed
    message = message.replace("rank 1", f"rank {dist.get_world_size() - 1}")
    loss = arguments.pop("loss", nt_xent)
    x, y = arguments.pop("view_a"), arguments.pop("view_b")
    with pytest.raises(ValueError, match=message):
        loss(x, y, group=dist.group.WORLD, **arguments)
    nt_xent(torch.ones(3, 8), torch.ones(3, 8), group=dist.group.WORLD)


def check_one_temperature_beside_many(exchange: str) -> None:
    """One number of shape [1] on rank 0, one for each row elsewhere."""
    x, last = torch.ones(3, 8), dist.get_world_size() - 1
    for own, others in (([1], [6]), ([6], [1]), ([], [6])):
        temperature = torch.full(own if dist.get_rank() == 0 else others, 0.5)
        got, expected = (r"\[rows\] float32" if shape == [6] else r"\[\] float32" for shape in (own, others))
        with pytest.raises(
            ValueError, match=f"temperature must be alike .* got {got} on rank 0 and {expected} on rank"
        ):
            nt_xent(x, x, temperature=temperature, group=dist.group.WORLD, exchange=exchange)
    one = torch.full([1] if dist.get_rank() == last else [], 0.5)
    nt_xent(x, x, temperature=one, group=dist.group.WORLD, exchange=exchange)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
def test_one_temperature_beside_many(ranks: RankPool, exchange: str) -> None:
    ranks.run(check_one_temperature_beside_many, exchange)


def check_numbers_of_other_types() -> None:
    """Numbers are compared by their value."""
    x, last = torch.ones(3, 8), dist.get_rank() == dist.get_world_size() - 1
    for one, other in ((0.5, np.float64(0.5)), (1, 1.0), (1.0, np.int64(1))):
        nt_xent(x, x, temperature=other if last else one, group=dist.group.WORLD)
        objective = objectives.hard_negative(other if last else one)
        nt_xent(x, x, objective=objective, group=dist.group.WORLD)


def test_numbers_of_other_types_are_alike(ranks: RankPool) -> None:
    ranks.run(check_numbers_of_other_types)


def test_numbers_aredescribe_by_their_value() -> None:
    assert [describe(value) for value in (0.5, np.float32(0.5), 1.0, 7, True)] == ["0.5", "0.5", "1", "7", "True"]
    assert describe(2**60 + 1) != describe(2**60)


def check_no_grad_on_one_rank() -> None:
    """It would not come to the backward pass."""
    x = torch.ones(3, 8, requires_grad=True)
    with (
        torch.set_grad_enabled(dist.get_rank() > 0),
        pytest.raises(ValueError, match=r"view_a must be alike .* and .* that requires grad on rank 1"),
    ):
        nt_xent(x, x, group=dist.group.WORLD)


def test_a_rank_without_gradients(ranks: RankPool) -> None:
    ranks.run(check_no_grad_on_one_rank)


@pytest.mark.parametrize("name", UNLIKE)
def test_ranks_that_disagree_are_told_so(ranks: RankPool, name: str) -> None:
    ranks.run(check_unlike, name)


class Unprintable:
    """An objective that cannot be described."""

    def __repr__(self) -> str:
        raise KeyError("no name")


X, Y, KEYS, LABELS = torch.ones(6, D), torch.ones(6, D), torch.ones(9, D), torch.arange(6) % 2
OF_QUERIES, OF_KEYS = torch.arange(6), torch.arange(9)
# What is refused whatever the loss, of its first embeddings or of an option.
REFUSED_BY_ALL: list[dict[str, Any]] = [
    {"first": [1.0]},
    {"first": X[0]},
    {"first": X.long()},
    {"first": X[:, :0]},
    {"first": X[:, :5]},
    {"first": X.to("meta")},
    {"labels": LABELS[:-1]},
    {"labels": LABELS.float()},
    {"labels": [0] * 6},
    {"ids": LABELS[:, None]},
    {"ids": OF_QUERIES[:-1]},
    {"negatives": "others"},
    {"reduction": "median"},
    {"exchange": "ring"},
    {"impl": "fast"},
    {"impl": "cuda"},
    {"objective": Unprintable()},
]
OF_TEMPERATURE = [0.0, -1.0, "0.5", None, torch.tensor(1), torch.ones(5), torch.ones(6, 1)]
REFUSED: dict[str, list[dict[str, Any]]] = {
    "nt_xent": [
        *REFUSED_BY_ALL,
        *({"temperature": value} for value in OF_TEMPERATURE),
        {"view_b": Y[:-1]},
        {"labels": None, "negatives": "different"},
    ],
    "clip_loss": [
        *REFUSED_BY_ALL,
        *({"logit_scale": value} for value in (0.0, "1", None, torch.tensor(1), torch.ones(2))),
        {"text_features": Y[:, :3], "normalize": False},
        {"text_labels": LABELS[:-1]},
        {"labels": None, "negatives": "different"},
    ],
    "masked_info_nce": [
        *REFUSED_BY_ALL,
        *({"temperature": value} for value in OF_TEMPERATURE),
        {"impl": "fast", "normalize": False},
        {"key": KEYS[:3]},
        {"key": KEYS[:, :3]},
        {"positive": Y[:-1]},
        {"positive": 1},
        {"key_labels": None},
        {"key_ids": OF_KEYS},
        {"key_labels": OF_KEYS[:-1]},
    ],
}


def refusable(loss: str, **changed: Any) -> Tensor:
    """A small loss of this rank."""
    arguments: dict[str, Any] = {"first": X, "labels": LABELS, "exchange": "auto", **changed}
    first, options = arguments.pop("first"), {"group": dist.group.WORLD, **arguments}
    if loss == "nt_xent":
        return nt_xent(first, options.pop("view_b", Y), **options)
    if loss == "clip_loss":
        return clip_loss(first, options.pop("text_features", Y), **{"logit_scale": 2.0, **options})
    return masked_info_nce(first, options.pop("key", KEYS), **{"key_labels": OF_KEYS % 2, **options})


def check_refused_on_one_rank(loss: str, exchange: str) -> None:
    """Caught, and the following step is that of a run without the error."""
    last = dist.get_world_size() - 1
    batch = shard_of(make_batch("balanced"), "uneven")
    steps = [{**batch, "temperature": batch["temperature"] + 0.1 * step} for step in range(3)]
    name = f"{loss}, queue" if loss == "masked_info_nce" else loss
    options = {"group": dist.group.WORLD, "exchange": exchange}
    expected = [value_and_gradients(name, step, **options) for step in steps]
    for index, changed in enumerate(REFUSED[loss]):
        mine = changed if dist.get_rank() == last else {}
        with pytest.raises(Exception, match=r".") as failure:
            refusable(loss, **{"exchange": exchange, **mine})
        elsewhere = str(failure.value).startswith(f"rank {last} of the group met an error: ")
        assert elsewhere == (dist.get_rank() != last), (changed, failure.value)
        assert isinstance(failure.value, ValueError) or not elsewhere
        value, grads = value_and_gradients(name, steps[index % 3], **options)
        assert value.equal(expected[index % 3][0]), changed
        assert all(grads[k].equal(x) for k, x in expected[index % 3][1].items()), changed


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", REFUSED)
def test_what_one_rank_refuses_is_an_error_on_all_in_that_step(ranks: RankPool, loss: str, exchange: str) -> None:
    ranks.run(check_refused_on_one_rank, loss, exchange)


def check_refused_on_several_ranks() -> None:
    """Every rank has its own error, alike or not."""
    for temperature in (0.0, -1.0 - dist.get_rank()):
        with pytest.raises(ValueError, match=f"temperature must be positive: got {temperature}"):
            refusable("nt_xent", temperature=temperature)
    refusable("nt_xent")


def test_several_ranks_refuse(ranks: RankPool) -> None:
    ranks.run(check_refused_on_several_ranks)


def check_failing_objective() -> None:
    """It is the same on all ranks, so that all of them have its error, after the exchange."""
    for exchange in ("gather", "cluster"):
        with pytest.raises(TypeError, match="positional arguments"):
            refusable("nt_xent", objective=partial(_weighted, 1.0, 2.0), exchange=exchange)
        refusable("nt_xent", exchange=exchange)


def test_an_objective_that_raises(ranks: RankPool) -> None:
    ranks.run(check_failing_objective)


def check_cached_backward() -> None:
    """The loss is the meeting, once for all batches: a refusal there is shared."""
    last, weight = dist.get_world_size() - 1, torch.ones(D, requires_grad=True)
    of_rank = LABELS[:-1] if dist.get_rank() == last else LABELS
    message = "labels must have one entry per row" if dist.get_rank() == last else f"rank {last} of the group met"

    def run(labels: Tensor) -> None:
        cached_backward(lambda x: x * weight, X.split(2), lambda x: nt_xent(x, x, labels, group=dist.group.WORLD))

    with pytest.raises(ValueError, match=message):
        run(of_rank)
    run(LABELS)


def test_a_refusal_inside_cached_backward(ranks: RankPool) -> None:
    ranks.run(check_cached_backward)


def test_a_tensor_isdescribe_with_its_device() -> None:
    """A rank whose embeddings are not where the others' are would fail by itself in the exchange."""
    assert describe(torch.ones(3, 8, device="meta")) == "[rows, 8] float32 on meta"


def fail_on_last_rank(how: str) -> None:
    last = dist.get_rank() == dist.get_world_size() - 1
    if how == "raises" and last:
        nt_xent(torch.ones(3, 8), torch.ones(3, 7), group=dist.group.WORLD)
    if how == "killed" and last:  # in the exchange, after what comes before it: rank 0 is left waiting
        dist.all_to_all_single = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    x = torch.ones(3, 8, requires_grad=True)
    nt_xent(x, x, torch.zeros(3).long(), group=dist.group.WORLD, exchange="cluster").backward()


@pytest.mark.parametrize(
    ("how", "timeout", "errors"),
    [
        ("raises", 60.0, ("OtherRankError: rank 1 of the group met an error", "ValueError: view_b must have")),
        ("killed", 5.0, ("RuntimeError|DistBackendError", "the process ended")),
    ],
)
def test_a_rank_that_fails_ends_the_others(how: str, timeout: float, errors: tuple[str, str]) -> None:
    with RankPool(2, timeout=timeout) as pool:
        pool.run(time.time)
        started = time.monotonic()
        with pytest.raises(AssertionError) as failure:
            pool.run(fail_on_last_rank, how)
        waited = time.monotonic() - started
    assert waited < 15
    for of_rank, error in zip(str(failure.value).split("rank 1: ", 1), errors, strict=True):
        assert re.search(error, of_rank)


def test_a_group_is_needed() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group"):
        nt_xent(x, x, group="world")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"exchange must be one of 'auto', 'cluster', 'gather': got 'ring'"):
        nt_xent(x, x, exchange="ring")


def check_group_type() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(TypeError, match=r"group must be a process group .*: got str"):
        nt_xent(x, x, group="world")  # type: ignore[arg-type]


def test_a_group_of_another_type(ranks: RankPool) -> None:
    ranks.run(check_group_type)
