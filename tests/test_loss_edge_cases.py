"""The losses without negatives, and for rows and logits at the ends of their ranges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels import clip_loss, masked_info_nce, nt_xent, objectives
from tests import oracles
from tests.accuracy import assert_accurate
from tests.cases import OBJECTIVES
from tests.conftest import Backend, composed
from tests.loss_cases import LOSSES, pair


@composed
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_sample_its_own_cluster(backend: Backend, loss: str, objective: objectives.ObjectiveLike) -> None:
    x, y = (z.requires_grad_() for z in pair(12))
    temperature = torch.tensor(0.5, requires_grad=True)
    value = LOSSES[loss](x, y, torch.arange(12), temperature=temperature, objective=objective, impl=backend.impl)
    value.backward()
    assert value == 0
    for leaf in (x, y, temperature):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@composed
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("label", [7, -1])
def test_one_lonely_anchor(backend: Backend, loss: str, objective: objectives.ObjectiveLike, label: int) -> None:
    x, y = (z.requires_grad_() for z in pair(12))
    labels = torch.arange(12) % 2
    labels[4] = label
    each = LOSSES[loss](x, y, labels, reduction="none", objective=objective, impl=backend.impl)
    each.sum().backward()
    assert each[4] == 0
    assert each.isfinite().all()
    for leaf in (x, y):
        assert leaf.grad is not None
        assert (leaf.grad[4] == 0).all()
        others = leaf.grad[torch.arange(12) != 4]
        assert (others != 0).any(dim=1).all(), "OBJECTIVES need settings whose gradient is not 0 for these anchors"


@pytest.mark.parametrize("loss", LOSSES)
def test_lonely_anchors_leave_the_others_alone(backend: Backend, loss: str) -> None:
    x, y = pair(12)
    labels = torch.arange(12) % 2
    labels[4] = 9
    others = torch.arange(12) != 4
    each = LOSSES[loss](x, y, labels, reduction="none", impl=backend.impl)
    alone = LOSSES[loss](x[others], y[others], labels[others], reduction="none", impl=backend.impl)
    torch.testing.assert_close(each.view(-1, 12)[:, others].flatten(), alone)


@composed
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_cluster_is_the_plain_loss(backend: Backend, loss: str, objective: objectives.ObjectiveLike) -> None:
    x, y = pair(12)
    one = torch.full((12,), 10**15)
    assert torch.equal(
        LOSSES[loss](x, y, one, objective=objective, impl=backend.impl),
        LOSSES[loss](x, y, objective=objective, impl=backend.impl),
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("lonely", [True, False])
def test_bad_embeddings_never_give_a_finite_loss(
    backend: Backend, loss: str, value: float, normalize: bool, lonely: bool
) -> None:
    x, y = pair(12)
    x[4, 2] = value
    labels = torch.arange(12) if lonely else torch.arange(12) % 2
    assert not LOSSES[loss](x, y, labels, normalize=normalize, impl=backend.impl).isfinite()


@composed
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_zero_rows_under_normalize(backend: Backend, loss: str, dtype: torch.dtype) -> None:
    x, y = pair(12)
    x[3] = 0.0
    x, y = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
    value = LOSSES[loss](x, y, torch.arange(12) % 2, impl=backend.impl)
    value.backward()
    assert value.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert value.dtype == torch.float32
    assert x.grad.dtype == dtype


def unit_and_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows in fp64 of rows of any length, and their norms, [N, 1], as two factors."""
    largest = x.double().abs().amax(1, keepdim=True)
    scaled = x.double() / largest
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / norm, largest, norm


@composed
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_any_length_under_normalize(backend: Backend, loss: str, dtype: torch.dtype) -> None:
    """If squares overflow, the value is still that of the unit rows, and gradients are divided by the norms."""
    n, d, largest = 12, 16, torch.finfo(dtype).max
    length = torch.tensor([largest, largest**0.5, largest**0.75, 1.0, 1e-3, largest, 7.0], dtype=torch.float64)
    rows = [z.double() / z.abs().amax(1, keepdim=True) for z in pair(n, d)]
    x, y = (z * length[torch.arange(i, i + n) % len(length)].unsqueeze(1) for i, z in enumerate(rows))
    x[6] = 1e-13 / d  # without a direction
    x, y = (z.to(dtype).requires_grad_() for z in (x, y))
    assert x.isfinite().all()
    assert y.isfinite().all()
    value = LOSSES[loss](x, y, torch.arange(n) % 2, impl=backend.impl)
    value.backward()

    exact = [unit_and_norm(z.detach()) for z in (x, y)]
    exact[0][0][6] = 0.0
    units = [unit.to(dtype).double().requires_grad_() for unit, *_ in exact]
    expected = LOSSES[loss](*units, torch.arange(n) % 2, normalize=False, impl="reference")
    expected.backward()
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(value.double(), expected.detach(), rtol=min(tolerance, 1e-4), atol=0.0)
    for z, unit_leaf, (unit, *norm) in zip((x, y), units, exact, strict=True):
        assert z.grad is not None
        assert unit_leaf.grad is not None
        projected = unit_leaf.grad - unit * (unit * unit_leaf.grad).sum(1, keepdim=True)
        # Gradients are multiplied by the norm, and so is the smallest element of the dtype, to which they are rounded.
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * norm[0] * norm[1]
        error = (z.grad.double() * norm[0] * norm[1] - projected).abs()
        allowed = tolerance * unit_leaf.grad.abs().amax() + smallest
        assert (error <= allowed)[unit.any(1)].all()
    assert (x.grad[6] == 0).all()  # type: ignore[index]


def test_a_loss_of_rows_whose_norm_overflows(backend: Backend) -> None:
    x = torch.randn(8, 4, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = (x * 1e25).to(torch.get_default_device())
    torch.testing.assert_close(nt_xent(x, x.flip(1), impl=backend.impl), torch.tensor(2.88137))


@pytest.mark.parametrize("loss", LOSSES)
def test_products_that_overflow_never_give_a_finite_loss(backend: Backend, loss: str) -> None:
    x, y = (1e25 * z for z in pair(12))
    options = {"normalize": False, "impl": backend.impl}
    assert not LOSSES[loss](x, y, torch.arange(12) % 2, **options).isfinite()


def test_logit_scale_100_in_bfloat16(backend: Backend) -> None:
    x, y = (F.normalize(z).bfloat16() for z in pair(64, 32))
    scale = torch.tensor(100.0, requires_grad=True)
    got = clip_loss(x, y, logit_scale=scale, impl=backend.impl)
    expected = oracles.clip_cross_entropy(x.double(), y.double(), torch.tensor(100.0).double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@composed
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exponentials_beyond_fp32(backend: Backend, objective: objectives.ObjectiveLike) -> None:
    x, y = (z.requires_grad_() for z in pair(12))
    value = nt_xent(x, y, torch.arange(12) % 2, temperature=1e-3, objective=objective, impl=backend.impl)
    value.backward()
    assert value.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_duplicates_are_negatives_unless_they_share_an_id(backend: Backend) -> None:
    x, y = pair(6)
    twice, labels = [torch.cat((z, z)) for z in (x, y)], torch.arange(12) % 3
    ids = torch.arange(6).repeat(2)
    plain = nt_xent(x, y, labels[:6], impl=backend.impl)
    assert nt_xent(*twice, labels, impl=backend.impl) > plain
    # Each copy of a negative counts, as two keys do; a sample's own copies do not.
    shared = nt_xent(*twice, labels, ids=ids, objective=objectives.decoupled, impl=backend.impl)
    decoupled = nt_xent(x, y, labels[:6], objective=objectives.decoupled, impl=backend.impl)
    torch.testing.assert_close(shared, decoupled + torch.log(torch.tensor(2.0)))


@composed
@pytest.mark.parametrize("layout", ["rows", "sliced rows", "every other column"])
@pytest.mark.parametrize("d", [3, 16, 17, 200])
@pytest.mark.parametrize("loss", LOSSES)
def test_normalisation(backend: Backend, loss: str, d: int, layout: str) -> None:
    """Rows from short to long, one without a direction, of any strides."""
    n = 150  # more elements than one thread takes
    views = {
        "rows": pair(n, d),
        "sliced rows": [z[::2, 1 : d + 1] for z in pair(2 * n, d + 3)],
        "every other column": [z[:, ::2] for z in pair(n, 2 * d)],
    }[layout]
    views[0][4] = 0
    labels = torch.arange(n) % 3

    def run(impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x, y = leaves = [z.to(dtype).requires_grad_() for z in views]
        value = LOSSES[loss](x, y, labels, temperature=0.2, reduction="none", impl=impl)
        weight = torch.linspace(-1, 2, len(value), dtype=value.dtype)
        return {"loss": value.detach(), **dict(zip("xy", torch.autograd.grad(weight @ value, leaves), strict=True))}

    got, reference = run(backend.impl, torch.float32), run("reference", torch.float32)
    exact = run("reference", torch.float64)
    for name, value in exact.items():
        assert_accurate(got[name], reference[name], value, name)


def test_one_view_alone_has_a_gradient(backend: Backend) -> None:
    x, y = pair(40)
    both = torch.autograd.grad(nt_xent(x.requires_grad_(), y.requires_grad_(), impl=backend.impl), (x, y))
    alone = torch.autograd.grad(nt_xent(x, y.detach(), impl=backend.impl), x)
    torch.testing.assert_close(alone[0], both[0])
    recorded = torch.autograd.grad(nt_xent(x, y, impl=backend.impl), (x, y), create_graph=True)
    torch.testing.assert_close(recorded, both)


def test_derivatives_through_the_normalisation() -> None:
    """The normalisation defines its own derivative: both modes, second order and torch.func are tested."""
    x, y, tangent = torch.randn(3, 6, 4, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return nt_xent(x, y, impl="reference")

    derivative = torch.func.jvp(loss, (x,), (tangent,))[1]
    torch.testing.assert_close(derivative, (torch.func.grad(loss)(x) * tangent).sum())
    x.requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (x,))
    assert torch.func.hessian(loss)(x.detach()).isfinite().all()


def test_derivatives_of_rows_whose_norm_overflows() -> None:
    """The loss of c x is that of x, so each derivative is divided by c once."""
    x, y, tangent = torch.randn(3, 6, 4, dtype=torch.float64)
    c = 2.0**700

    def loss(x: Tensor) -> Tensor:
        return nt_xent(x, y, impl="reference")

    def derivatives(x: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
        return (
            *torch.func.jvp(loss, (x,), (tangent,)),
            *torch.func.jvp(torch.func.grad(loss), (x,), (tangent,)),
            torch.func.vmap(torch.func.grad(loss))(torch.stack((x, x)))[1],
        )

    value, derivative, gradient, moved, mapped = derivatives(x, tangent)
    got = derivatives(c * x, c * tangent)
    torch.testing.assert_close(got[:2], (value, derivative))
    torch.testing.assert_close(tuple(c * z for z in got[2:]), (gradient, moved, mapped))


@pytest.mark.parametrize("loss", [nt_xent, masked_info_nce, partial(clip_loss, logit_scale=5.0)])
def test_rows_without_values_have_a_loss_without_a_value(loss: Callable[..., Tensor]) -> None:
    """Rows on the meta device, as libraries use them to infer shapes."""
    a, b = torch.empty(2, 6, 3, device="meta")
    assert loss(a, b).device.type == "meta"
    assert loss(a, b, torch.zeros(6, dtype=torch.int64, device="meta"), reduction="none").device.type == "meta"
