"""Losses equal to pytorch-metric-learning's: any identities, memories, miners and reducers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.hosts import assert_same, peak_of, train, views

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402

from mcl_kernels.integrations.pytorch_metric_learning import NTXentLoss, SupConLoss  # noqa: E402

CLUSTERS = (torch.arange(40) % 4).repeat(2)
IDENTITIES = {
    "two views": torch.arange(40).repeat(2),
    "in any order": torch.arange(40).repeat(2)[torch.randperm(80, generator=torch.Generator().manual_seed(0))],
    "several positives": torch.arange(80) // 5,
    "some without": torch.cat((torch.arange(60), torch.arange(20))),
}


def rows() -> Tensor:
    return torch.cat(views())


def pairs_within_clusters(identity: Tensor, clusters: Tensor) -> tuple[Tensor, ...]:
    """Pairs of MCL in the host's format: equal identities as positives, the rest of a cluster as negatives."""
    equal, same = identity[:, None] == identity, clusters[:, None] == clusters
    positive = equal & ~torch.eye(len(identity), dtype=torch.bool)
    return (*positive.nonzero(as_tuple=True), *(~equal & same).nonzero(as_tuple=True))


KINDS = [(NTXentLoss, losses.NTXentLoss), (SupConLoss, losses.SupConLoss)]
of_each_class = pytest.mark.parametrize(("own", "host"), KINDS, ids=["NTXentLoss", "SupConLoss"])


@of_each_class
@pytest.mark.parametrize("identities", IDENTITIES)
def test_without_cluster_labels_equals_the_host(identities: str, own: type, host: type) -> None:
    labels = IDENTITIES[identities] - 7  # the host's labels may be negative
    assert_same(lambda x: own()(x, labels), lambda x: host()(x, labels), (rows(),))


@of_each_class
@pytest.mark.parametrize("identities", IDENTITIES)
def test_cluster_labels(identities: str, own: type, host: type) -> None:
    """The expected loss is the host's for the same pairs."""
    labels = IDENTITIES[identities]
    pairs = pairs_within_clusters(labels, CLUSTERS)
    assert_same(
        lambda x: own(temperature=0.2)(x, labels, cluster_labels=CLUSTERS),
        lambda x: host(temperature=0.2)(x, indices_tuple=pairs),
        (rows(),),
    )


def test_one_positive_without_negatives_has_loss_0() -> None:
    """The mean is over the losses above 0, so such an anchor must not count."""
    labels, clusters = torch.arange(40).repeat(2), torch.arange(40).clamp(max=20).repeat(2)
    pairs = pairs_within_clusters(labels, clusters)
    assert_same(
        lambda x: SupConLoss()(x, labels, cluster_labels=clusters),
        lambda x: losses.SupConLoss()(x, indices_tuple=pairs),
        (rows(),),
    )


@of_each_class
def test_reference_embeddings(own: type, host: type) -> None:
    labels, ref_labels = torch.arange(40), torch.arange(60) % 45
    clusters, ref_clusters = torch.arange(40) % 3, torch.arange(60) % 45 % 3
    ref = views(60, seed=2)[0]
    assert_same(
        lambda x, y: own()(x, labels, ref_emb=y, ref_labels=ref_labels),
        lambda x, y: host()(x, labels, ref_emb=y, ref_labels=ref_labels),
        (views()[0], ref),
    )
    equal, same = labels[:, None] == ref_labels, clusters[:, None] == ref_clusters
    pairs = (*equal.nonzero(as_tuple=True), *(~equal & same).nonzero(as_tuple=True))
    assert_same(
        lambda x, y: own()(
            x, labels, ref_emb=y, ref_labels=ref_labels, cluster_labels=clusters, ref_cluster_labels=ref_clusters
        ),
        lambda x, y: host()(x, indices_tuple=pairs, ref_emb=y),
        (views()[0], ref),
    )


def _one_side(x: Tensor, labels: Tensor) -> dict[str, Any]:
    return {"ref_emb": x, "ref_labels": labels}


REFERENCES: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
    "the batch": _one_side,
    "the batch, equal labels": lambda x, labels: _one_side(x, labels.clone()),
    "the batch, labels not given": lambda x, labels: {"ref_emb": x},
    "other rows, the same labels": lambda x, labels: _one_side(x.roll(1, 0) + 0.1, labels),
    "other rows, equal labels": lambda x, labels: _one_side(x.roll(1, 0) + 0.1, labels.clone()),
    "labels of no reference": lambda x, labels: {"ref_labels": labels + 1},
    "more rows, labels of another dtype": lambda x, labels: _one_side(torch.cat((x, x)), labels.double().repeat(2)),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("reference", REFERENCES)
@of_each_class
def test_any_reference_equals_the_host(own: type, host: type, reference: str, dtype: torch.dtype) -> None:
    """Row i of both sides is the same sample if both have the same labels object. Labels have any dtype."""
    labels = (torch.arange(80) // 5 / 2).to(dtype)

    def loss(kind: type) -> Callable[[Tensor], Tensor]:
        return lambda x: kind(temperature=0.2)(x, labels, **REFERENCES[reference](x, labels))

    assert_same(loss(own), loss(host), (rows(),))


def test_the_batch_as_its_own_reference_within_clusters() -> None:
    labels = IDENTITIES["two views"]
    assert_same(
        lambda x: NTXentLoss()(
            x, labels, ref_emb=x, ref_labels=labels, cluster_labels=CLUSTERS, ref_cluster_labels=CLUSTERS
        ),
        lambda x: NTXentLoss()(x, labels, cluster_labels=CLUSTERS),
        (rows(),),
    )


@of_each_class
@pytest.mark.parametrize("clusters", [None, CLUSTERS], ids=["no clusters", "clusters"])
def test_miners(clusters: Tensor | None, own: type, host: type) -> None:
    """Pairs and triplets of a miner, with negatives restricted to clusters."""
    x, labels = rows().detach()[:30], IDENTITIES["several positives"][:30]
    clusters = None if clusters is None else clusters[:30]
    for miner in (miners.MultiSimilarityMiner(), miners.TripletMarginMiner(margin=0.3)):
        found = miner(x, labels)
        got = own()(x, labels, found, cluster_labels=clusters)
        pairs = pml.utils.loss_and_miner_utils.convert_to_pairs(found, labels)
        if clusters is not None:
            kept = clusters[pairs[2]] == clusters[pairs[3]]
            pairs = (*pairs[:2], pairs[2][kept], pairs[3][kept])
        torch.testing.assert_close(got, host()(x, indices_tuple=pairs))


def test_wrappers_of_the_host() -> None:
    a, b = (x.detach().float() for x in views())
    wrapped = losses.SelfSupervisedLoss(NTXentLoss())
    torch.testing.assert_close(wrapped(a, b), losses.SelfSupervisedLoss(losses.NTXentLoss())(a, b))
    memories = [
        losses.CrossBatchMemory(kind(), embedding_size=16, memory_size=100) for kind in (NTXentLoss, losses.NTXentLoss)
    ]
    for step in range(4):
        x, _ = views(seed=step)
        values = [memory(x.detach().float(), torch.arange(40) % 20) for memory in memories]
        torch.testing.assert_close(*values)


@pytest.mark.parametrize(
    "options",
    [
        {"reducer": reducers.ThresholdReducer(low=0.5)},
        {"reducer": reducers.DoNothingReducer()},
        {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.1},
    ],
    ids=["threshold", "nothing", "regularizer"],
)
def test_reducers_and_regularizers(options: dict[str, Any]) -> None:
    x, labels = rows().detach(), IDENTITIES["two views"]
    got, expected = (kind(**options)(x, labels) for kind in (NTXentLoss, losses.NTXentLoss))
    if isinstance(expected, dict):
        assert got["loss"]["reduction_type"] == expected["loss"]["reduction_type"]
        got, expected = (result["loss"]["losses"].sort().values for result in (got, expected))
    torch.testing.assert_close(got, expected)


@of_each_class
@pytest.mark.parametrize(
    "labels", [torch.arange(8), torch.zeros(8, dtype=torch.int64)], ids=["no positives", "no negatives"]
)
def test_without_pairs_the_loss_is_0(labels: Tensor, own: type, host: type) -> None:
    x = views(8)[0]
    loss = own()(x, labels, cluster_labels=torch.zeros(8, dtype=torch.int64))
    assert loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


def test_clusters_of_one_sample_give_loss_0() -> None:
    x = rows()
    loss = NTXentLoss()(x, IDENTITIES["two views"], cluster_labels=torch.arange(40).repeat(2))
    assert loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None}, "labels must be an integer tensor: got NoneType"),
        ({"cluster_labels": torch.zeros(7).long()}, "cluster_labels must have one entry per row of embeddings: got 7"),
        ({"ref_emb": torch.zeros(3, 16)}, "ref_labels must be an integer tensor: got NoneType"),
        (
            {"ref_emb": torch.zeros(3, 16), "ref_labels": torch.zeros(3).long(), "cluster_labels": CLUSTERS},
            "ref_cluster_labels must be an integer tensor: got NoneType",
        ),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        NTXentLoss()(rows(), **{"labels": IDENTITIES["two views"], **options})


@pytest.mark.parametrize(
    "distance",
    [distances.LpDistance(), distances.CosineSimilarity(p=1), distances.CosineSimilarity(power=2)],
    ids=["Lp", "p", "power"],
)
def test_another_distance_is_refused(distance: Any) -> None:
    with pytest.raises(ValueError, match=r"distance must be CosineSimilarity\(\) with p=2 and power=1: got"):
        NTXentLoss(distance=distance)


def test_a_learned_temperature() -> None:
    x, labels = rows().detach(), IDENTITIES["two views"]
    results = []
    for kind in (NTXentLoss, losses.NTXentLoss):
        temperature = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        loss = kind(temperature=temperature)(x, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, temperature)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_trains() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(16, 8), rows().detach().float()
    loss = NTXentLoss(temperature=0.2)
    history = train(model.parameters(), lambda: loss(model(x), IDENTITIES["two views"], cluster_labels=CLUSTERS))
    assert history[-1] < history[0]


@pytest.mark.slow
def test_memory_is_less_than_the_hosts() -> None:
    code = """
from {module} import NTXentLoss
x, labels = torch.randn(512, 64), torch.arange(256).repeat(2)
def step(n=512):
    NTXentLoss()(x[:n].clone().requires_grad_(), labels[:n] % (n // 2)).backward()
step(32)
"""
    modules = ("mcl_kernels.integrations.pytorch_metric_learning", "pytorch_metric_learning.losses")
    ours, theirs = (peak_of(code.format(module=module)) for module in modules)
    assert ours < theirs / 50, (ours, theirs)
