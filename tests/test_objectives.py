"""Objectives against the formulas of their sources, evaluated naively in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcl_kernels import nt_xent, objectives
from tests.cases import OBJECTIVES

A = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
S = torch.tensor([[1.0, 0.3, -2.0], [0.0, -1.0, 1.5], [2.0, 2.5, 1.0], [-3.0, -2.0, -1.0]], dtype=torch.float64)
SCALE = torch.tensor(4.0, dtype=torch.float64)
N = torch.full((4,), 3.0, dtype=torch.float64)


def evaluate(objective: objectives.ObjectiveLike, a: Tensor = A, s: Tensor = S) -> Tensor:
    """Calls an objective as the losses do; a factor of the scale is a factor of the logits s."""
    needs = objectives.needs_of(objective)
    b = tuple((factor * s).logsumexp(1) for factor in needs.scales or (1.0,))
    mixed = (torch.ones(4, dtype=torch.bool),) if needs.mixes_anchors else ()
    return objective(a, b[0] if needs.scales is None else b, N, SCALE, *mixed)


def test_info_nce() -> None:
    expected = -(A.exp() / (A.exp() + S.exp().sum(1))).log()
    torch.testing.assert_close(evaluate(objectives.info_nce), expected)


def test_info_nce_keeps_fp64_digits_for_large_arguments() -> None:
    # softplus with a threshold returns b - a above 20 and loses exp(-21).
    a, b = torch.zeros(1, dtype=torch.float64), torch.tensor([21.0], dtype=torch.float64)
    assert float(objectives.info_nce(a, b, None, SCALE) - b) == pytest.approx(7.582560e-10, rel=1e-4)


def test_decoupled() -> None:
    expected = -(A.exp() / S.exp().sum(1)).log()
    torch.testing.assert_close(evaluate(objectives.decoupled), expected)


def test_decoupled_weighted() -> None:
    similarity = A / SCALE
    weight = 2 - 4 * (similarity / 0.5).exp() / (similarity / 0.5).exp().sum()
    torch.testing.assert_close(evaluate(objectives.decoupled_weighted()), S.logsumexp(1) - weight * A)


def test_decoupled_weighted_is_normalised_over_anchors_with_negatives() -> None:
    objective, kept = objectives.decoupled_weighted(), torch.tensor([True, False, True, True])
    b = S.logsumexp(1)
    got = objective(A, b, None, SCALE, kept)[kept]
    torch.testing.assert_close(got, objective(A[kept], b[kept], None, SCALE, torch.ones(3, dtype=torch.bool)))


def test_ifm() -> None:
    perturbed = (A - 0.1 * SCALE).exp(), (S + 0.1 * SCALE).exp().sum(1)
    adversarial = -(perturbed[0] / (perturbed[0] + perturbed[1])).log()
    expected = (evaluate(objectives.info_nce) + 2.0 * adversarial) / 3.0
    torch.testing.assert_close(evaluate(objectives.ifm(eps=0.1, alpha=2.0)), expected)


@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.5])
def test_debiased(tau_plus: float) -> None:
    # The public code: Ng = clamp((-tau_plus N pos + neg) / (1 - tau_plus), min=N e^(-1/t)).
    estimate = (-tau_plus * 3 * A.exp() + S.exp().sum(1)) / (1 - tau_plus)
    estimate = estimate.clamp(min=3 * (-SCALE).exp())
    expected = -(A.exp() / (A.exp() + estimate)).log()
    torch.testing.assert_close(evaluate(objectives.debiased(tau_plus)), expected)
    assert tau_plus == 0.0 or (estimate == 3 * (-SCALE).exp()).any(), "one anchor must reach the floor"


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_hard_negative(beta: float) -> None:
    # The public code: reweight_neg = sum(imp * neg) / mean(imp), imp = exp(beta log neg).
    importance = (beta * S).exp()
    reweighted = (importance * S.exp()).sum(1) / importance.mean(1)
    expected = -(A.exp() / (A.exp() + reweighted)).log()
    torch.testing.assert_close(evaluate(objectives.hard_negative(beta)), expected)
    if beta == 0.0:
        torch.testing.assert_close(evaluate(objectives.hard_negative(beta)), evaluate(objectives.info_nce))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients(objective: objectives.ObjectiveLike) -> None:
    a, s = A.clone().requires_grad_(), S.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, s: evaluate(objective, a, s), (a, s))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stays_in_logarithms(objective: objectives.ObjectiveLike) -> None:
    """b = 95 overflows exp in fp32, where a naive debiased loss is NaN."""
    a = torch.tensor([90.0, -90.0], requires_grad=True)
    b = torch.tensor([95.0, 95.0], requires_grad=True)
    scale, n = torch.tensor(100.0), torch.tensor([10.0, 10.0])
    needs = objectives.needs_of(objective)
    mixed = (torch.tensor([True, True]),) if needs.mixes_anchors else ()
    loss = objective(a, b if needs.scales is None else (b, b), n, scale, *mixed)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert b.grad is not None
    assert b.grad.isfinite().all()


def test_an_objective_is_any_function() -> None:
    """A margin takes one line and no change of a kernel."""
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    with_margin = nt_xent(x, y, objective=lambda a, b, n, scale: objectives.info_nce(a - 0.1 * scale, b))
    assert with_margin > nt_xent(x, y)


def test_the_count_is_given_to_objectives_that_request_it() -> None:
    seen = []

    def spy(a: Tensor, b: Tensor, n: Tensor | None, scale: Tensor) -> Tensor:
        seen.append(n)
        return b - a

    x, labels = torch.randn(4, 3), torch.tensor([0, 0, 0, 1])
    nt_xent(x, x, labels, objective=spy)
    spy.counts = True  # type: ignore[attr-defined]
    nt_xent(x, x, labels, objective=spy)
    assert seen[0] is None
    # Without a negative the objective receives 1, whose logarithm is finite.
    assert seen[1] is not None
    assert seen[1].tolist() == [4, 4, 4, 1] * 2


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tau_plus must be in \[0, 1\): got 1.0"):
        objectives.debiased(1.0)
