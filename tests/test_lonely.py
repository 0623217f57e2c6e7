"""The warning that hardly any anchor has a negative: given once, and in no other case."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mcl_kernels import LabelledQueue, clip_loss, masked_info_nce, nt_xent
from mcl_kernels.losses import lonely

N = 64
X = torch.randn(2, N, 8, generator=torch.Generator().manual_seed(0))
DISTINCT = torch.arange(N)
CALLS = (lonely.LOOKS + 1) * lonely.LOOK_EVERY  # each look reads the share that the look before it sent

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_info_nce": lambda x, labels: masked_info_nce(x, X[1], labels, impl="reference"),
    "nt_xent": lambda x, labels: nt_xent(x, X[1], labels, impl="reference"),
    "clip_loss": lambda x, labels: clip_loss(x, X[1], labels, logit_scale=1.0, impl="reference"),
}
all_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture(autouse=True)
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[lonely._Watch]:
    fresh = lonely._Watch()
    monkeypatch.setattr(lonely, "_watch", fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield fresh


@all_losses
def test_the_warning_is_given_once(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    for _ in range(CALLS - 1):
        assert loss(X[0], DISTINCT) == 0
    with pytest.warns(
        UserWarning, match=r"more than 90% of the anchors had no negative, .* in each of 4 losses"
    ) as warned:
        loss(X[0], DISTINCT)
    assert warned[0].filename == __file__
    for _ in range(2 * CALLS):
        loss(X[0], DISTINCT)


def queue_loss() -> Tensor:
    return masked_info_nce(X[0], X[1], DISTINCT, DISTINCT + N, positive=X[1], impl="reference")


ADVICE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "batch": (lambda: nt_xent(X[0], X[1], DISTINCT, impl="reference"), "fill a batch with fewer clusters"),
    "queue": (queue_loss, r"hardly any key has a label of the batch: relabel\(\) needs the ids given to enqueue\(\)"),
    "different": (
        lambda: nt_xent(X[0], X[1], 0 * DISTINCT, negatives="different", impl="reference"),
        "the labels of a batch are all alike, or nearly; negatives='different' compares other labels only",
    ),
    "queue of one label": (
        lambda: masked_info_nce(
            X[0], X[1], 0 * DISTINCT, 0 * DISTINCT, positive=X[1], negatives="different", impl="reference"
        ),
        "the labels of a batch are all alike",
    ),
}


@pytest.mark.parametrize(("loss", "advice"), ADVICE.values(), ids=ADVICE)
def test_advice(loss: Callable[[], Tensor], advice: str) -> None:
    for _ in range(CALLS - 1):
        loss()
    with pytest.warns(UserWarning, match=advice):
        loss()


FEW = lonely.MIN_ANCHORS - 1
OTHERS: dict[str, Callable[[], Tensor]] = {
    "negatives": lambda: nt_xent(X[0], X[1], DISTINCT // 8, impl="reference"),
    "80 % without": lambda: masked_info_nce(X[0], X[1], DISTINCT.clamp(max=N * 4 // 5), impl="reference"),
    "without labels": lambda: masked_info_nce(X[0], X[1, :0], positive=X[1], impl="reference"),
    "unlabelled": lambda: masked_info_nce(X[0], X[1], torch.full((N,), -1), impl="reference"),
    "few": lambda: masked_info_nce(X[0, :FEW], X[1, :FEW], DISTINCT[:FEW], impl="reference"),
}


@pytest.mark.parametrize("loss", OTHERS.values(), ids=OTHERS)
def test_other_losses_give_no_warning(loss: Callable[[], Tensor]) -> None:
    for _ in range(2 * CALLS):
        loss()


def test_a_loss_with_negatives_restarts_the_count() -> None:
    for _ in range(3):
        for _ in range(CALLS - 2 * lonely.LOOK_EVERY):
            nt_xent(X[0], X[1], DISTINCT, impl="reference")
        for _ in range(lonely.LOOK_EVERY):
            nt_xent(X[0], X[1], DISTINCT // 8, impl="reference")


def test_a_queue_that_fills_gives_no_warning() -> None:
    queue = LabelledQueue(40 * N, 8)
    for step in range(2 * CALLS):
        labels = torch.full((N,), step % 16)  # one cluster a batch: none has negatives in the first 16 steps
        loss = masked_info_nce(X[0], queue.embeddings, labels, queue.labels, positive=X[1], impl="reference")
        assert (loss == 0) == (step < 16)
        queue.enqueue(X[1], labels)


def test_a_look_does_not_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch, watch: lonely._Watch) -> None:
    """A share that the GPU has not written yet is NaN, and is read later."""
    sent: list[Tensor] = []

    def send(share: Tensor) -> Tensor:
        sent.append(torch.tensor(torch.nan))
        return sent[-1]

    monkeypatch.setattr(lonely, "_sent_to_cpu", send)
    for look in range(lonely.LOOKS):
        for _ in range(3 * lonely.LOOK_EVERY):
            nt_xent(X[0], X[1], DISTINCT, impl="reference")
            assert watch.looks == look
        assert len(sent) == look + 1
        sent[-1].fill_(1.0)
        if look < lonely.LOOKS - 1:
            for _ in range(lonely.LOOK_EVERY):
                nt_xent(X[0], X[1], DISTINCT, impl="reference")
    for _ in range(lonely.LOOK_EVERY - 1):
        nt_xent(X[0], X[1], DISTINCT, impl="reference")
    with pytest.warns(UserWarning, match="had no negative"):
        nt_xent(X[0], X[1], DISTINCT, impl="reference")


def on_fake(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return f(mode.from_tensor(x))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], object]]] = {
    "grad": torch.func.grad,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "make_fx": lambda f: make_fx(f),
    "fake": lambda f: lambda x: on_fake(f, x),
}


@all_losses
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(
    loss: Callable[[Tensor, Tensor], Tensor],
    transform: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], object]],
    watch: lonely._Watch,
) -> None:
    def on_labels(x: Tensor) -> Tensor:
        return loss(x, DISTINCT)

    on_labels(X[0])
    for _ in range(lonely.LOOK_EVERY):
        transform(on_labels)(X[0])
    assert watch.share is None


class Loss(torch.nn.Module):
    def forward(self, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        return nt_xent(x, y, labels, impl="reference")


def test_compiled_and_exported_losses_are_not_watched(watch: lonely._Watch) -> None:
    compiled = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
    for _ in range(CALLS):
        compiled(X[0], X[1], DISTINCT)
    for strict in (False, True):
        exported = torch.export.export(Loss(), (X[0], X[1], DISTINCT), strict=strict)
        assert not any("copy" in str(node.target) for node in exported.graph.nodes)
    assert watch == lonely._Watch()
