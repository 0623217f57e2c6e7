"""Rows and gradients in transit: the bytes of `plan_exchange`, counted, and the sums over copies of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.traffic import count_traffic
from mcl_kernels import ExchangePlan, nt_xent, plan_exchange
from mcl_kernels.distributed.cost_model import all_reduce_bytes
from mcl_kernels.distributed.placement import bucket_count
from mcl_kernels.distributed.routes import Route
from mcl_kernels.distributed.transport import sum_copies
from tests.process_pool import RankPool
from tests.sharded_losses import LOSSES, D, make_batch, shard_of


def histogram_by_rank(labels: torch.Tensor, n_labels: int) -> torch.Tensor:
    """Number of samples of each rank and label, [W, n_labels]."""
    counts = torch.zeros(dist.get_world_size(), n_labels, dtype=torch.int64)
    counts[dist.get_rank()] = torch.bincount(labels, minlength=n_labels)
    dist.all_reduce(counts)
    return counts


def check_bytes(loss: str, labels: str, shards: str, exchange: str, dtype: torch.dtype) -> ExchangePlan:
    batch = make_batch(labels, dtype=dtype)
    shard, rank, world_size = shard_of(batch, shards), dist.get_rank(), dist.get_world_size()
    with count_traffic() as forward:
        leaves = {name: shard[name].requires_grad_() for name in ("a", "b", "key")}
        value = LOSSES[loss]({**shard, **leaves}, group=dist.group.WORLD, exchange=exchange)
    with count_traffic() as backward:
        value.backward()
    n_labels = int(torch.cat((batch["labels"], batch["key_labels"])).max()) + 1
    histogram = histogram_by_rank(shard["labels"], n_labels)
    keys = histogram_by_rank(shard["key_labels"], n_labels) if "queue" in loss else None
    name = loss.split(",")[0]
    options: dict[str, Any] = {"loss": name, "features": D, "dtype": dtype}
    # The ranks decide by the histogram of all ranks together; the bytes follow from that of each rank.
    total_keys = None if keys is None else keys.sum(0)
    decision = plan_exchange(histogram.sum(0), world_size, key_histogram=total_keys, exchange=exchange, **options)
    plan = plan_exchange(histogram, world_size, key_histogram=keys, exchange=decision.exchange, **options)
    counting = 0
    if exchange == "auto" and plan.exchange == "gather":  # the labels were counted for this decision
        sides = 2 if name == "masked_info_nce" else 1
        counting = all_reduce_bytes(sides * 8 * (bucket_count(world_size) + 1), world_size)
    assert (*(forward.bytes - counting),) == (plan.sent[rank], plan.received[rank])
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


def check_balanced_clusters() -> None:
    """4 labels per rank; samples are in random order."""
    world_size, rows, features = dist.get_world_size(), 512, 64
    generator = torch.Generator().manual_seed(dist.get_rank())
    a, b = torch.randn(2, rows, features, generator=generator).requires_grad_()
    labels = torch.randint(4 * world_size, (rows,), generator=generator)
    own_bytes = 2 * a.nbytes
    with count_traffic() as forward:
        loss = nt_xent(a, b, labels, group=dist.group.WORLD, exchange="cluster")
    with count_traffic() as backward:
        loss.backward()
    assert max(*forward.bytes, *backward.bytes) <= 2.2 * own_bytes
    with count_traffic() as gathered:
        nt_xent(a, b, labels, group=dist.group.WORLD, exchange="gather")
    assert gathered.bytes.min() >= (world_size - 1) * own_bytes


def test_cluster_sends_at_most_twice_its_own_batch(ranks: RankPool) -> None:
    ranks.run(check_balanced_clusters)


def test_copies_are_summed_in_fp32() -> None:
    """In bf16 256 + 1 would be 256."""
    grad = torch.tensor([[256.0], [1.0], [1.0], [1.0], [7.0]]).bfloat16()
    route = Route(order=torch.tensor([0, 0, 0, 0, 1]), sent=[1, 1, 1, 2], received=[])
    assert sum_copies(grad, route, 3).tolist() == [[260.0], [7.0], [0.0]]
