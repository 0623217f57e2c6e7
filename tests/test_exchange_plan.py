"""Which ranks compute which clusters, without ranks; the bytes are compared with real ones in benchmarks.scale."""

from __future__ import annotations

import pytest

from mcl_kernels.distributed.cost_model import plan_exchange


@pytest.mark.parametrize(("clusters", "world_size", "blocks"), [(10, 64, 6), (1000, 4096, 4), (3, 12, 4)])
def test_equal_clusters_fill_the_ranks_in_no_more_blocks_than_fit(clusters: int, world_size: int, blocks: int) -> None:
    owners = plan_exchange([5000] * clusters, world_size, exchange="cluster").owners
    assert {len(ranks) for ranks in owners} == {blocks}
    assert len({rank for ranks in owners for rank in ranks}) == clusters * blocks  # nobody owns two


@pytest.mark.parametrize("world_size", [8, 64, 512])
def test_small_clusters_fill_what_the_blocks_of_large_ones_leave(world_size: int) -> None:
    plan = plan_exchange([1000 * world_size // (k + 1) for k in range(1000)], world_size, exchange="cluster")
    assert max(map(len, plan.owners)) > 1
    assert plan.operations_imbalance < 1.05


def test_a_cluster_is_cut_only_where_that_ends_earlier() -> None:
    """A pair of a cluster that is cut costs twice as much: into two blocks, each would take as long as the whole."""
    assert plan_exchange([5000], 2, exchange="cluster").owners == ((0,),)
    assert plan_exchange([5000], 3, exchange="cluster").owners == ((0, 1, 2),)
    assert plan_exchange([5000], 2, loss="masked_info_nce", exchange="cluster").owners == ((0, 1),)
