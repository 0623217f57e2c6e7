"""Normalisation by Triton kernels equals that by PyTorch operations, value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcl_kernels import normalize
from mcl_kernels.normalize import unit_views
from tests.conftest import DEVICES, unavailable_reason

DEVICE = DEVICES[-1]
pytestmark = pytest.mark.skipif(unavailable_reason("triton", DEVICE) is not None, reason="needs Triton")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make_view(n: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of many lengths: 0, one that holds NaN, and where the dtype has them norms that overflow when squared."""
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[seed] = 0
    x[seed + 2, 1] = torch.nan
    if dtype != torch.float16:
        x[4:6] *= 2.0**520 if dtype == torch.float64 else 2.0**90
        x[6] *= 2.0**-30
    return x.to(dtype).to(DEVICE)


def results(view_a: Tensor, view_b: Tensor | None, impl: str) -> list[Tensor]:
    """Rows, cosines and the gradients of the views."""
    leaves = [x.clone().requires_grad_() for x in (view_a, view_b) if x is not None]
    strided = [x.t().contiguous().t() if i else x for i, x in enumerate(leaves)]
    rows, cosine = unit_views(strided[0], strided[1] if view_b is not None else None, impl)
    weights = torch.linspace(-1, 2, rows.numel(), device=rows.device, dtype=rows.dtype).view_as(rows)
    loss = (rows * weights).sum() + (cosine * weights[: len(cosine), 0]).sum()
    return [rows, cosine, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# One part of the features and two, one row of a program and more.
@pytest.mark.parametrize(("n", "d"), [(23, 3), (23, 200), (9, 1030)])
@pytest.mark.parametrize("views", [1, 2])
def test_rows_cosines_and_gradients(views: int, n: int, d: int, dtype: torch.dtype) -> None:
    view_a, view_b = make_view(n, d, dtype, 0), make_view(n, d, dtype, 1) if views == 2 else None
    for got, expected in zip(results(view_a, view_b, "triton"), results(view_a, view_b, "reference"), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_a_row_that_holds_infinity_becomes_nan() -> None:
    x = torch.ones(3, 4, device=DEVICE)
    x[1, 2] = torch.inf
    rows, _ = unit_views(x, None, "triton")
    assert rows[1].isnan().all()
    assert rows[[0, 2]].isfinite().all()


def test_no_rows() -> None:
    x = torch.ones(0, 4, device=DEVICE)
    rows, cosine = unit_views(x, x, "triton")
    assert (rows.shape, cosine.shape) == ((0, 4), (0,))


def test_what_is_traced_and_mixed_dtypes_stay_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalize, "_triton_kernels", lambda: pytest.fail("a kernel was launched"))
    x, y = torch.randn(2, 6, 4, device=DEVICE)
    unit_views(x, y.double(), "triton")
    torch.func.vmap(lambda z: unit_views(z, None, "triton")[0])(x[None])


def test_second_derivatives() -> None:
    x, y = (torch.randn(3, 4, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda x, y: unit_views(x, y, "triton"), (x, y), fast_mode=True)
