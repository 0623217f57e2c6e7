"""Operators and Triton launches of a step stay few; they do not depend on the number of rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.knobs", reason="counts launches of Triton")

from benchmarks.gpu.launch_count import Case, count, make_cases

CASES = make_cases(16)
MAX_OPERATORS = {"nt_xent": 5, "clip_loss": 8, "masked_info_nce, queue": 5}
MAX_TOTAL = {"nt_xent": 20, "clip_loss": 28, "masked_info_nce, queue": 24}  # operators and launches


def label_of(case: Case) -> str:
    return case.name + (", labels" if any(not x.is_floating_point() for x in case.arguments) else "")


@pytest.mark.parametrize("case", CASES, ids=label_of)
def test_operators_and_launches(case: Case) -> None:
    operators, launches = count(case.step(case.ours))
    assert 0 < operators.total() <= MAX_OPERATORS[case.name], operators
    assert 0 < launches.total() <= MAX_TOTAL[case.name] - operators.total(), launches


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: label_of(CASES[i]))
def test_the_number_does_not_depend_on_the_rows(i: int) -> None:
    few, many = (count(case.step(case.ours)) for case in (CASES[i], make_cases(2048)[i]))
    assert few == many


def test_nt_xent_has_about_half_of_those_of_plain_pytorch() -> None:
    for case in (x for x in CASES if x.name == "nt_xent"):
        (operators, launches), (eager, none) = count(case.step(case.ours)), count(case.step(case.eager))
        assert not none
        assert operators.total() + launches.total() <= 0.55 * eager.total()


def test_operators_that_start_no_kernel_are_not_counted() -> None:
    x = torch.ones(3, 4)
    operators, launches = count(lambda: x.t().unsqueeze(0).detach().expand(2, 4, 3)[0].new_empty(0) + torch.ones(()))
    assert (dict(operators), dict(launches)) == ({"ones.default": 1}, {})
