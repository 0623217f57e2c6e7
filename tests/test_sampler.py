"""Batches of the cluster sampler: their clusters, the samples left out of an epoch, ranks, and saved states."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from itertools import chain, islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mcl_kernels import ClusterBatchSampler


def zipf_labels(n: int = 3000, k: int = 40) -> Tensor:
    sizes = 1 / np.arange(1, k + 1)
    return torch.from_numpy(np.random.default_rng(0).choice(k, n, p=sizes / sizes.sum()))


# Labels as after two stages of K = 16 on 5,000 samples: no cluster fills a group of 64.
MANY_SMALL = torch.arange(250).repeat_interleave(20)
LABELS = {"zipf": zipf_labels(), "many small": MANY_SMALL, "one": torch.zeros(1000, dtype=torch.long)}


def epoch_of(sampler: ClusterBatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("clusters_per_batch", [1, 4])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_merge_leaves_out_less_than_a_batch_and_draws_all_in_two_epochs(
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


def test_batches_are_groups_of_one_cluster_or_packed_remainders() -> None:
    labels = LABELS["zipf"]
    sampler = ClusterBatchSampler(labels, 256, clusters_per_batch=4)
    full = mixed = 0
    batches_of_cluster: dict[int, set[int]] = {}
    for number, batch in enumerate(epoch_of(sampler, 1)):
        groups = labels[batch].view(4, 64)
        if (groups == groups[:, :1]).all():
            full += 1
            continue
        mixed += 1
        runs = labels[batch].unique_consecutive()
        assert len(runs) == len(runs.unique()), "the remainder of a cluster is contiguous"
        for cluster in runs.tolist():
            batches_of_cluster.setdefault(cluster, set()).add(number)
    assert full > 0
    assert mixed > 0
    # Remainders are packed one after the other: each boundary between batches splits at most one.
    assert sum(len(batches) - 1 for batches in batches_of_cluster.values()) <= mixed


def test_full_and_mixed_batches_are_shuffled() -> None:
    labels = LABELS["zipf"]
    sampler = ClusterBatchSampler(labels, 256, clusters_per_batch=4)
    mixed_positions = set()
    for epoch in range(8):
        sizes = [len(labels[batch].unique()) for batch in epoch_of(sampler, epoch)]
        mixed_positions |= {index for index, size in enumerate(sizes) if size > 4}
    assert min(mixed_positions) < len(sampler) // 2


def test_dropping_remainders_gives_batches_of_one_cluster() -> None:
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


def test_the_order_depends_on_epoch_and_seed() -> None:
    labels = LABELS["zipf"]
    sampler = ClusterBatchSampler(labels, 256)
    assert epoch_of(sampler, 0) == epoch_of(sampler, 0)
    assert epoch_of(sampler, 0) != epoch_of(sampler, 1)
    assert epoch_of(ClusterBatchSampler(labels, 256, seed=1), 0) != epoch_of(sampler, 0)


@st.composite
def samplers(draw: st.DrawFn) -> ClusterBatchSampler:
    n = draw(st.integers(40, 120))
    labels = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    clusters_per_batch, batch_size = draw(st.sampled_from([(1, 5), (2, 8), (4, 16), (1, 37)]))
    world_size = draw(st.sampled_from([1, 2] if 2 * batch_size <= n else [1]))
    return ClusterBatchSampler(
        np.array(labels),
        batch_size,
        clusters_per_batch=clusters_per_batch,
        seed=draw(st.integers(0, 3)),
        rank=world_size - 1,
        world_size=world_size,
    )


@given(samplers(), st.integers(2, 4))
@settings(deadline=None)
def test_each_iteration_is_the_next_epoch(sampler: ClusterBatchSampler, epochs: int) -> None:
    """Orders differ and have no duplicates; with one rank, two consecutive epochs draw all samples."""
    iterations = [list(chain(*sampler)) for _ in range(epochs)]
    assert iterations == [list(chain(*epoch_of(sampler, epoch))) for epoch in range(epochs)]
    for drawn in iterations:
        assert len(set(drawn)) == len(drawn) == len(sampler) * sampler.batch_size
    for before, after in pairwise(iterations):
        assert before != after
        if sampler.world_size == 1:
            assert len({*before, *after}) == sampler.left_out + len(before)


ACTIONS = st.one_of(
    st.tuples(st.just("iterate"), st.integers(0, 30)),
    st.tuples(st.just("resume"), st.integers(1, 30)),
    st.tuples(st.just("set"), st.integers(0, 5)),
)


@given(samplers(), st.lists(ACTIONS, max_size=8))
@settings(deadline=None)
def test_any_sequence_of_iterations_is_resumed(
    sampler: ClusterBatchSampler, actions: Sequence[tuple[str, int]]
) -> None:
    """An iteration that drew a batch is followed by the next epoch; one that drew none is not counted."""
    reference = copy.deepcopy(sampler)
    epoch = 0  # epoch of the next iteration
    for action, number in actions:
        if action == "set":
            sampler.set_epoch(number)
            epoch = number
            continue
        order = epoch_of(reference, epoch)
        drawn = list(islice(sampler, number))
        assert drawn == order[:number]
        assert len(sampler) == len(order)
        if action == "resume":
            fresh = copy.deepcopy(reference)
            fresh.load_state_dict(sampler.state_dict())
            # Lightning calls this after it loads the state.
            fresh.set_epoch(fresh.epoch)
            sampler = pickle.loads(pickle.dumps(fresh))
            if number <= len(order):
                assert drawn + list(sampler) == order
                drawn = order
        epoch += bool(drawn)


def test_set_epoch_during_an_iteration_affects_the_next_one() -> None:
    sampler = ClusterBatchSampler(MANY_SMALL, 256)
    expected = [epoch_of(sampler, epoch) for epoch in (0, 3)]
    sampler.set_epoch(0)
    iterator = iter(sampler)
    first = next(iterator)
    sampler.set_epoch(3)
    assert [first, *iterator] == expected[0]
    assert sampler.state_dict() == {"epoch": 3, "batches": 0}
    assert list(sampler) == expected[1]


def test_simultaneous_iterators_are_two_epochs() -> None:
    sampler = ClusterBatchSampler(MANY_SMALL, 256)
    pairs = list(zip(sampler, sampler, strict=True))
    assert [list(batches) for batches in zip(*pairs, strict=True)] == [epoch_of(sampler, epoch) for epoch in (0, 1)]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (2, False), (2, True)])
def test_epochs_of_a_data_loader(workers: int, persistent: bool) -> None:
    labels = torch.arange(103) % 4
    loader = DataLoader(
        TensorDataset(torch.arange(103)),
        batch_sampler=ClusterBatchSampler(labels, 16),
        num_workers=workers,
        persistent_workers=persistent,
    )
    epochs = [[batch.tolist() for (batch,) in loader] for _ in range(3)]
    assert epochs == [epoch_of(ClusterBatchSampler(labels, 16), epoch) for epoch in range(3)]
    assert set(chain(*epochs[0], *epochs[1])) == set(range(103))


def test_a_state_of_other_batches_is_refused() -> None:
    sampler = ClusterBatchSampler(MANY_SMALL, 256)
    with pytest.raises(ValueError, match="state must have at most as many batches as this sampler: got batch 20 of 19"):
        sampler.load_state_dict({"epoch": 0, "batches": 20})


def test_a_state_without_its_keys_is_refused() -> None:
    sampler = ClusterBatchSampler(MANY_SMALL, 256)
    for state in ({}, {"epoch": 1}):
        with pytest.raises(ValueError, match=r"state must have the keys 'epoch' and 'batches': got \["):
            sampler.load_state_dict(state)


@pytest.mark.parametrize("set_epoch", [None, 0, 1])
def test_a_state_of_a_last_batch_resumes_with_the_next_epoch(set_epoch: int | None) -> None:
    """The state is saved in the last step of a loop; the same epoch, if chosen again, has no batches left."""
    sampler = ClusterBatchSampler(MANY_SMALL, 256)
    for number, _ in enumerate(sampler, 1):
        if number == len(sampler):
            state = sampler.state_dict()
    assert state == {"epoch": 0, "batches": len(sampler)}
    assert sampler.state_dict() == {"epoch": 1, "batches": 0}
    resumed = ClusterBatchSampler(MANY_SMALL, 256)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    if set_epoch is not None:
        resumed.set_epoch(set_epoch)
    if set_epoch == 0:
        assert list(resumed) == []
    assert list(resumed) == epoch_of(sampler, 1)


def test_hosts_cannot_split_the_batches_of_one_rank() -> None:
    """Hosts read `drop_last` before they split batches among their processes."""
    assert not hasattr(ClusterBatchSampler(MANY_SMALL, 256), "drop_last")
    with pytest.raises(ValueError, match=r"would be split once more\. With accelerate: world_size=1, batch_size=512"):
        hasattr(ClusterBatchSampler(MANY_SMALL, 256, rank=1, world_size=2), "drop_last")


def test_global_generators_are_not_used() -> None:
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
