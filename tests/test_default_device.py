"""The default device, which `torch.set_default_device("cuda")` sets, changes no result.

"meta" replaces "cuda" here: a tensor that is on it by mistake has no values, so that computing with it fails.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _device
from torch.utils._pytree import tree_leaves

import mcl_kernels
from mcl_kernels import (
    ClipLoss,
    ClusterBatchSampler,
    ConcatEncoder,
    KMeans,
    LabelledQueue,
    MaskedInfoNCE,
    MultistageRunner,
    NTXentLoss,
    assign_clusters,
    cached_backward,
    clip_loss,
    compose_labels,
    count_negatives,
    masked_info_nce,
    masked_logsumexp,
    model_soup,
    nt_xent,
    objectives,
    plan_exchange,
    positive_ranks,
)
from mcl_kernels.cli.cluster import Options, run

A, B = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0), device="cpu")
LABELS = torch.arange(64, device="cpu") % 3
# Few distinct rows: clusters with far initial centres become empty during the fit.
FEW_DIFFERENT = A[:9].repeat(8, 1)


def gradients(loss: Callable[..., Tensor], **options: Any) -> list[Tensor]:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    value = loss(a, b, labels=LABELS, **options)
    return [value.detach(), *torch.autograd.grad(value, (a, b))]


def clustered(x: Any, **options: Any) -> list[Any]:
    k = KMeans(7, seed=3, **options).fit(x)
    return [k.cluster_centers_, k.labels_, k.inertia_, k.predict(x)]


def mapped(directory: Path) -> np.ndarray[Any, Any]:
    np.save(directory / "x.npy", A.numpy())
    return np.load(directory / "x.npy", mmap_mode="r")  # type: ignore[no-any-return]


def staged(directory: Path | None) -> list[Any]:
    found = []
    runner = MultistageRunner(64, n_stages=2, n_clusters=3, directory=directory, keys=[f"{i}" for i in range(64)])
    for stage in runner:
        batches = list(stage.batch_sampler(8))
        finished = stage.finish(A + stage.index, state={"weight": A})
        found += [batches, finished.labels[:], finished.centers, finished.state, stage.assign([A][: stage.index])]
    return [*found, runner.indices_of(["3", "5"]), runner.labels[:]]


def queued() -> list[Tensor]:
    queue = LabelledQueue(32, 8, device="cpu")
    queue.enqueue(B[:20], LABELS[:20], torch.arange(20, device="cpu"))
    queue.relabel(LABELS + 1)
    return [MaskedInfoNCE()(A, queue.embeddings, LABELS, queue.labels, positive=B), queue.labels]


def cached() -> list[Tensor | None]:
    model = nn.Linear(8, 4, device="cpu")
    model.load_state_dict({"weight": B[:4], "bias": A[0, :4]})
    value = cached_backward(lambda a, b: (model(a), model(b)), [(A[:30], B[:30]), (A[30:], B[30:])], nt_xent)
    return [value, model.weight.grad]


def command(directory: Path) -> list[Any]:
    np.save(directory / "x.npy", A.numpy())
    summary = []
    for name, previous in (("first.pt", ()), ("second.npy", (directory / "first.pt",))):
        options = Options(directory / "x.npy", clusters=3, previous=previous, out=directory / name)
        run(options, report=lambda _: None)
        summary.append(json.loads((directory / f"{name}.json").read_text())["sha256"])
    return summary


CALLS: dict[str, Callable[[Path], Any]] = {
    **{
        f"{name}, {impl}": lambda _, loss=loss, impl=impl: gradients(loss, impl=impl)
        for name, loss in {
            "masked_info_nce": masked_info_nce,
            "nt_xent": nt_xent,
            "clip_loss": lambda *x, **options: clip_loss(*x, logit_scale=2.0, **options),
            "NTXentLoss": lambda *x, impl, **options: NTXentLoss(impl=impl)(*x, **options),
            "ClipLoss": lambda *x, impl, **options: ClipLoss(impl=impl)(*x, 2.0, **options),
            "hard_negative": lambda *x, **options: nt_xent(*x, objective=objectives.hard_negative(), **options),
        }.items()
        for impl in ("auto", "blockwise", "reference")
    },
    "masked_logsumexp": lambda _: [masked_logsumexp(A), masked_logsumexp(A, B, bidirectional=True)],
    "count_negatives": lambda _: count_negatives(LABELS),
    "positive_ranks": lambda _: positive_ranks(A, B, LABELS),
    "compose_labels": lambda _: [compose_labels(LABELS, LABELS % 2), compose_labels(LABELS << 40, LABELS << 40)],
    **{f"KMeans, {impl}": lambda _, impl=impl: clustered(A, impl=impl) for impl in ("auto", "reference")},
    "KMeans, random": lambda _: clustered(A, init="random", n_init=2),
    "KMeans, centres": lambda _: clustered(A, init=B[:7]),
    "KMeans, cosine": lambda _: clustered(A, metric="cosine"),
    "KMeans, mini-batches": lambda _: clustered(A, batch_size=16),
    "KMeans, empty clusters": lambda _: clustered(FEW_DIFFERENT, init=A[:7] * 100 + 1),
    "KMeans, chunks": lambda _: clustered(list(A.split(10))),
    "KMeans, an array": lambda _: clustered(A.numpy()),
    "KMeans, a memory map": lambda directory: clustered(mapped(directory)),
    "assign_clusters": lambda _: assign_clusters(A, B[:5], metric="cosine"),
    "ClusterBatchSampler": lambda _: [list(ClusterBatchSampler(LABELS, 8)), list(ClusterBatchSampler(LABELS, 8))],
    "MultistageRunner": lambda _: staged(None),
    "MultistageRunner in a directory": lambda directory: [staged(directory / "run"), command(directory)],
    "LabelledQueue": lambda _: queued(),
    "cached_backward": lambda _: cached(),
    "plan_exchange": lambda _: plan_exchange([40, 9, 3], world_size=4).operations,
    "ConcatEncoder": lambda _: ConcatEncoder([nn.Identity(), nn.Identity()])(A),
    "model_soup": lambda _: model_soup([{"w": A}, {"w": B}]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_without_a_default_device(name: str, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    expected = tree_leaves(CALLS[name](tmp_path / "without"))
    with torch.device("meta"):  # unlike set_default_device, it is undone in torch 2.6 too
        found = tree_leaves(CALLS[name](tmp_path / "with"))
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.equal(other) if isinstance(one, Tensor) else one == other


def test_every_factory_of_tensors_names_its_device() -> None:
    """Checks the calls, in the code of the package, of all functions that follow the default device."""
    following = {function.__name__ for function in _device._device_constructors()}
    assert {"arange", "empty", "randperm", "tensor"} <= following
    unnamed = []
    for path in Path(inspect.getfile(mcl_kernels)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == "torch"
                and node.func.attr in following
                and "device" not in {keyword.arg for keyword in node.keywords}
            ):
                unnamed.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not unnamed
