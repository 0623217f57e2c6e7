"""Losses equal to lightly's, including its memory bank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.integrations.hosts import assert_same, peak_of, train, views, within_clusters
from tests.process_pool import RankPool

host = pytest.importorskip("lightly.loss")
from mcl_kernels.integrations import lightly as ours  # noqa: E402

LABELS = torch.arange(40) % 4


def squared_distance(out0: Tensor, out1: Tensor) -> Tensor:
    return (out0 - out1).square().sum(1)


LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "NTXent": ("NTXentLoss", {"temperature": 0.1}),
    "NTXent, defaults": ("NTXentLoss", {}),
    "DCL": ("DCLLoss", {"temperature": 0.1}),
    "DCL, defaults": ("DCLLoss", {}),
    "DCL, weights": ("DCLLoss", {"weight_fn": squared_distance}),
    "DCL, one weight": ("DCLLoss", {"weight_fn": lambda out0, out1: (out0 * out1).sum().detach() / 40}),
    "DCLW": ("DCLWLoss", {"sigma": 0.4}),
}
# The host calls torch.tensor() on a tensor, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


@pytest.mark.parametrize("loss", LOSSES)
def test_without_labels_equals_the_host(loss: str) -> None:
    name, options = LOSSES[loss]
    assert_same(getattr(ours, name)(**options), getattr(host, name)(**options), views())


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("DCLW", "DCL, one weight")])
def test_labels_restrict_negatives_to_clusters(loss: str) -> None:
    name, options = LOSSES[loss]
    theirs = getattr(host, name)(**options)

    def expected(a: Tensor, b: Tensor) -> Tensor:
        return within_clusters(lambda index: theirs(a[index], b[index]), LABELS)

    assert_same(lambda a, b: getattr(ours, name)(**options)(a, b, labels=LABELS), expected, views())


def test_weights_are_computed_over_the_complete_batch() -> None:
    """The weights equal the host's; only negatives are restricted to clusters."""
    a, b = (F.normalize(x) for x in views())
    weights = [host.dcl_loss.negative_mises_fisher_weights(*pair, sigma=0.5) for pair in ((a, b), (b, a))]
    positive, z = (a * b).sum(1) / 0.1, torch.cat((a, b))
    logits = z @ z.T / 0.1
    kept = (LABELS[:, None] == LABELS) & ~torch.eye(40, dtype=torch.bool)
    negative = logits.masked_fill(~kept.repeat(2, 2), -torch.inf).logsumexp(1)
    expected = (negative - torch.cat(weights) * positive.repeat(2)).mean()
    torch.testing.assert_close(ours.DCLWLoss()(*views(), labels=LABELS), expected)


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    loss = getattr(ours, name)(temperature=0.1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (40, 24, 17):
        torch.testing.assert_close(compiled(*views(n), LABELS[:n]), loss(*views(n), LABELS[:n]))


SIZES = [(64, 16), (17, 16)]  # more and fewer rows than a batch; neither is a multiple of it


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_bank_equals_the_hosts(size: tuple[int, int]) -> None:
    """Without labels, banks are equal, including random initial rows; evaluation does not write to it."""
    losses = []
    for kind in (ours.NTXentLoss, host.NTXentLoss):
        torch.manual_seed(0)
        losses.append(kind(temperature=0.1, memory_bank_size=size))
    for step in range(4):
        a, b = (x.float() for x in views(10, seed=step))
        results = []
        for loss in losses:
            with torch.set_grad_enabled(step != 2):
                value = loss(a, b)
            gradients = torch.autograd.grad(value, (a, b)) if step != 2 else ()
            results.append((value, *gradients))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)
        for name in ("bank", "bank_ptr"):
            assert torch.equal(*(getattr(loss.memory_bank, name) for loss in losses))
    assert set(losses[0].state_dict()) == set(losses[1].state_dict())


@pytest.mark.parametrize("size", [0, *SIZES], ids=str)
@pytest.mark.parametrize("kind", [ours.NTXentLoss, ours.DCLLoss])
def test_embeddings_whose_norm_overflows(kind: type, size: Any) -> None:
    """The host's loss ignores such embeddings, since it divides by an infinite norm."""
    a, b = (x.detach().float() for x in views(10))
    losses = []
    for factor in (1.0, 2.0**80):
        torch.manual_seed(0)
        loss = kind(0.1, memory_bank_size=size) if kind is ours.NTXentLoss else kind(0.1)
        losses.append(loss(factor * a, factor * b))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_labels_of_the_bank(size: tuple[int, int]) -> None:
    """Each row of the bank has the label that it was written with; initial rows are never negatives."""
    loss = ours.NTXentLoss(temperature=0.1, memory_bank_size=size)
    known: dict[tuple[float, ...], int] = {}
    for step in range(5):
        a, b = (x.float() for x in views(10, seed=step))
        labels = None if step == 2 else torch.arange(10) % 3 + step // 4
        bank = loss.memory_bank.bank.clone()
        got = loss(a, b, labels)
        if labels is None:
            got = None
        bank_labels = torch.tensor([known.get(tuple(row.tolist()), -1) for row in bank])
        if got is not None:
            x, y = F.normalize(a), F.normalize(b)
            logits = (x @ bank.T / 0.1).masked_fill(labels[:, None] != bank_labels, -torch.inf)
            positive = (x * y).sum(1, keepdim=True) / 0.1
            expected = torch.cat((positive, logits), 1).logsumexp(1) - positive.squeeze(1)
            torch.testing.assert_close(got, expected.mean())
            got.backward()  # after the bank was updated
        for i, row in enumerate(F.normalize(b).detach()):
            known[tuple(row.tolist())] = -1 if labels is None else int(labels[i])


def test_an_empty_bank_gives_loss_0() -> None:
    loss = ours.NTXentLoss(memory_bank_size=(64, 16))
    a, b = (x.float() for x in views(10))
    value = loss(a, b, torch.zeros(10, dtype=torch.int64))
    assert value == 0
    assert all((g == 0).all() for g in torch.autograd.grad(value, (a, b)))
    assert loss(a, b, torch.zeros(10, dtype=torch.int64)) > 0


class WithBank(nn.Module):
    """A model that contains its loss, and so the buffers of the bank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.loss = nn.Linear(16, 16), ours.NTXentLoss(memory_bank_size=(64, 16))

    def forward(self, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.encoder(a), self.encoder(b), labels)  # type: ignore[no-any-return]


def check_bank_of_rank_0() -> None:
    rank, known = dist.get_rank(), {}
    model = nn.parallel.DistributedDataParallel(WithBank())
    for step in range(4):
        a, b = (x.detach().float() for x in views(10, seed=2 * step + rank))
        labels = torch.arange(10) + 100 * step + 1000 * rank
        rows = F.normalize(model.module.encoder(b)).detach()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (rows.tolist(), labels.tolist()))
        known.update((tuple(row), label) for part in gathered for row, label in zip(*part, strict=True))
        model(a, b, labels).backward()
        bank, bank_labels = model.module.loss.memory_bank.bank, model.module.loss.bank_labels
        assert bank_labels.tolist() == [known.get(tuple(row), -1) for row in bank.tolist()]
        assert int((bank_labels >= 0).sum()) == 10 * (step + 1)


@pytest.mark.slow
def test_labels_follow_a_bank_that_is_broadcast() -> None:
    """DistributedDataParallel broadcasts the bank of rank 0, and its labels with it."""
    with RankPool(2) as pool:
        pool.run(check_bank_of_rank_0)


@pytest.mark.parametrize("loss", [ours.NTXentLoss(), ours.DCLLoss(), ours.NTXentLoss(memory_bank_size=(8, 16))])
def test_labels_of_the_wrong_batch(loss: nn.Module) -> None:
    with pytest.raises(ValueError, match="labels must have one entry per row of out0: got 20 labels for 10 rows"):
        loss(*views(10), torch.zeros(20, dtype=torch.int64))
    if len(getattr(loss, "bank_labels", ())):
        assert loss.memory_bank.bank_ptr == 0  # the bank was not written


def test_an_error_leaves_the_bank_unchanged() -> None:
    loss = ours.NTXentLoss(memory_bank_size=(16, 16))
    a, b = (x.float() for x in views(10))
    labels = torch.arange(10)
    loss(a, b, labels)
    bank = loss.memory_bank.bank.clone()
    with pytest.raises(ValueError, match=r"out1 must have the shape of out0: got \[5, 16\] for \[10, 16\]"):
        loss(a, b[:5], labels)
    assert torch.equal(loss.memory_bank.bank, bank)
    assert torch.equal(loss.bank_labels[:10], labels)


def test_a_loss_on_another_device_than_the_model() -> None:
    """The host's bank may be on the CPU; here the meta device replaces a GPU."""
    a, b = (x.detach().float().to("meta") for x in views(10))  # without a gradient, so the bank is not updated
    labels = torch.zeros(10, dtype=torch.int64, device="meta")
    for loss, *batch_labels in (
        (ours.NTXentLoss(memory_bank_size=(16, 16)), labels),
        (ours.NTXentLoss(memory_bank_size=(16, 16)),),
        (host.NTXentLoss(memory_bank_size=(16, 16)),),
    ):
        assert loss(a, b, *batch_labels).device.type == "meta"


def test_a_learned_temperature() -> None:
    results = []
    for module in (ours, host):
        temperature = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        loss = module.NTXentLoss(temperature=temperature)(*views())
        results.append((loss.detach(), *torch.autograd.grad(loss, temperature)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_of_the_constructor_equal_the_hosts() -> None:
    with pytest.raises(ValueError, match="does not specify the feature"):
        ours.NTXentLoss(memory_bank_size=8)
    with pytest.raises(ValueError, match="Illegal temperature"):
        ours.NTXentLoss(temperature=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss"])
def test_memory_is_less_than_the_hosts(name: str) -> None:
    code = """
from {module} import {name}
a, b = torch.randn(2, 3072, 64)
def step(n=3072):
    {name}()(a[:n].clone().requires_grad_(), b[:n].clone().requires_grad_()).backward()
step(256)
"""
    modules = ("mcl_kernels.integrations.lightly", "lightly.loss")
    mine, theirs = (peak_of(code.format(module=module, name=name)) for module in modules)
    assert mine < theirs / 10, (mine, theirs)


@pytest.mark.parametrize("bank", [0, (64, 32)], ids=["SimCLR", "MoCo"])
def test_a_model_with_its_heads_trains(bank: int | tuple[int, int]) -> None:
    from lightly.models.modules import SimCLRProjectionHead

    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    model = nn.Sequential(backbone, SimCLRProjectionHead(128, 64, 32))
    images, labels = torch.randn(32, 1, 16, 16), torch.arange(32) % 2
    loss = ours.NTXentLoss(temperature=0.2, memory_bank_size=bank)

    def step() -> Tensor:
        return loss(model(images), model(images + 0.3 * torch.randn_like(images)), labels)  # type: ignore[no-any-return]

    losses = train(model.parameters(), step, steps=15)
    if bank:
        assert losses[0] == 0  # no row of the bank has a label
        assert losses[1] > 0
    else:
        assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


def check_on_two_ranks() -> None:
    rank = dist.get_rank()
    inputs, mine = [x.detach() for x in views(40)], slice(20 * rank, 20 * rank + 20)

    def run(loss: nn.Module, *labels: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        leaves = [x[mine].to(dtype, copy=True).requires_grad_() for x in inputs]
        value = loss(*leaves, *labels)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    for name, options in LOSSES.values():
        options = {**options, "gather_distributed": True}
        for a, b in zip(*(run(getattr(module, name)(**options)) for module in (ours, host)), strict=True):
            torch.testing.assert_close(a, b)
    for name in ("NTXentLoss", "DCLLoss"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        expected_loss = getattr(ours, name)()(*leaves, LABELS)
        expected = torch.autograd.grad(expected_loss, leaves)
        value, *gradients = run(getattr(ours, name)(gather_distributed=True), LABELS[mine])
        dist.all_reduce(value)
        torch.testing.assert_close(value / 2, expected_loss.detach())
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a / 2, b[mine])  # averaging over ranks makes it exact
    losses = []
    for module in (ours, host):
        torch.manual_seed(0)
        losses.append(module.NTXentLoss(memory_bank_size=(90, 16), gather_distributed=True))
    for _ in range(3):
        for a, b in zip(*(run(loss, dtype=torch.float32) for loss in losses), strict=True):
            torch.testing.assert_close(a, b)
    run(losses[0], LABELS[mine] + 100 * rank, dtype=torch.float32)
    assert sorted({int(label) // 100 for label in losses[0].bank_labels if label >= 0}) == [0, 1]


@pytest.mark.slow
def test_two_ranks_equal_one_process() -> None:
    with RankPool(2) as pool:
        pool.run(check_on_two_ranks)
