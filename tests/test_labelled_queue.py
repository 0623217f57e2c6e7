"""The queue against a list of the keys that were put into it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mcl_kernels import LabelledQueue, MaskedInfoNCE, MultistageRunner, masked_info_nce
from tests.process_pool import RankPool


def keys(n: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)))


@given(size=st.integers(1, 7), batches=st.lists(st.integers(0, 16), max_size=6))
def test_the_queue_holds_the_last_keys(size: int, batches: list[int]) -> None:
    """Batches of any size, larger than the queue and empty ones too."""
    queue, all_rows = LabelledQueue(size, 3), keys(sum(batches))
    for rows in all_rows.split(batches) if batches else ():
        begin = int((all_rows == rows[0]).all(1).nonzero()[0]) if len(rows) else 0
        at = torch.arange(begin, begin + len(rows))
        queue.enqueue(rows, 10 + at, 100 + at)
    n = len(all_rows)
    for i in range(max(n - size, 0), n):
        slot = i % size
        assert torch.equal(queue.embeddings[slot], all_rows[i])
        assert (int(queue.labels[slot]), int(queue.ids[slot])) == (10 + i, 100 + i)
    assert torch.equal(queue.labels[n:], torch.full_like(queue.labels[n:], -1))
    assert torch.equal(queue.ids[n:], torch.full_like(queue.ids[n:], -1))


def test_empty_slots_are_no_negatives() -> None:
    query, key = keys(4), keys(4, seed=1)
    queue, labels = LabelledQueue(8, 3), torch.zeros(4, dtype=torch.int64)
    loss = masked_info_nce(query, queue.embeddings, labels, queue.labels, positive=key)
    assert loss == 0
    queue.enqueue(key, labels)
    loss = masked_info_nce(query, queue.embeddings, labels, queue.labels, positive=key)
    torch.testing.assert_close(loss, masked_info_nce(query, key, positive=key))


def test_keys_without_labels_have_label_0_as_in_a_first_stage() -> None:
    queue = LabelledQueue(4, 3)
    queue.enqueue(keys(2))
    assert queue.labels.tolist() == [0, 0, -1, -1]
    assert queue.ids.tolist() == [-1] * 4


def test_older_keys_of_the_same_sample_are_no_negatives() -> None:
    query, key = keys(4), keys(4, seed=1)
    labels, ids = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    queue = LabelledQueue(4, 3)
    queue.enqueue(keys(4, seed=2), labels, ids)
    got = masked_info_nce(
        query, queue.embeddings, labels, queue.labels, positive=key, ids=ids, key_ids=queue.ids, reduction="none"
    )
    for i in range(4):
        others = queue.embeddings[torch.arange(4) != i]
        expected = masked_info_nce(query[i : i + 1], others, positive=key[i : i + 1])
        torch.testing.assert_close(got[i], expected)


def test_enqueue_before_backward() -> None:
    """MoCo's order: the loss uses the queue before it."""
    query, key, labels = keys(4).requires_grad_(), keys(4, seed=1), torch.zeros(4, dtype=torch.int64)
    gradients = []
    for early in (False, True):
        queue = LabelledQueue(6, 3)
        queue.enqueue(keys(5, seed=2), torch.zeros(5, dtype=torch.int64))
        loss = masked_info_nce(query, queue.embeddings, labels, queue.labels, positive=key)
        if early:
            queue.enqueue(key, labels)
        gradients += torch.autograd.grad(loss, query)
    assert torch.equal(*gradients)


def test_relabel() -> None:
    """Labels follow the stored ids: -1 for unfilled slots, for keys without an id and for samples without a label."""
    queue = LabelledQueue(6, 3)
    queue.enqueue(keys(3), torch.tensor([5, 6, 7]), torch.tensor([2, 0, 1]))
    queue.enqueue(keys(1), torch.tensor([8]))
    queue.relabel(torch.tensor([30, -1, 32], dtype=torch.int32))
    assert queue.labels.tolist() == [32, 30, -1, -1, -1, -1]
    with pytest.raises(ValueError, match="labels must have an entry for every id of the queue: got 2 labels for id 2"):
        queue.relabel(torch.tensor([1, 2]))
    assert queue.labels.tolist() == [32, 30, -1, -1, -1, -1]


def test_relabel_by_the_labels_of_a_stage(tmp_path: Path) -> None:
    x = torch.randn(60, 3)
    queue = LabelledQueue(8, 3)
    for stage in MultistageRunner(60, n_stages=2, n_clusters=3, directory=tmp_path):
        queue.enqueue(x[10:15], stage.labels[torch.arange(10, 15)], torch.arange(10, 15))
        queue.relabel(stage.labels)
        held = queue.ids >= 0
        assert torch.equal(queue.labels[held], stage.labels[queue.ids[held]])
        assert held.sum() == min(5 * stage.index + 5, 8)
        stage.finish(x, state={})
    assert queue.labels.dtype == torch.int64


STATE = ["embeddings", "labels", "ids", "position"]


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_copy_continues_as_the_original(how: str) -> None:
    queue = LabelledQueue(5, 3)
    queue.enqueue(keys(3), torch.tensor([5, 6, 7]), torch.tensor([2, 0, 1]))
    if how == "state_dict":
        other = LabelledQueue(5, 3)
        other.load_state_dict(queue.state_dict())
    else:
        other = copy.deepcopy(queue) if how == "deepcopy" else pickle.loads(pickle.dumps(queue))
    for each in (queue, other):
        each.enqueue(keys(4, seed=1), torch.arange(4), torch.arange(4))
    assert queue.labels.tolist() == [2, 3, 7, 0, 1]
    for a, b in zip(queue.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints() -> None:
    """Checkpoints are loaded as by PyTorch's modules: strict or not, copied or assigned; labels read before stay."""
    model = nn.Sequential(LabelledQueue(4, 3))
    model[0].enqueue(keys(3), torch.tensor([5, 6, 7]), torch.tensor([2, 0, 1]))
    saved = {name: x.clone() for name, x in model.state_dict().items()}
    assert list(saved) == [f"0.{name}" for name in STATE]
    other = nn.Sequential(LabelledQueue(4, 3, dtype=torch.float64))
    given = other[0].labels
    other.load_state_dict(saved)
    assert given.tolist() == [-1] * 4
    assert other[0].labels.tolist() == [5, 6, 7, -1]
    assert other[0].embeddings.dtype == torch.float64
    other[0].enqueue(keys(4))
    assert torch.equal(saved["0.labels"], model[0].labels)
    other.load_state_dict(saved, assign=True)
    assert other[0].embeddings is saved["0.embeddings"]

    with pytest.raises(RuntimeError, match=r"0.embeddings must have shape \[5, 3\], .*: got \[4, 3\]"):
        nn.Sequential(LabelledQueue(5, 3)).load_state_dict(saved)
    del saved["0.ids"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.ids"'):
        other.load_state_dict(saved)
    assert other.load_state_dict(saved, strict=False).missing_keys == ["0.ids"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.more"'):
        model.load_state_dict({**model.state_dict(), "0.more": given})


def test_hooks_see_the_keys_of_a_checkpoint_before_they_are_loaded() -> None:
    """A hook that renames the keys of MoCo's buffers, and one that drops a key."""
    queue = LabelledQueue(4, 3)
    queue.enqueue(keys(3), torch.tensor([5, 6, 7]), torch.tensor([2, 0, 1]))
    old_names = {"embeddings": "queue", "labels": "queue_labels"}
    saved = {f"0.{old_names.get(name, name)}": x for name, x in queue.state_dict().items()}
    seen: list[list[str]] = []

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        seen.append([key for key in state if key.startswith(prefix)])
        for new, old in old_names.items():
            state[prefix + new] = state.pop(prefix + old)

    model = nn.Sequential(LabelledQueue(4, 3))
    model[0].register_load_state_dict_pre_hook(rename)
    model.load_state_dict(saved)
    assert seen == [list(saved)]
    for a, b in zip(model[0].buffers(), queue.buffers(), strict=True):
        assert torch.equal(a, b)

    model[0].register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.pop(prefix + "ids"))
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.ids"'):
        model.load_state_dict(saved)
    assert queue.load_state_dict({**queue.state_dict(), "more": keys(1)}, strict=False).unexpected_keys == ["more"]


def test_an_average_of_a_model_keeps_the_queue_of_its_copy() -> None:
    model = nn.Sequential(LabelledQueue(4, 3), nn.Linear(3, 3))
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    model[0].enqueue(keys(3))
    for _ in range(2):
        average.update_parameters(model)
    assert average.module[0].labels.tolist() == [-1] * 4


def test_a_queue_from_the_meta_device_is_empty() -> None:
    queue = LabelledQueue(5, 3, device="meta").to_empty(device="cpu")
    for x, expected in zip(queue.buffers(), LabelledQueue(5, 3).buffers(), strict=True):
        assert torch.equal(x, expected)


def test_half_precision_and_to() -> None:
    queue = LabelledQueue(4, 3, dtype=torch.bfloat16)
    queue.enqueue(keys(2).double())
    assert queue.embeddings.dtype == torch.bfloat16
    queue = queue.to(torch.float64)
    assert queue.embeddings.dtype == torch.float64
    assert queue.labels.dtype == queue.ids.dtype == torch.int64


def test_compiled() -> None:
    """A training step with the queue is one graph."""
    torch._dynamo.reset()
    queue, copied = LabelledQueue(6, 3), LabelledQueue(6, 3)

    def step(queue: LabelledQueue, query: Tensor, key: Tensor, labels: Tensor) -> Tensor:
        loss = masked_info_nce(query, queue.embeddings, labels, queue.labels, positive=key)
        queue.enqueue(key, labels)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        arguments = keys(4, seed), keys(4, seed + 9), torch.tensor([0, 1, 0, 1])
        torch.testing.assert_close(compiled(queue, *arguments), step(copied, *arguments))
        assert torch.equal(queue.labels, copied.labels)


class MoCo(nn.Module):
    """A model that holds its queue, two modules deep."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.memory = nn.Linear(3, 3), nn.Sequential(LabelledQueue(4, 3))
        self.loss = MaskedInfoNCE(group=group)

    def forward(self, x: Tensor, key: Tensor, ids: Tensor) -> Tensor:
        queue, labels = self.memory[0], torch.zeros(x.shape[0], dtype=torch.int64)
        options = {"positive": key, "ids": ids, "key_ids": queue.ids}
        loss: Tensor = self.loss(self.encoder(x), queue.embeddings, labels, queue.labels, **options)
        queue.enqueue(key, labels, ids)
        return loss


def batch_of(rank: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    seed = 10 * rank + 100 * step
    return keys(2, seed), keys(2, seed + 1), torch.tensor([0, 1]) + seed


def wrapped(how: str, model: nn.Module) -> nn.Module:
    if how == "FSDP2":
        fully_shard(model)
        return model
    if how == "FSDP1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    ddp = DistributedDataParallel(copy.deepcopy(model) if how == "DDP, deepcopied" else model)
    return torch.compile(ddp, backend="aot_eager") if how == "DDP, compiled" else ddp


def check_own_keys(how: str) -> None:
    """Each rank has the keys, and so the loss, that it has without the wrapper."""
    # Compiling a loss over ranks takes a minute.
    rank, group = dist.get_rank(), None if how == "DDP, compiled" else dist.group.WORLD
    expected, model = MoCo(group), wrapped(how, MoCo(group))
    (queue,) = (module for module in model.modules() if isinstance(module, LabelledQueue))
    for step in range(3):
        batch = batch_of(rank, step)
        loss, loss_expected = model(*batch), expected(*batch)
        loss.backward()
        torch.testing.assert_close(loss, loss_expected)
        assert queue.ids.sort().values.equal(expected.memory[0].ids.sort().values)
    assert queue.ids.tolist() == [200 + 10 * rank, 201 + 10 * rank, 100 + 10 * rank, 101 + 10 * rank]


HOW = ["DDP", "DDP, deepcopied", "DDP, compiled", "FSDP1", "FSDP2"]


@pytest.mark.parametrize("how", HOW)
def test_a_rank_keeps_its_own_keys(ranks: RankPool, how: str) -> None:
    """The wrappers broadcast the buffers of rank 0."""
    if how == "FSDP2" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 of this torch computes on GPUs only")
    ranks.run(check_own_keys, how)


def check_gathered_keys() -> None:
    """As in MoCo: the loss of this rank, and the keys of all ranks."""
    model = DistributedDataParallel(MoCo())
    alone, world = MoCo().memory[0], range(dist.get_world_size())
    for step in range(3):
        x, _, _ = batch_of(dist.get_rank(), step)
        batches = [batch_of(rank, step) for rank in world]
        key, ids = torch.cat([key for _, key, _ in batches]), torch.cat([ids for _, _, ids in batches])
        model.module.encoder(x).sum().backward()
        for queue in (model.module.memory[0], alone):
            queue.enqueue(key, None, ids)
    assert model.module.memory[0].ids.equal(alone.ids)


def test_the_keys_of_all_ranks(ranks: RankPool) -> None:
    ranks.run(check_gathered_keys)


def check_distributed_checkpoint() -> None:
    """Each rank loads its own state, or with `broadcast_from_rank0` the state of rank 0."""
    rank, model = dist.get_rank(), MoCo()
    fully_shard(model)
    model.memory[0].enqueue(keys(2), None, torch.tensor([0, 1]) + 10 * rank)
    for from_rank_0 in (False, True):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert [f"memory.0.{name}" in state for name in STATE] == [True] * 4
        other = MoCo()
        fully_shard(other)
        set_model_state_dict(other, state if rank == 0 or not from_rank_0 else {}, options=options)
        first = 0 if from_rank_0 else 10 * rank
        assert other.memory[0].ids.tolist() == [first, first + 1, -1, -1]


def test_distributed_checkpoints(ranks: RankPool) -> None:
    ranks.run(check_distributed_checkpoint)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: LabelledQueue(0, 3), "size must be at least 1: got 0"),
        (lambda q: LabelledQueue(4, 2.5), "dim must be an integer: got float"),
        (lambda q: LabelledQueue(4, 3, dtype=torch.int64), "dtype must be float16, .*: got torch.int64"),
        (lambda q: q.enqueue(torch.zeros(2, 4)), "embeddings must have 3 features, those of the queue: got 4"),
        (lambda q: q.enqueue([[0.0] * 3]), "embeddings must be a tensor: got list"),
        (lambda q: q.enqueue(torch.zeros(2, 3), torch.zeros(3).long()), "got 3 labels for 2 rows"),
        (lambda q: q.enqueue(torch.zeros(2, 3), None, torch.zeros(1).long()), "got 1 ids for 2 rows"),
        (lambda q: q.enqueue(torch.zeros(2, 3), torch.zeros(2)), "labels must be an integer tensor: got torch.float32"),
        (lambda q: q.relabel([0, 1]), "labels must be an integer tensor: got list"),
    ],
)  # fmt: skip
def test_errors_leave_the_queue_as_it_was(call, message: str) -> None:  # type: ignore[no-untyped-def]
    queue = LabelledQueue(4, 3)
    queue.enqueue(keys(3), torch.arange(3), torch.arange(3))
    before = copy.deepcopy(queue.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        call(queue)
    for name, tensor in queue.state_dict().items():
        assert torch.equal(tensor, before[name])
