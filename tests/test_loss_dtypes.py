"""The losses in every dtype and under autocast; gradients of temperature and embeddings."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels import clip_loss, masked_info_nce, objectives
from tests.cases import OBJECTIVES
from tests.conftest import Backend, composed
from tests.loss_cases import LOSSES, pair


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(backend: Backend, loss: str, dtype: torch.dtype) -> None:
    """Inside autocast the value is that of the same inputs outside, in fp32, and gradients keep their dtype."""
    x, y = (z.requires_grad_() for z in pair(20))
    outside = LOSSES[loss](x, y, torch.arange(20) % 3, temperature=0.2, impl=backend.impl)
    assert outside > 0.05, "a loss near 0 would agree with anything"
    with torch.autocast(backend.device, dtype=dtype):
        inside = LOSSES[loss](x, y, torch.arange(20) % 3, temperature=0.2, impl=backend.impl)
        if backend.impl != "reference":  # its backward is PyTorch's, which has to be called outside of autocast
            inside.backward()
    if backend.impl == "reference":
        inside.backward()
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, torch.autograd.grad(outside, x)[0])


def test_the_positive_is_computed_from_the_rounded_rows(backend: Backend) -> None:
    """With a copy of key 0 as an extra key, the logit of the copy equals the positive logit."""
    x, y = (z.bfloat16() for z in pair(1, 64))
    got = masked_info_nce(x, torch.cat((y, y)), temperature=0.01, objective=objectives.decoupled, impl=backend.impl)
    torch.testing.assert_close(got, torch.tensor(0.0), rtol=0, atol=2e-5)


@composed
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_temperature_gradient(backend: Backend, loss: str, objective: objectives.ObjectiveLike) -> None:
    """Gradients are exact for every objective, with a lonely anchor, for one temperature and for one per anchor."""
    x, y = pair(10, dtype=torch.float64)
    labels = torch.arange(10) % 2
    labels[3] = 5
    n = {"nt_xent": 20, "masked_info_nce": 10}.get(loss)
    options = {"objective": objective, "reduction": "none", "impl": backend.impl}

    def function(temperature: Tensor) -> Tensor:
        return LOSSES[loss](x, y, labels, temperature=temperature, **options)

    temperatures = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True)]
    if n is not None:
        temperatures.append(torch.linspace(0.1, 0.8, n, dtype=torch.float64).requires_grad_())
    for temperature in temperatures:
        assert torch.autograd.gradcheck(function, (temperature,))


@composed
@pytest.mark.parametrize("n", [1, 2, 12])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_temperature_of_shape_1_is_a_scalar(backend: Backend, loss: str, n: int) -> None:
    """FSDP2 and open_clip's nonscalar_logit_scale use this shape. With a single row it could also be a vector."""
    x, y = (view.requires_grad_() for view in pair(n))
    results = []
    for shape in ((), (1,)):
        temperature = torch.nn.Parameter(torch.full(shape, 0.3))
        value = LOSSES[loss](x, y, torch.arange(n) % 2, temperature=temperature, impl=backend.impl)
        results.append((value, *torch.autograd.grad(value, (temperature, x))))
        assert results[-1][1].shape == shape
    (value, grad, grad_x), (value_1, grad_1, grad_x_1) = results
    assert torch.equal(value, value_1)
    assert torch.equal(grad, grad_1.squeeze())
    assert torch.equal(grad_x, grad_x_1)


@composed
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_embedding_gradient_with_a_lonely_anchor(
    backend: Backend, loss: str, objective: objectives.ObjectiveLike
) -> None:
    x, y = (z.requires_grad_() for z in pair(5, 3, dtype=torch.float64))
    labels = torch.tensor([0, 0, 4, 0, 0])
    options = {"objective": objective, "reduction": "none", "impl": backend.impl}
    function = functools.partial(LOSSES[loss], labels=labels, **options)
    assert torch.autograd.gradcheck(function, (x, y))


@composed
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_clip_is_both_directions_with_labels_of_their_own(
    backend: Backend, objective: objectives.ObjectiveLike
) -> None:
    """Captions have other labels, so that the counts and sums of the two directions differ."""
    x, y = pair(12, dtype=torch.float64)
    labels, text_labels = torch.arange(12) % 2, torch.arange(12) % 3
    options = {"objective": objective, "normalize": True, "reduction": "none", "impl": backend.impl}
    both = clip_loss(x, y, labels, text_labels=text_labels, logit_scale=5.0, **options)
    image = masked_info_nce(x, y, labels, text_labels, temperature=0.2, **options)
    text = masked_info_nce(y, x, text_labels, labels, temperature=0.2, **options)
    torch.testing.assert_close(both, (image + text) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queue", [False, True])
def test_half_precision_rows_are_normalised_wide_and_rounded_once(
    backend: Backend, dtype: torch.dtype, queue: bool
) -> None:
    """The value is that of the rounded unit rows, computed in fp64: positive and negatives from the same rows."""
    x, y = (300 * z for z in pair(20, 64))  # squares overflow fp16
    x, y = x.to(dtype), y.to(dtype)
    unit = [F.normalize(z.double()).to(dtype).double() for z in (x, y)]
    positive = y if queue else None
    got = masked_info_nce(x, y, positive=positive, temperature=0.1, reduction="none", impl=backend.impl)
    logits = unit[0] @ unit[1].T / 0.1
    if queue:
        logits = torch.cat((logits.diagonal().unsqueeze(1), logits), dim=1)
        expected = F.cross_entropy(logits, torch.zeros(20, dtype=torch.long), reduction="none")
    else:
        expected = F.cross_entropy(logits, torch.arange(20), reduction="none")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_an_fp64_positive_gives_an_fp64_loss(backend: Backend) -> None:
    x, y = pair(6)
    assert masked_info_nce(x, y, positive=y.double(), impl=backend.impl).dtype == torch.float64
