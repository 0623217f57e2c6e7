"""positive_ranks against a double loop, and its conventions for ties, NaN and overflow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcl_kernels import masked_info_nce, positive_ranks
from tests import oracles
from tests.conftest import Backend


@pytest.mark.parametrize("negatives", ["same", "different", "all"])
@pytest.mark.parametrize("queue", [False, True])
def test_against_a_double_loop(backend: Backend, negatives: str, queue: bool) -> None:
    torch.manual_seed(0)
    # More keys than a tile, few enough for a loop.
    query, key = (torch.randn(n, 6, dtype=torch.float64) for n in (20, 300))
    positive = query + torch.randn(20, 6) if queue else None
    labels, key_labels = torch.arange(20) % 4 - 1, torch.arange(300) % 4 - 1
    got = positive_ranks(
        query, key, labels, key_labels, positive=positive, negatives=negatives, normalize=False, impl=backend.impl
    )
    own = key[:20] if positive is None else positive
    ids = None if queue else torch.arange(300)
    expected = []
    for i in range(20):
        kept = oracles.negatives_of(i, 300, labels, key_labels, ids, ids, negatives)
        expected.append(sum(float(query[i] @ key[j]) > float(query[i] @ own[i]) for j in kept))
    assert got.dtype == torch.int64
    assert got.tolist() == expected
    assert len(set(expected)) > 5


def test_rank_0_is_the_argmax_of_the_logits(backend: Backend) -> None:
    x = torch.randn(50, 8)
    y = x + 0.8 * torch.randn(50, 8)
    logits = F.normalize(x) @ F.normalize(y).T
    correct = logits.argmax(1) == torch.arange(50)
    assert torch.equal(positive_ranks(x, y, impl=backend.impl) == 0, correct)
    assert 0 < correct.sum() < 50


def test_ranks_have_no_gradient_and_take_half_precision(backend: Backend) -> None:
    x = torch.randn(9, 8, requires_grad=True)
    assert not positive_ranks(x, x, impl=backend.impl).requires_grad
    assert positive_ranks(x.bfloat16(), x, impl=backend.impl).tolist() == [0] * 9


@pytest.mark.parametrize("d", [3, 100, 1000])
def test_ties_do_not_count(backend: Backend, d: int) -> None:
    """Keys equal to the positive, in a collapsed model or as a copy of it, are not nearer than the positive."""
    collapsed = torch.randn(1, d).expand(64, d)
    assert positive_ranks(collapsed, collapsed, impl=backend.impl).tolist() == [0] * 64
    x = torch.randn(64, d)
    y = x + 0.1 * torch.randn(64, d)
    once = positive_ranks(x, y, impl=backend.impl)
    assert torch.equal(positive_ranks(x, torch.cat((y, y[:1])), impl=backend.impl)[:1], once[:1])


def test_a_diverged_model_is_not_perfect(backend: Backend) -> None:
    x = torch.full((6, 4), torch.nan)
    assert positive_ranks(x, x, impl=backend.impl).tolist() == [5] * 6
    assert masked_info_nce(x, x, impl=backend.impl).isnan()


def test_unfilled_slots_do_not_count(backend: Backend) -> None:
    x, queue = torch.randn(6, 4), torch.full((10, 4), torch.nan)
    labels, queue_labels = torch.zeros(6, dtype=torch.long), torch.full((10,), -1)
    assert positive_ranks(x, queue, labels, queue_labels, positive=x, impl=backend.impl).tolist() == [0] * 6


def test_scores_that_overflow_never_look_perfect(backend: Backend) -> None:
    x = 1e25 * torch.randn(6, 8)
    assert positive_ranks(x, x, normalize=False, impl=backend.impl).tolist() == [5] * 6
    assert positive_ranks(x, x, impl=backend.impl).tolist() == [0] * 6
