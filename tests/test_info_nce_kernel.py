"""InfoNCE of each anchor by Triton kernels equals the objective's composition, value and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcl_kernels.losses.per_anchor import _anchor_losses
from mcl_kernels.normalize import compute_dtype, row_dot
from mcl_kernels.objectives import info_nce
from tests.conftest import DEVICES, unavailable_reason

DEVICE = DEVICES[-1]
pytestmark = pytest.mark.skipif(unavailable_reason("triton", DEVICE) is not None, reason="needs Triton")


def composed(product: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor | None = None) -> Tensor:
    logit = scale * product.repeat(len(row_lse) // max(len(product), 1))
    losses = [_anchor_losses(info_nce, logit, [b], None, scale) for b in (row_lse, column_lse) if b is not None]
    return losses[0] if column_lse is None else (losses[0] + losses[1]) / 2


def fused(*tensors: Tensor) -> Tensor:
    from mcl_kernels.losses.triton import info_nce as kernels

    return kernels.info_nce(*tensors)


def make_inputs(samples: int, views: int, sides: int, dtype: torch.dtype, *, scales: bool) -> list[Tensor]:
    """Products and LSE of losses from 1e-40 to 100, with anchors without negatives and numbers that are not finite."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    product = torch.linspace(-1, 1, samples, dtype=dtype, device=DEVICE)
    n = samples * views
    lse = [90 * torch.rand(n, dtype=dtype, device=DEVICE, generator=generator) - 45 for _ in range(sides)]
    for i, b in enumerate(lse):
        b[i::7] = -torch.inf
        b[3 + i], b[5] = torch.nan, torch.inf
    if samples > 20:
        product[14:16] = torch.tensor([torch.nan, torch.inf])
    scale = torch.linspace(1, 45, n, dtype=dtype, device=DEVICE) if scales else torch.tensor(45.0, dtype=dtype)
    return [product, scale.to(DEVICE), *lse]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scales", [False, True])
# One program and two; views share their products; both directions.
@pytest.mark.parametrize(("samples", "views", "sides"), [(300, 1, 1), (40, 2, 1), (40, 1, 2)])
def test_losses_and_gradients(samples: int, views: int, sides: int, scales: bool, dtype: torch.dtype) -> None:
    results = []
    for function in (fused, composed):
        inputs = [x.requires_grad_() for x in make_inputs(samples, views, sides, dtype, scales=scales)]
        loss = function(*inputs)
        weights = torch.linspace(-1, 2, len(loss), dtype=dtype, device=DEVICE)
        results.append([loss, *torch.autograd.grad(loss, inputs, weights)])
    for got, expected in zip(*results, strict=True):
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [5, 130, 1030])
@pytest.mark.parametrize("sides", [1, 2])
def test_products_of_rows(sides: int, d: int, dtype: torch.dtype) -> None:
    """Rows of any strides, with an anchor without negatives and, without one, a row that holds NaN."""
    from mcl_kernels.losses.triton.info_nce import info_nce_of_rows

    wide = compute_dtype(torch.empty(0, dtype=dtype))
    query, positive = torch.randn(2, 19, d, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE) / d**0.5
    query[4] = torch.nan
    lse = [x.to(wide).to(DEVICE) for x in 4 * torch.randn(sides, 19, generator=torch.Generator().manual_seed(1))]
    for b in lse:
        b[2] = -torch.inf
    scale = torch.linspace(1, 3, 19, dtype=wide, device=DEVICE)
    results = []
    for function in (
        lambda q, p, *rest: info_nce_of_rows(q, p, *rest),
        lambda q, p, *rest: composed(row_dot(q, p, wide), *rest),
    ):
        inputs = [x.clone().requires_grad_() for x in (query, positive, scale, *lse)]
        loss = function(inputs[0], inputs[1].t().contiguous().t(), *inputs[2:])
        results.append([loss, *torch.autograd.grad(loss, inputs, torch.linspace(-1, 2, 19, dtype=wide, device=DEVICE))])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, equal_nan=True)
        assert got[[0, 1, 3]].isfinite().all()


def test_an_expanded_gradient_and_no_rows() -> None:
    product, scale, lse = make_inputs(10, 1, 1, torch.float32, scales=False)
    lse = lse.nan_to_num(0, 0, -torch.inf)
    inputs = [x.requires_grad_() for x in (product, scale, lse)]
    with torch.no_grad():
        slope = torch.where(lse == -torch.inf, 0, torch.sigmoid(lse - scale * product))
        expected = [-slope * scale, (-slope * product).sum(), slope]
    for function in (fused, composed):
        for got, wanted in zip(torch.autograd.grad(function(*inputs).sum(), inputs), expected, strict=True):
            torch.testing.assert_close(got, wanted)
    assert fused(product[:0], scale, lse[:0]).shape == (0,)
