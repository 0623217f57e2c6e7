"""Features of PyTorch that training loops use, applied to models that end in each loss."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcl_kernels import ClipLoss, LabelledQueue, MaskedInfoNCE, NTXentLoss
from tests.conftest import CPU_IMPLS

FUSED = [impl for impl in CPU_IMPLS if impl != "reference"]


class Contrastive(nn.Module):
    """An encoder with a learned scale, and its loss; `forward` returns the loss."""

    def __init__(self, loss: str, impl: str = "auto") -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 16))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.kind, self.checkpointed = loss, False
        self.loss: nn.Module
        if loss == "clip_loss":
            self.loss = ClipLoss(normalize=True, impl=impl)
        elif loss == "nt_xent":
            self.loss = NTXentLoss(0.2, impl=impl)
        else:
            self.loss = MaskedInfoNCE(0.2, impl=impl)
            self.queue = LabelledQueue(100, 16)
            generator = torch.Generator().manual_seed(9)
            self.queue.enqueue(torch.randn(90, 16, generator=generator), torch.arange(90) % 3, torch.arange(90))

    def forward(self, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
        if self.checkpointed:
            a, b = (checkpoint(self.encoder, x, use_reentrant=False) for x in (a, b))
        else:
            a, b = self.encoder(a), self.encoder(b)
        if self.kind == "clip_loss":
            return self.loss(a, b, self.logit_scale.exp(), labels)  # type: ignore[no-any-return]
        if self.kind == "nt_xent":
            return self.loss(a, b, labels)  # type: ignore[no-any-return]
        return self.loss(a, self.queue.embeddings, labels, self.queue.labels, positive=b)  # type: ignore[no-any-return]


LOSSES = ["nt_xent", "clip_loss", "masked_info_nce"]


def model_of(loss: str, impl: str = "auto") -> Contrastive:
    torch.manual_seed(0)
    return Contrastive(loss, impl)


def batch(n: int = 48, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    x, noise = torch.randn(2, n, 12, generator=torch.Generator().manual_seed(seed))
    return x, x + 0.5 * noise, torch.arange(n) % 3


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    assert len(got) >= 6
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# Every loss with one of the fused operators, and one loss with the others.
COMPILED = [(loss, "native") for loss in LOSSES] + [("nt_xent", impl) for impl in FUSED if impl != "native"]


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "impl"), COMPILED)
def test_compiled_with_the_model(loss: str, impl: str) -> None:
    """Encoder and loss are one graph, for batches of any size, the last and smallest too: two graphs at most."""
    torch._dynamo.reset()
    model = model_of(loss, impl)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step, n in enumerate((48, 96, 31, 7)):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            got = compiled(*batch(n))
        got.backward()
        got_gradients = gradients(model)
        expected = model(*batch(n))
        expected.backward()
        torch.testing.assert_close(got, expected)
        assert_equal(got_gradients, gradients(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_at_the_largest_logit_scale(loss: str, dtype: torch.dtype) -> None:
    """Features in half precision, the loss in fp32, gradients of fp32 parameters finite at scale 100."""
    model = model_of(loss)
    with torch.no_grad():
        model.logit_scale.fill_(torch.tensor(100.0).log())
    if loss != "clip_loss":
        model.loss.temperature = 0.01
    with torch.autocast("cpu", dtype=dtype):
        value = model(*batch())
    assert value.dtype == torch.float32
    value.backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all(), name
    plain = model(*batch())
    torch.testing.assert_close(value.detach(), plain.detach(), rtol=0.1, atol=0.1)


def test_gradient_scaler(loss: str) -> None:
    """A scaled loss gives scaled gradients; a step after `unscale_` is the plain step."""
    model, plain = model_of(loss), model_of(loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    scaler.scale(model(*batch())).backward()
    scaler.unscale_(optimizers[0])
    nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    scaler.step(optimizers[0])
    scaler.update()
    plain(*batch()).backward()
    optimizers[1].step()
    assert_equal(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(loss: str, dtype: torch.dtype) -> None:
    """Without autocast, as under FSDP: an fp32 loss, gradients in the dtype of the parameters, near exact ones."""
    model = model_of(loss).to(dtype)
    a, b, labels = batch()
    value = model(a.to(dtype), b.to(dtype), labels)
    assert value.dtype == torch.float32
    value.backward()
    got = gradients(model)
    assert {x.dtype for x in got.values()} == {dtype}
    exact = copy.deepcopy(model).double()
    exact(a.to(dtype).double(), b.to(dtype).double(), labels).backward()
    for name, x in gradients(exact).items():
        cosine = F.cosine_similarity(got[name].double().flatten(), x.flatten(), dim=0)
        assert cosine > 0.98, name


def test_activation_checkpointing(loss: str) -> None:
    model = model_of(loss)
    model(*batch()).backward()
    expected = gradients(model)
    model.checkpointed = True
    model(*batch()).backward()
    assert_equal(gradients(model), expected)


def test_gradient_accumulation(loss: str) -> None:
    """Gradients of batches of any sizes add up; the last may be a single sample."""
    model, sizes = model_of(loss), (16, 31, 1)
    summed: dict[str, Tensor] = {}
    for seed, n in enumerate(sizes):
        (model(*batch(n, seed)) * n / sum(sizes)).backward()
        for name, x in gradients(model).items():
            summed[name] = summed[name] + x if name in summed else x
    for seed, n in enumerate(sizes):
        (model(*batch(n, seed)) * n / sum(sizes)).backward()
    assert_equal(gradients(model), summed, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_smallest_batches(loss: str, n: int) -> None:
    model = model_of(loss)
    value = model(*batch(n))
    value.backward()
    assert value.isfinite()
    for name, x in gradients(model).items():
        assert x.isfinite().all(), name


def test_functional_call(loss: str) -> None:
    """The module is called with other parameters; gradients with respect to them are those of the module."""
    model = model_of(loss)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def call(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, batch())  # type: ignore[no-any-return]

    expected = model(*batch())
    torch.testing.assert_close(call(parameters), expected.detach())
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    call(leaves).backward()
    expected.backward()
    got = {name: p.grad for name, p in leaves.items() if p.grad is not None}
    assert_equal(got, gradients(model))


@pytest.mark.parametrize(
    "module",
    [
        MaskedInfoNCE(0.1, negatives="all"),
        NTXentLoss(nn.Parameter(torch.tensor(0.2)), normalize=False),
        ClipLoss(reduction="sum"),
    ],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("how", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_copies_of_modules(module: nn.Module, how: Callable[[Any], Any]) -> None:
    other = how(module)
    assert other.options == module.options
    assert other.state_dict().keys() == module.state_dict().keys()
    a, b, labels = batch()
    arguments = (a, b, torch.tensor(5.0), labels) if isinstance(module, ClipLoss) else (a, b, labels)
    torch.testing.assert_close(other(*arguments), module(*arguments))


def test_a_checkpoint_of_a_run_holds_the_queue() -> None:
    """A run that is saved and continued has the bits of an uninterrupted run; a new stage relabels the queue."""

    def steps(model: Contrastive, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
        losses = []
        for seed in seeds:
            a, b, labels = batch(40, seed)
            loss = model(a, b, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            model.queue.enqueue(model.encoder(b), labels, torch.arange(40) + 40 * seed)
        return losses

    def fresh() -> tuple[Contrastive, torch.optim.Optimizer]:
        model = model_of("masked_info_nce")
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = fresh()
    uninterrupted = steps(model, optimizer, range(6))
    first, first_optimizer = fresh()
    steps(first, first_optimizer, range(3))
    saved = pickle.loads(pickle.dumps((first.state_dict(), first_optimizer.state_dict())))
    second, second_optimizer = fresh()
    second.load_state_dict(saved[0])
    second_optimizer.load_state_dict(saved[1])
    assert steps(second, second_optimizer, range(3, 6)) == uninterrupted[3:]
    new_labels = torch.arange(240) % 7
    second.queue.relabel(new_labels)
    assert torch.equal(second.queue.labels, new_labels[second.queue.ids])
