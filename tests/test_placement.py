"""Clusters, their buckets and the ranks that compute them; no rank is needed."""

from __future__ import annotations

import pytest
import torch

from mcl_kernels import plan_exchange
from mcl_kernels.distributed.placement import bucket_count, label_buckets, pack_clusters


def test_clusters_are_packed_by_their_pairs() -> None:
    sizes = [40, 30, 30, 20, 20, 20, 10]
    owners = pack_clusters(sizes, sizes, 2, 2)
    loads = [sum(n * n for n, ranks in zip(sizes, owners, strict=True) if rank in ranks) for rank in (0, 1)]
    assert max(loads) - min(loads) <= 20**2
    assert all(len(ranks) == 1 for ranks in owners)


@pytest.mark.parametrize("world_size", [2, 3, 8, 61])
def test_packing_is_never_worse_than_complete_clusters_and_gives_each_an_owner(world_size: int) -> None:
    generator = torch.Generator().manual_seed(world_size)
    for _ in range(50):
        k = int(torch.randint(1, 40, (), generator=generator))
        sizes = (1000 / torch.randint(1, 200, (k,), generator=generator)).long().tolist()
        plan = plan_exchange(sizes, world_size, exchange="cluster")
        for n, ranks in zip(sizes, plan.owners, strict=True):
            assert ranks == () if n < 2 else 0 < len(ranks) == len(set(ranks)) <= n
        pairs = [n * n for n in sizes if n > 1]
        largest = max(pairs, default=0)
        assert plan.operations.sum() >= 16 * 128 * sum(pairs)
        assert plan.operations.max() <= 16 * 128 * max(largest, sum(pairs) / world_size + largest)


@pytest.mark.parametrize(("clusters", "world_size", "blocks"), [(10, 64, 6), (1000, 4096, 4), (3, 12, 4)])
def test_equal_clusters_fill_the_ranks_in_no_more_blocks_than_fit(clusters: int, world_size: int, blocks: int) -> None:
    owners = plan_exchange([5000] * clusters, world_size, exchange="cluster").owners
    assert {len(ranks) for ranks in owners} == {blocks}
    assert len({rank for ranks in owners for rank in ranks}) == clusters * blocks  # no rank owns two blocks


@pytest.mark.parametrize("world_size", [8, 64, 512])
def test_small_clusters_fill_the_ranks_that_large_ones_leave_free(world_size: int) -> None:
    plan = plan_exchange([1000 * world_size // (k + 1) for k in range(1000)], world_size, exchange="cluster")
    assert max(map(len, plan.owners)) > 1
    assert plan.operations_imbalance < 1.05


def test_a_cluster_is_cut_only_if_that_takes_less_time() -> None:
    """A pair of a cluster that is cut costs twice as much: each of two blocks would take as long as the cluster."""
    assert plan_exchange([5000], 2, exchange="cluster").owners == ((0,),)
    assert plan_exchange([5000], 3, exchange="cluster").owners == ((0, 1, 2),)
    assert plan_exchange([5000], 2, loss="masked_info_nce", exchange="cluster").owners == ((0, 1),)


@pytest.mark.parametrize("step", [1, 1000, 1024, 4096, 2**20, 10**15])
def test_labels_at_any_distance_are_spread_over_the_buckets(step: int) -> None:
    """Labels that encode a pair, a * 1024 + b for example, would share a bucket without the hash."""
    buckets = label_buckets(torch.arange(64) * step, 16)
    assert len(buckets.unique()) >= 58
    assert int(buckets.min()) >= 0
    assert int(buckets.max()) < bucket_count(16)


def test_small_labels_have_their_own_buckets_and_negative_ones_none() -> None:
    assert label_buckets(torch.tensor([-1, -(2**63), 0, 1023]), 2).tolist() == [-1, -1, 0, 1023]


def test_a_long_histogram_is_counted_in_buckets() -> None:
    histogram = torch.zeros(3000, dtype=torch.int64)
    histogram[[5, 2005, 2006]] = torch.tensor([10, 20, 4])
    plan = plan_exchange(histogram, 2, exchange="cluster")
    owned = [k for k, ranks in enumerate(plan.owners) if ranks]
    assert owned == sorted(label_buckets(torch.tensor([5, 2005, 2006]), 2).tolist())
