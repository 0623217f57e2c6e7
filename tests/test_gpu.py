"""Promises that only a GPU can test; the numbers of its implementations are in the tests that all of them run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcl_kernels import clip_loss, masked_info_nce, masked_logsumexp, nt_xent
from tests.cases import Case, make_case
from tests.conftest import Backend, unavailable_reason
from tests.test_logsumexp import check

FORMS = [
    ("self", 300, None, False), ("rows", 300, 40, False), ("both", 300, 40, True),
    ("a plan of several tiles", 1500, 1100, True),
]  # fmt: skip


@pytest.fixture(params=[Backend("cuda", impl) for impl in ("triton", "cuda")], ids=str)
def impl(request: pytest.FixtureRequest) -> str:
    backend: Backend = request.param
    if reason := unavailable_reason(backend.impl, backend.device):
        pytest.skip(reason)
    return backend.impl


def loss_and_gradients(case: Case, bidirectional: bool, negatives: str, impl: str) -> tuple[Tensor, ...]:
    scale = torch.full((), 10.0, device="cuda", requires_grad=True)
    leaves = [x.detach().requires_grad_() for x in (case.query, case.key) if x is not None] + [scale]
    values = masked_logsumexp(
        *([*leaves[:-1], None] if case.key is None else leaves[:-1]),
        case.labels, case.key_labels, ids=case.ids, key_ids=case.key_ids, scale=scale, negatives=negatives,
        bidirectional=bidirectional, impl=impl,
    )  # fmt: skip
    every = torch.cat(values) if isinstance(values, tuple) else values
    return every, *torch.autograd.grad(torch.where(every.isfinite(), every, 0).sum(), leaves)


@pytest.mark.parametrize("negatives", ["same", "different", "all"])
@pytest.mark.parametrize(("form", "n", "m", "bidirectional"), FORMS)
def test_no_wait_and_one_graph_for_all_labels(
    impl: str, form: str, n: int, m: int | None, bidirectional: bool, negatives: str
) -> None:
    """A CUDA graph holds only the launches: replayed, it computes the results of the labels at that time."""
    case = make_case(n, m, 40, device="cuda")
    loss_and_gradients(case, bidirectional, negatives, impl)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(case, bidirectional, negatives, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(case, bidirectional, negatives, impl)
    for labels in (case.labels, case.key_labels):
        if labels is not None:
            labels.copy_(torch.where(labels < 0, labels, labels % 2))
    graph.replay()
    for got, expected in zip(captured, loss_and_gradients(case, bidirectional, negatives, impl), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


LOSSES = {
    "nt_xent": lambda a, b, labels, impl: nt_xent(a, b, labels, temperature=0.2, impl=impl),
    "clip_loss": lambda a, b, labels, impl: clip_loss(a, b, labels, logit_scale=5.0, normalize=True, impl=impl),
    "masked_info_nce": lambda a, b, labels, impl: masked_info_nce(a, b, labels, temperature=0.2, impl=impl),
    "a queue": lambda a, b, labels, impl: masked_info_nce(
        a, b.detach().repeat(5, 1), labels, labels.repeat(5), positive=b, temperature=0.2, impl=impl
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_captured_in_a_graph(impl: str, loss: str, dtype: torch.dtype) -> None:
    """Replayed, a step computes the loss and the gradients of the inputs and labels at that time."""
    first, second = (make_case(300, 300, 40, dtype=dtype, device="cuda", seed=seed) for seed in (0, 1))
    leaves = [x.detach().clone().requires_grad_() for x in (first.query, first.key)]
    labels = first.labels.clone()

    def step() -> tuple[Tensor, ...]:
        value = LOSSES[loss](*leaves, labels, impl)
        return value.detach(), *torch.autograd.grad(value, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf, value in zip([*leaves, labels], (second.query, second.key, second.labels), strict=True):
            leaf.copy_(value)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA devices")
def test_on_a_device_that_is_not_the_current_one(impl: str) -> None:
    case = make_case(1300, 200, 40, device="cuda:1")
    check(case, 10.0, Backend("cuda:1", impl), bidirectional=True)
