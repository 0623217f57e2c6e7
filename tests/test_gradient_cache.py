"""cached_backward against the plain backward pass of the complete batch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mcl_kernels import cached_backward, clip_loss, masked_info_nce, nt_xent
from tests.process_pool import RankPool


def encoder(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))


def views(n: int = 37) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    return x, x + 0.1


LABELS = torch.arange(37) % 3


class TwoTowers(nn.Module):
    """A model that returns a mapping with the logit scale in it, like CLIP of open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = encoder(), encoder()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.image(image)),
            "text_features": F.normalize(self.text(text)),
            "logit_scale": self.logit_scale.exp(),
        }


def gradients(*modules: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]
    for module in modules:
        module.zero_grad()
    return found


def check(modules: list[nn.Module], plain: Callable[[], Tensor], cached: Callable[[], Tensor]) -> None:
    torch.manual_seed(3)
    expected = plain()
    expected.backward()
    expected_gradients = gradients(*modules)
    torch.manual_seed(3)
    got = cached()
    torch.testing.assert_close(got, expected.detach())
    assert not got.requires_grad
    got_gradients = gradients(*modules)
    assert len(got_gradients) == len(expected_gradients) > 0
    for a, b in zip(got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [1, 10, 36, 37, 50])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_plain_ones(size: int, dropout: float) -> None:
    """With dropout too: each batch draws the same random numbers in both of its passes."""
    model, (a, b) = encoder(dropout), views()

    def encode(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return model(a), model(b)

    batches = list(zip(a.split(size), b.split(size), strict=True))

    def plain() -> Tensor:
        encoded = [encode(*batch) for batch in batches]
        return nt_xent(*(torch.cat(view) for view in zip(*encoded, strict=True)), LABELS, temperature=0.2)

    check([model], plain, lambda: cached_backward(encode, batches, lambda a, b: nt_xent(a, b, LABELS, temperature=0.2)))


def test_a_mapping_with_a_learned_scale_and_labels() -> None:
    """Batches as keywords, outputs as keywords of the loss; labels pass through the encoder."""
    model, (a, b) = TwoTowers(), views()

    def encode(labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        return {**model(**inputs), "labels": labels}

    parts = zip(a.split(8), b.split(8), LABELS.split(8), strict=True)
    batches = [{"image": x, "text": y, "labels": z} for x, y, z in parts]
    check(
        [model],
        lambda: clip_loss(**model(a, b), labels=LABELS),
        lambda: cached_backward(encode, batches, clip_loss),
    )


def test_one_tensor_and_parameters_of_the_loss() -> None:
    model, (a, _) = encoder(), views()
    prototypes = nn.Linear(8, 5, bias=False)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(prototypes(z), LABELS)

    check([model, prototypes], lambda: loss(model(a)), lambda: cached_backward(model, a.split(10), loss))


def test_a_frozen_tower() -> None:
    model, frozen, (a, b) = encoder(), encoder().requires_grad_(False), views()

    def encode(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return model(a), frozen(b)

    check(
        [model],
        lambda: masked_info_nce(*encode(a, b), LABELS),
        lambda: cached_backward(
            encode, list(zip(a.split(9), b.split(9), strict=True)), lambda q, k: masked_info_nce(q, k, LABELS)
        ),
    )
    assert all(p.grad is None for p in frozen.parameters())


def test_gradients_are_added() -> None:
    model, (a, b) = encoder(), views()
    loss = lambda z: nt_xent(*z.chunk(2))  # noqa: E731
    cached_backward(model, [a[:18], b[:18]], loss)
    once = gradients(model)
    for _ in range(2):
        cached_backward(model, [a[:18], b[:18]], loss)
    for twice, x in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(twice, 2 * x)


@pytest.mark.parametrize("around", [True, False])
def test_autocast(around: bool) -> None:
    """Also around the entire call: weights that were cast without a graph are cast again."""
    model, (a, b) = encoder(), views()

    def encode(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    def loss(z: Tensor) -> Tensor:
        return nt_xent(z[:37], z[37:], LABELS)

    batches = [*a.split(10), *b.split(10)]
    loss(torch.cat([encode(x) for x in batches])).backward()
    expected = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
        cached_backward(model if around else encode, batches, loss)
    for got, want in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-4)


def test_scaled_gradients() -> None:
    """The GradScaler is called inside the loss."""
    model, (a, b) = encoder(), views()
    loss = lambda z: nt_xent(z[:37], z[37:], LABELS)  # noqa: E731
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    cached_backward(model, [a, b], loss)
    plain = gradients(model)
    cached_backward(model, [a, b], lambda z: scaler.scale(loss(z)))
    for scaled, x in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(scaled / 1024.0, x)


def test_no_sync_until_the_last_batch() -> None:
    model, (a, _) = encoder(), views()
    events: list[str] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        events.append("begin")
        yield
        events.append("end")

    model[0].weight.register_hook(lambda _: events.append("backward"))
    cached_backward(model, a.split(13), lambda z: z.square().sum(), no_sync=no_sync)
    assert events == ["begin", "backward", "end"] * 2 + ["backward"]
    events.clear()
    model.no_sync = no_sync  # type: ignore[assignment]  # as DistributedDataParallel has it
    cached_backward(model, a.split(20), lambda z: z.square().sum())
    assert events == ["begin", "backward", "end", "backward"]


def test_random_numbers_continue_from_the_first_pass() -> None:
    """Later draws are those after a single forward pass."""
    model, (a, _) = encoder(0.5), views()
    torch.manual_seed(5)
    for batch in a.split(10):
        model(batch)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cached_backward(model, a.split(10), lambda z: z.square().sum())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("encode", "batches", "loss", "message"),
    [
        (encoder(), [], torch.sum, "batches must hold at least one batch: got none"),
        (encoder(), [torch.zeros(2, 6)], lambda z: z, r"loss must return a scalar: got shape \[2, 8\]"),
        (encoder(), [torch.zeros(2, 6)], lambda z: 0.5, "loss must return a tensor: got float"),
        (encoder(), [torch.zeros(2, 6)], lambda z: z.detach().sum(), "got a loss without a graph"),
        (lambda x: x.mul_(2), [torch.zeros(2, 6)], torch.sum, "encode must leave its batch as it was"),
        (lambda x: x[:, : len(x)], torch.zeros(5, 6).split(3), torch.sum, r"of one shape .*: got \[\(2,\), \(3,\)\]"),
        (lambda x: "x", [torch.zeros(2, 6)], torch.sum, "encode must return a tensor, or a tuple .*: got str"),
        (lambda x: {"z": None}, [torch.zeros(2, 6)], torch.sum, "encode must return tensors: got NoneType for 'z'"),
        (lambda x: (x,) * len(x), torch.zeros(5, 6).split(3), torch.sum, "must return the same outputs for every"),
    ],
)  # fmt: skip
def test_errors(encode: Callable[..., Any], batches: list[Tensor], loss: Callable[..., Tensor], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        cached_backward(encode, batches, loss)


class WithBias(TwoTowers):
    """A model that returns a parameter itself, as open_clip does."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_bias = nn.Parameter(torch.tensor(-1.0))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {**super().forward(image, text), "logit_bias": self.logit_bias}


def check_distributed_data_parallel() -> None:
    rank = dist.get_rank()

    def loss(logit_bias: Tensor, **encoded: Tensor) -> Tensor:
        both = clip_loss(**encoded, labels=LABELS[rank::2][:18])
        return both + (logit_bias * encoded["image_features"]).square().mean()

    model = DistributedDataParallel(WithBias())
    for step in range(3):
        a, b = (view[rank::2][:18] + step for view in views())
        loss(**model(a, b)).backward()
        plain = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        # A function around the model hides its no_sync: more exchanges, the same gradients.
        encode = model if step < 2 else lambda *batch: model(*batch)
        cached_backward(encode, list(zip(a.split(5), b.split(5), strict=True)), loss)
        for p, expected in zip(model.parameters(), plain, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        model.zero_grad()


@pytest.mark.slow
def test_distributed_data_parallel() -> None:
    """Two processes: gradients are averaged once, the learned scale's too."""
    with RankPool(2) as pool:
        pool.run(check_distributed_data_parallel)


LARGE = """
import pathlib, torch
from mcl_kernels import cached_backward, nt_xent

def kib(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))

n = 32768
encoder = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(),
    torch.nn.Conv2d(16, 32, 3, stride=2, padding=1), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 128),
)
images = torch.randn(n, 1, 16, 16)
labels = torch.arange(n) % 10
def encode(x):
    return encoder(x), encoder(x.flip(-1))
nt_xent(*encode(images[:8]), labels[:8]).backward()
loss = cached_backward(encode, images.split(1024), lambda a, b: nt_xent(a, b, labels))
assert loss.isfinite() and all(p.grad.isfinite().all() for p in encoder.parameters())
print(1024 * kib("VmHWM"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak memory of Linux")
def test_a_batch_of_32768_within_2_gib() -> None:
    """Its logits alone would take 16 GiB, the activations of the encoder about 3 GiB."""
    result = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 2 * 2**30
