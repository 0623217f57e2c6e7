"""Training over several ranks (DDP, FSDP2, a compiled encoder) against training in one process on the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mcl_kernels import ClipLoss, MaskedInfoNCE, NTXentLoss
from tests.process_pool import RankPool
from tests.sharded_losses import D, make_batch, shard_of


class Encoder(nn.Module):
    """Two layers and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), self.log_scale.exp()


def encoder_loss(loss: str, encoder: nn.Module, batch: dict[str, Any], **options: Any) -> Tensor:
    embeddings, scale = encoder(torch.cat((batch["a"], batch["b"])))
    a, b = embeddings.chunk(2)
    if loss == "nt_xent":
        return NTXentLoss(1.0 / scale, **options)(a, b, batch["labels"])
    if loss == "clip_loss":
        return ClipLoss(normalize=True, **options)(a, b, scale, batch["labels"])
    module = MaskedInfoNCE(1.0 / scale, **options)
    return module(a, batch["key"], batch["labels"], batch["key_labels"], positive=b)


def train_encoder(loss: str, encoder: Encoder, model: Any, batch: dict[str, Any], **options: Any) -> list[Tensor]:
    """Parameters of the encoder after five steps of `model`, which holds it."""
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    for _ in range(5):
        value = encoder_loss(loss, model, batch, **options)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return [parameter.detach() for parameter in encoder.parameters()]


def check_ddp(loss: str, labels: str, shards: str, exchange: str, compiled: bool = False) -> None:
    batch = make_batch(labels, dtype=torch.float32)
    encoder = Encoder()
    expected = train_encoder(loss, encoder, encoder, batch)
    for parameter, initial in zip(expected, Encoder().parameters(), strict=True):
        assert float((parameter - initial).abs().max()) > 1e-3
    encoder = Encoder()
    model: Any = DistributedDataParallel(encoder)
    if compiled:
        model = torch.compile(model)
    options = {"group": dist.group.WORLD, "exchange": exchange}
    parameters = train_encoder(loss, encoder, model, shard_of(batch, shards), **options)
    for parameter, expected_parameter in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter, expected_parameter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", ["nt_xent", "clip_loss", "masked_info_nce"])
def test_five_steps_with_ddp_are_those_of_one_process(ranks: RankPool, loss: str, exchange: str) -> None:
    for labels, shards in (("balanced", "even"), ("zipf", "empty"), ("alone", "uneven")):
        if labels != "alone" or loss == "masked_info_nce":
            ranks.run(check_ddp, loss, labels, shards, exchange)


@pytest.mark.slow
def test_five_steps_with_a_compiled_encoder_are_those_of_one_process() -> None:
    with RankPool(2) as pool:
        pool.run(check_ddp, "nt_xent", "zipf", "uneven", "cluster", True)


class ModelWithLoss(nn.Module):
    """A layer and the loss of its output; the temperature has shape [1], since FSDP2 does not take []."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.layer, temperature = name, nn.Linear(D, D), nn.Parameter(torch.tensor([0.3]))
        if name == "clip_loss":
            self.temperature = temperature
            self.loss: nn.Module = ClipLoss(normalize=True, **options)
        else:
            self.loss = {"nt_xent": NTXentLoss, "masked_info_nce": MaskedInfoNCE}[name](temperature, **options)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        a, b = self.layer(batch["a"]), self.layer(batch["b"])
        if self.name == "clip_loss":
            return self.loss(a, b, 1 / self.temperature, batch["labels"])  # type: ignore[no-any-return]
        return self.loss(a, b, batch["labels"])  # type: ignore[no-any-return]


def train_model(model: ModelWithLoss, batch: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()


def check_fsdp(loss: str, exchange: str) -> None:
    batch = make_batch("zipf", dtype=torch.float32)
    single = ModelWithLoss(loss)
    train_model(single, batch)
    sharded = ModelWithLoss(loss, group=dist.group.WORLD, exchange=exchange)
    for module in (sharded.loss, sharded):
        fully_shard(module)
    train_model(sharded, shard_of(batch, "uneven"))
    parameters = dict(sharded.named_parameters())
    expected = {name: x.detach() for name, x in single.named_parameters()}
    (temperature,) = (x for name, x in expected.items() if "temperature" in name)
    assert temperature.shape == (1,)
    assert abs(float(temperature) - 0.3) > 1e-3
    assert parameters.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(parameters[name].full_tensor().detach(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch computes on GPUs only")
@pytest.mark.parametrize("exchange", ["gather", "cluster"])
@pytest.mark.parametrize("loss", ["nt_xent", "clip_loss", "masked_info_nce"])
def test_three_steps_with_fsdp_are_those_of_one_process(ranks: RankPool, loss: str, exchange: str) -> None:
    ranks.run(check_fsdp, loss, exchange)


def check_copies() -> None:
    """Copies a loss as torch.optim.swa_utils does for the average of a model that holds it."""
    loss = NTXentLoss(nn.Parameter(torch.tensor(0.5)), group=dist.group.WORLD, exchange="cluster")
    twin = copy.deepcopy(loss)
    assert f"group={dist.get_world_size()} ranks, exchange=cluster" in repr(twin)
    assert twin.temperature is not loss.temperature
    shard = shard_of(make_batch("zipf"), "uneven")
    arguments = shard["a"], shard["b"], shard["labels"]
    assert twin(*arguments).equal(loss(*arguments))


def test_copies_of_a_module_keep_the_group(ranks: RankPool) -> None:
    ranks.run(check_copies)
