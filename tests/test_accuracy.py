"""The assertion that all other tests rely on has to fail where it should."""

import pytest
import torch

from tests.accuracy import assert_accurate

EXACT = torch.linspace(-1, 1, 1001, dtype=torch.float64)
REFERENCE = EXACT.float()


def test_accepts_the_reference_itself() -> None:
    assert_accurate(REFERENCE, REFERENCE, EXACT)


def test_accepts_equal_infinities() -> None:
    exact = torch.tensor([-torch.inf, 1.0, torch.inf], dtype=torch.float64)
    assert_accurate(exact.float(), exact.float(), exact)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(REFERENCE + 1e-6 * (torch.arange(1001) == 500), id="one outlier"),
        pytest.param(REFERENCE * (1 + 1e-6), id="a scale"),
        pytest.param(REFERENCE + 3e-7, id="a bias below the elementwise bound"),
        pytest.param(REFERENCE.flip(0), id="another direction"),
        pytest.param(torch.where(torch.arange(1001) == 3, torch.nan, REFERENCE), id="a NaN"),
        pytest.param(torch.where(torch.arange(1001) == 3, torch.inf, REFERENCE), id="an infinity"),
        pytest.param(REFERENCE.double(), id="another dtype"),
        pytest.param(REFERENCE[:-1], id="another shape"),
    ],
)
def test_refuses(wrong: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_accurate(wrong, REFERENCE, EXACT)


def test_refuses_infinity_of_the_other_sign() -> None:
    exact = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="infinities"):
        assert_accurate(exact.float().abs(), exact.float(), exact)


def test_refuses_half_precision_logits() -> None:
    # A bf16 result computed with bf16 intermediates, 2 epsilons off everywhere, is outside of the bar.
    exact = torch.full((64,), 40.0, dtype=torch.float64)
    reference = exact.bfloat16()
    with pytest.raises(AssertionError):
        assert_accurate(reference * 1.05, reference, exact)
