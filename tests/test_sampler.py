"""What a batch holds, what an epoch leaves out, and that ranks agree."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mcl_kernels import ClusterBatchSampler


def zipf_labels(n: int = 3000, k: int = 40) -> Tensor:
    sizes = 1 / np.arange(1, k + 1)
    return torch.from_numpy(np.random.default_rng(0).choice(k, n, p=sizes / sizes.sum()))


# Two stages of K = 16 on 5,000 samples: no cluster fills a group of 64.
MANY_SMALL = torch.arange(250).repeat_interleave(20)
LABELS = {"zipf": zipf_labels(), "many small": MANY_SMALL, "one": torch.zeros(1000, dtype=torch.long)}


def epoch_of(sampler: ClusterBatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("clusters_per_batch", [1, 4])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_merge_leaves_out_less_than_a_batch_and_shows_all_in_two_epochs(
    labels: Tensor, clusters_per_batch: int
) -> None:
    sampler = ClusterBatchSampler(labels, 256, clusters_per_batch=clusters_per_batch)
    seen = []
    for epoch in range(4):
        batches = epoch_of(sampler, epoch)
        drawn = [i for batch in batches for i in batch]
        assert len(batches) == len(sampler)
        assert all(len(batch) == 256 for batch in batches)
        assert len(set(drawn)) == len(drawn)
        assert len(drawn) + sampler.left_out == len(labels)
        assert sampler.left_out == len(labels) % 256
        seen.append(set(drawn))
    for before, after in pairwise(seen):
        assert before | after == set(range(len(labels)))


def test_a_batch_is_groups_of_one_cluster_and_rests_stay_together() -> None:
    labels = LABELS["zipf"]
    sampler = ClusterBatchSampler(labels, 256, clusters_per_batch=4)
    full = mixed = 0
    cuts_of_clusters: dict[int, set[int]] = {}
    for number, batch in enumerate(epoch_of(sampler, 1)):
        groups = labels[batch].view(4, 64)
        if (groups == groups[:, :1]).all():
            full += 1
            continue
        mixed += 1
        runs = labels[batch].unique_consecutive()
        assert len(runs) == len(runs.unique()), "a cluster's rest lies in one piece"
        for cluster in runs.tolist():
            cuts_of_clusters.setdefault(cluster, set()).add(number)
    assert full > 0
    assert mixed > 0
    # Packed one after the other, only a cluster at the edge of a batch is cut, so each edge cuts one at most.
    assert sum(len(where) - 1 for where in cuts_of_clusters.values()) <= mixed


def test_full_and_mixed_batches_are_shuffled() -> None:
    labels = LABELS["zipf"]
    sampler = ClusterBatchSampler(labels, 256, clusters_per_batch=4)
    where = set()
    for epoch in range(8):
        sizes = [len(labels[batch].unique()) for batch in epoch_of(sampler, epoch)]
        where |= {index for index, size in enumerate(sizes) if size > 4}
    assert min(where) < len(sampler) // 2


def test_one_cluster_per_batch_is_the_papers_sampler() -> None:
    labels = LABELS["zipf"]
    sampler = ClusterBatchSampler(labels, 64, small="drop")
    batches = epoch_of(sampler, 0)
    assert all(len(labels[batch].unique()) == 1 for batch in batches)
    sizes = labels.bincount()
    assert len(batches) == int((sizes // 64).sum())
    assert sampler.left_out == int((sizes % 64).sum())
    assert sampler.left_out == len(labels) - len({i for batch in batches for i in batch})


def test_small_clusters_share_batches_with_few_others() -> None:
    for batch in epoch_of(ClusterBatchSampler(MANY_SMALL, 256, clusters_per_batch=4), 0):
        assert len(MANY_SMALL[batch].unique()) <= 256 // 20 + 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_split_the_same_batches(world_size: int) -> None:
    labels = LABELS["zipf"]
    alone = epoch_of(ClusterBatchSampler(labels, 64 * world_size, clusters_per_batch=2, seed=3), 5)
    ranks = [
        epoch_of(ClusterBatchSampler(labels, 64, clusters_per_batch=2, seed=3, rank=rank, world_size=world_size), 5)
        for rank in range(world_size)
    ]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == alone


def test_epochs_and_seeds_differ_and_repeat() -> None:
    labels = LABELS["zipf"]
    sampler = ClusterBatchSampler(labels, 256)
    assert epoch_of(sampler, 0) == epoch_of(sampler, 0)
    assert epoch_of(sampler, 0) != epoch_of(sampler, 1)
    assert epoch_of(ClusterBatchSampler(labels, 256, seed=1), 0) != epoch_of(sampler, 0)


def test_neither_reads_nor_writes_the_global_generators() -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = epoch_of(ClusterBatchSampler(MANY_SMALL, 256), 0)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    torch.randn(3)
    assert epoch_of(ClusterBatchSampler(MANY_SMALL, 256), 0) == first


def test_unlabelled_samples_are_never_drawn() -> None:
    labels = torch.arange(40) % 4 - 1
    drawn = {i for batch in epoch_of(ClusterBatchSampler(labels, 10), 0) for i in batch}
    assert drawn == set((labels >= 0).nonzero().flatten().tolist())


def test_in_a_data_loader() -> None:
    labels = torch.arange(40) % 4
    loader = DataLoader(TensorDataset(torch.arange(40)), batch_sampler=ClusterBatchSampler(labels, 10), num_workers=1)
    batches = [batch for (batch,) in loader]
    assert len(batches) == len(loader) == 4
    assert all(len(labels[batch].unique()) == 1 for batch in batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1: got 0"),
        ({"batch_size": 50}, "leaves no full batch of 40 labelled samples"),
        ({"batch_size": 10, "clusters_per_batch": 3}, "clusters_per_batch must divide .* = 10: got 3"),
        ({"batch_size": 10, "rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1 = 1: got 2"),
        ({"batch_size": 11, "small": "drop"}, "leaves no full batch"),
        ({"batch_size": 10, "small": "keep"}, "small must be one of 'merge', 'drop': got 'keep'"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterBatchSampler(torch.arange(40) % 4, **options)  # type: ignore[arg-type]


def test_bad_labels() -> None:
    with pytest.raises(TypeError, match="labels must be integers"):
        ClusterBatchSampler(torch.rand(40), 10)
