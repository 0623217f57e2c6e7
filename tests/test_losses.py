"""The losses against independent formulas: other libraries' and a double loop; defaults and reductions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels import clip_loss, masked_info_nce, nt_xent, objectives
from tests import oracles
from tests.cases import OBJECTIVES
from tests.conftest import Backend, composed
from tests.loss_cases import LOSSES, pair


def test_nt_xent_without_labels_is_simclr(backend: Backend) -> None:
    x, y = pair(40, dtype=torch.float64)
    got = nt_xent(x, y, temperature=0.2, impl=backend.impl)
    torch.testing.assert_close(got, oracles.simclr_cross_entropy(x, y, 0.2))


def test_clip_loss_without_labels_is_open_clip(backend: Backend) -> None:
    x, y = pair(40, dtype=torch.float64)
    x, y, scale = F.normalize(x).requires_grad_(), F.normalize(y), torch.tensor(30.0, dtype=torch.float64)
    scale.requires_grad_()
    got = clip_loss(x, y, logit_scale=scale, impl=backend.impl)
    expected = oracles.clip_cross_entropy(x, y, scale)
    torch.testing.assert_close(got, expected)
    gradients = (torch.autograd.grad(loss, (x, scale)) for loss in (got, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_queue_form_without_labels_is_moco(backend: Backend) -> None:
    x, y = pair(40, dtype=torch.float64)
    queue = F.normalize(pair(100, seed=1, dtype=torch.float64)[0]).T.contiguous().T  # stored [D, K], as MoCo does
    got = masked_info_nce(x, queue, positive=y, temperature=0.2, impl=backend.impl)
    torch.testing.assert_close(got, oracles.moco_cross_entropy(x, y, queue, 0.2))


@pytest.mark.parametrize("objective", ["infonce", "dcl"])
def test_equals_pytorch_metric_learning(backend: Backend, objective: str) -> None:
    """Its `indices_tuple` lists the positive and negative pairs, so it can express MCL."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    n = 12
    x, y = pair(n)
    labels = torch.arange(n) % 3
    z, both, sample = torch.cat((x, y)), labels.repeat(2), torch.arange(n).repeat(2)
    positives = (torch.arange(2 * n), (torch.arange(2 * n) + n) % (2 * n))
    negatives = torch.nonzero((both[:, None] == both) & (sample[:, None] != sample), as_tuple=True)
    if objective == "infonce":
        expected = losses.NTXentLoss(temperature=0.2)(z, indices_tuple=(*positives, *negatives))
        got = nt_xent(x, y, labels, temperature=0.2, impl=backend.impl)
    else:
        logits = F.cosine_similarity(z[:, None], z[None], dim=2) / 0.2
        mask = (both[:, None] == both) & (sample[:, None] != sample)
        expected = (logits.masked_fill(~mask, -torch.inf).logsumexp(1) - logits[positives]).mean()
        got = nt_xent(x, y, labels, temperature=0.2, objective=objectives.decoupled, impl=backend.impl)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("negatives", ["same", "different", "all"])
@pytest.mark.parametrize("vector", [False, True])
def test_masked_info_nce_by_hand(backend: Backend, negatives: str, vector: bool) -> None:
    x, y = (F.normalize(z) for z in pair(15, 5, dtype=torch.float64))
    extra = F.normalize(pair(4, 5, seed=3, dtype=torch.float64)[0])
    key = torch.cat((y, extra))
    labels, key_labels = torch.arange(15) % 4 - 1, torch.arange(19) % 4 - 1
    temperature = torch.linspace(0.1, 0.9, 15, dtype=torch.float64) if vector else torch.tensor(0.3).double()
    got = masked_info_nce(
        x, key, labels, key_labels, temperature=temperature, negatives=negatives, reduction="none", impl=backend.impl
    )
    ids = torch.arange(19)
    negative_indices = [oracles.negatives_of(i, 19, labels, key_labels, ids, ids, negatives) for i in range(15)]
    expected = oracles.info_nce_double_loop(x, y, key, 1 / temperature, negative_indices)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_queue_form_by_hand(backend: Backend) -> None:
    x, y = (F.normalize(z) for z in pair(9, 5, dtype=torch.float64))
    queue = F.normalize(pair(20, 5, seed=3, dtype=torch.float64)[0])
    labels, queue_labels = torch.arange(9) % 3, torch.arange(20) % 4 - 1
    ids, queue_ids = torch.arange(9), torch.arange(20)
    options = {"positive": y, "temperature": 0.3, "reduction": "none", "impl": backend.impl}
    for given in ({}, {"ids": ids, "key_ids": queue_ids}):
        got = masked_info_nce(x, queue, labels, queue_labels, **options, **given)
        pairs = (ids, queue_ids) if given else (None, None)
        negative_indices = [oracles.negatives_of(i, 20, labels, queue_labels, *pairs) for i in range(9)]
        expected = oracles.info_nce_double_loop(x, y, queue, torch.tensor(1 / 0.3), negative_indices)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_nt_xent_by_hand(backend: Backend) -> None:
    x, y = (F.normalize(z) for z in pair(8, 5, dtype=torch.float64))
    labels, ids = torch.tensor([0, 0, 0, 1, 1, 2, -1, 0]), torch.tensor([0, 1, 0, 2, 3, 4, 5, 6])
    temperature = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    got = nt_xent(x, y, labels, ids=ids, temperature=temperature, reduction="none", impl=backend.impl)
    z, both, sample = torch.cat((x, y)), labels.repeat(2), ids.repeat(2)
    negative_indices = [oracles.negatives_of(i, 16, both, both, sample, sample) for i in range(16)]
    expected = oracles.info_nce_double_loop(z, torch.cat((y, x)), z, 1 / temperature, negative_indices)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert got[[5, 6, 13, 14]].tolist() == [0.0] * 4


def test_clip_loss_by_hand(backend: Backend) -> None:
    x, y = (F.normalize(z) for z in pair(8, 5, dtype=torch.float64))
    labels, text_labels = torch.tensor([0, 0, 0, 1, 1, 2, -1, 0]), torch.tensor([0, 0, 1, 1, 1, 0, 0, 0])
    ids = torch.tensor([0, 1, 0, 2, 3, 4, 5, 6])
    got = clip_loss(
        x, y, labels, text_labels=text_labels, ids=ids, logit_scale=4.0, reduction="none", impl=backend.impl
    )
    scale = torch.tensor(4.0)
    image_negatives = [oracles.negatives_of(i, 8, labels, text_labels, ids, ids) for i in range(8)]
    text_negatives = [oracles.negatives_of(i, 8, text_labels, labels, ids, ids) for i in range(8)]
    image = oracles.info_nce_double_loop(x, y, y, scale, image_negatives)
    text = oracles.info_nce_double_loop(y, x, x, scale, text_negatives)
    expected = (torch.tensor(image) + torch.tensor(text)).double() / 2
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_labels_of_the_queries_serve_the_keys(backend: Backend) -> None:
    x, y = pair(12)
    labels, ids = torch.arange(12) % 3, torch.arange(12) // 2
    both = masked_info_nce(x, y, labels, labels, ids=ids, key_ids=ids, impl=backend.impl)
    assert torch.equal(masked_info_nce(x, y, labels, ids=ids, impl=backend.impl), both)
    assert torch.equal(masked_info_nce(x, y, key_labels=labels, key_ids=ids, impl=backend.impl), both)


def test_extra_keys_are_negatives_and_share_no_id(backend: Backend) -> None:
    x, y = pair(6)
    extra = pair(3, seed=5)[0]
    got = masked_info_nce(x, torch.cat((y, extra)), temperature=0.5, impl=backend.impl)
    z = F.normalize(torch.cat((y, extra)))
    expected = F.cross_entropy(F.normalize(x) @ z.T / 0.5, torch.arange(6))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_negatives_modes_split_the_batch(backend: Backend, loss: str) -> None:
    """The exponentials of the LSE over the same and over different clusters add up to that over all."""
    x, y = pair(20, dtype=torch.float64)
    labels = torch.arange(20) % 3
    options = {"objective": objectives.decoupled, "reduction": "none", "temperature": 0.5, "impl": backend.impl}
    same, different, every = (
        LOSSES[loss](x, y, labels, negatives=negatives, normalize=True, **options)
        for negatives in ("same", "different", "all")
    )
    if loss != "clip_loss":  # its result is the mean of two directions
        torch.testing.assert_close(torch.logaddexp(same, different), every)
    torch.testing.assert_close(every, LOSSES[loss](x, y, **options))


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(backend: Backend, loss: str) -> None:
    x, y = pair(10)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, -1, -1, 0])
    each = LOSSES[loss](x, y, labels, reduction="none", impl=backend.impl)
    assert each.shape == (20 if loss == "nt_xent" else 10,)
    torch.testing.assert_close(LOSSES[loss](x, y, labels, reduction="sum", impl=backend.impl), each.sum())
    torch.testing.assert_close(LOSSES[loss](x, y, labels, reduction="mean", impl=backend.impl), each.sum() / len(each))


@composed
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_tiny_batches(backend: Backend, loss: str, objective: objectives.ObjectiveLike, n: int) -> None:
    x, y = (z.requires_grad_() for z in pair(n))
    value = LOSSES[loss](x, y, objective=objective, impl=backend.impl)
    value.backward()
    assert value.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    if n < 2:
        assert value == 0
        assert (x.grad == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_hard_negatives_are_weighted_by_their_own_scale(backend: Backend, loss: str) -> None:
    """beta = 1: log n + log sum exp(2 s) - log sum exp(s) of the negatives in place of their log-sum-exp."""
    x, y = (F.normalize(z) for z in pair(9, dtype=torch.float64))
    objective = objectives.hard_negative(1.0)
    got = LOSSES[loss](x, y, objective=objective, temperature=0.5, normalize=True, reduction="sum", impl=backend.impl)

    def anchors(query: Tensor, key: Tensor, excluded: Tensor, positive: Tensor) -> Tensor:
        logits = (2.0 * query @ key.T).masked_fill(excluded, -torch.inf)
        hard = (~excluded).sum(1).log() + (2.0 * logits).logsumexp(1) - logits.logsumexp(1)
        return F.softplus(hard - 2.0 * (query * positive).sum(1)).sum()

    own = torch.eye(9, dtype=torch.bool)
    expected = {
        "masked_info_nce": lambda: anchors(x, y, own, y),
        "nt_xent": lambda: anchors(torch.cat((x, y)), torch.cat((x, y)), own.repeat(2, 2), torch.cat((y, x))),
        "clip_loss": lambda: (anchors(x, y, own, y) + anchors(y, x, own, x)) / 2,
    }
    torch.testing.assert_close(got, expected[loss]())
