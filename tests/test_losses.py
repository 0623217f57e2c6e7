"""The losses against independent formulas, and every edge case of their contract."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels import ClipLoss, MaskedInfoNCE, NTXentLoss, clip_loss, masked_info_nce, nt_xent, objectives
from tests import oracles
from tests.accuracy import assert_accurate
from tests.cases import OBJECTIVES
from tests.conftest import Backend, is_slow

LOSSES: dict[str, Callable[..., Tensor]] = {
    "masked_info_nce": lambda x, y, labels=None, **options: masked_info_nce(x, y, labels, **options),
    "nt_xent": lambda x, y, labels=None, **options: nt_xent(x, y, labels, **options),
    "clip_loss": lambda x, y, labels=None, **options: clip_loss(
        x, y, labels, logit_scale=1 / options.pop("temperature", 0.5), **{"normalize": True, **options}
    ),
}


def pair(n: int, d: int = 16, seed: int = 0, **options) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Two views of the same n samples, the same on every device."""
    x, noise = torch.randn(2, n, d, generator=torch.Generator("cpu").manual_seed(seed), device="cpu", **options)
    x, noise = (z.to(torch.get_default_device()) for z in (x, noise))
    return x, x + 0.5 * noise


# --- equal to other people's losses ---------------------------------------------------------------------------


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
    """Its `indices_tuple` says exactly who is whose positive and negative, so it can express MCL."""
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


# --- equal to a double loop -----------------------------------------------------------------------------------


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
    who = [oracles.negatives_of(i, 19, labels, key_labels, ids, ids, negatives) for i in range(15)]
    expected = oracles.info_nce_double_loop(x, y, key, 1 / temperature, who)
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
        who = [oracles.negatives_of(i, 20, labels, queue_labels, *pairs) for i in range(9)]
        expected = oracles.info_nce_double_loop(x, y, queue, torch.tensor(1 / 0.3), who)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_nt_xent_by_hand(backend: Backend) -> None:
    x, y = (F.normalize(z) for z in pair(8, 5, dtype=torch.float64))
    labels, ids = torch.tensor([0, 0, 0, 1, 1, 2, -1, 0]), torch.tensor([0, 1, 0, 2, 3, 4, 5, 6])
    temperature = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    got = nt_xent(x, y, labels, ids=ids, temperature=temperature, reduction="none", impl=backend.impl)
    z, both, sample = torch.cat((x, y)), labels.repeat(2), ids.repeat(2)
    who = [oracles.negatives_of(i, 16, both, both, sample, sample) for i in range(16)]
    expected = oracles.info_nce_double_loop(z, torch.cat((y, x)), z, 1 / temperature, who)
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
    of_image = [oracles.negatives_of(i, 8, labels, text_labels, ids, ids) for i in range(8)]
    of_text = [oracles.negatives_of(i, 8, text_labels, labels, ids, ids) for i in range(8)]
    image = oracles.info_nce_double_loop(x, y, y, scale, of_image)
    text = oracles.info_nce_double_loop(y, x, x, scale, of_text)
    expected = (torch.tensor(image) + torch.tensor(text)).double() / 2
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# --- defaults -------------------------------------------------------------------------------------------------


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
    """exp of the LSE over the same cluster and over the different ones add up to that over all."""
    x, y = pair(20, dtype=torch.float64)
    labels = torch.arange(20) % 3
    terms = {
        negatives: LOSSES[loss](
            x, y, labels, negatives=negatives, objective=objectives.decoupled, reduction="none", normalize=True,
            temperature=0.5, impl=backend.impl,
        )
        for negatives in ("same", "different", "all")
    }  # fmt: skip
    if loss != "clip_loss":  # whose result is the mean of two directions
        torch.testing.assert_close(torch.logaddexp(terms["same"], terms["different"]), terms["all"])
    plain = LOSSES[loss](x, y, objective=objectives.decoupled, reduction="none", temperature=0.5, impl=backend.impl)
    torch.testing.assert_close(terms["all"], plain)


# --- reductions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(backend: Backend, loss: str) -> None:
    x, y = pair(10)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, -1, -1, 0])
    each = LOSSES[loss](x, y, labels, reduction="none", impl=backend.impl)
    assert each.shape == (20 if loss == "nt_xent" else 10,)
    torch.testing.assert_close(LOSSES[loss](x, y, labels, reduction="sum", impl=backend.impl), each.sum())
    torch.testing.assert_close(LOSSES[loss](x, y, labels, reduction="mean", impl=backend.impl), each.sum() / len(each))


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


# --- anchors without negatives --------------------------------------------------------------------------------


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
        assert (leaf.grad[torch.arange(12) != 4] != 0).any(dim=1).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_lonely_anchors_leave_the_others_alone(backend: Backend, loss: str) -> None:
    x, y = pair(12)
    labels = torch.arange(12) % 2
    labels[4] = 9
    others = torch.arange(12) != 4
    each = LOSSES[loss](x, y, labels, reduction="none", impl=backend.impl)
    alone = LOSSES[loss](x[others], y[others], labels[others], reduction="none", impl=backend.impl)
    torch.testing.assert_close(each.view(-1, 12)[:, others].flatten(), alone)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_cluster_is_the_plain_loss(backend: Backend, loss: str, objective: objectives.ObjectiveLike) -> None:
    x, y = pair(12)
    one = torch.full((12,), 10**15)
    assert torch.equal(
        LOSSES[loss](x, y, one, objective=objective, impl=backend.impl),
        LOSSES[loss](x, y, objective=objective, impl=backend.impl),
    )


# --- numbers that are not nice --------------------------------------------------------------------------------


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
    """Unit rows in fp64, of rows of any length, and their norms [N, 1] in two factors."""
    largest = x.double().abs().amax(1, keepdim=True)
    scaled = x.double() / largest
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / norm, largest, norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_any_length_under_normalize(backend: Backend, loss: str, dtype: torch.dtype) -> None:
    """The value is that of the unit rows, and the gradient is in proportion, where their squares overflow."""
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
    for z, of_unit, (unit, *norm) in zip((x, y), units, exact, strict=True):
        assert z.grad is not None
        assert of_unit.grad is not None
        projected = of_unit.grad - unit * (unit * of_unit.grad).sum(1, keepdim=True)
        # Times the norm; what is smallest of its dtype is a larger part of it where the row is long.
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * norm[0] * norm[1]
        error = (z.grad.double() * norm[0] * norm[1] - projected).abs()
        allowed = tolerance * of_unit.grad.abs().amax() + smallest
        assert (error <= allowed)[unit.any(1)].all()
    assert (x.grad[6] == 0).all()  # type: ignore[index]


def test_a_norm_that_overflows_as_it_was_found(backend: Backend) -> None:
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


@pytest.mark.parametrize("layout", ["rows", "sliced rows", "every other column"])
@pytest.mark.parametrize("d", [3, 16, 17, 200])
@pytest.mark.parametrize("loss", LOSSES)
def test_normalisation(backend: Backend, loss: str, d: int, layout: str) -> None:
    """Rows from short to long, one without a direction, of any strides."""
    n = 150  # more numbers than one thread takes
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
    """In both modes, of second order and under torch.func, since it has a derivative of its own."""
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


# --- dtypes and autocast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(backend: Backend, loss: str, dtype: torch.dtype) -> None:
    """Inside autocast the value is that of the same inputs outside, in fp32, and gradients keep their dtype."""
    x, y = (z.requires_grad_() for z in pair(20))
    outside = LOSSES[loss](x, y, torch.arange(20) % 3, temperature=0.2, impl=backend.impl)
    assert outside > 0.05, "a loss near 0 would agree with anything"
    with torch.autocast(backend.device, dtype=dtype):
        inside = LOSSES[loss](x, y, torch.arange(20) % 3, temperature=0.2, impl=backend.impl)
        if backend.impl != "reference":  # whose backward is PyTorch's, which has to be called outside of autocast
            inside.backward()
    if backend.impl == "reference":
        inside.backward()
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, torch.autograd.grad(outside, x)[0])


def test_the_positive_is_computed_from_the_rounded_rows(backend: Backend) -> None:
    """a and s agree: with key 0 also an extra key, that key's logit is the positive's."""
    x, y = (z.bfloat16() for z in pair(1, 64))
    got = masked_info_nce(x, torch.cat((y, y)), temperature=0.01, objective=objectives.decoupled, impl=backend.impl)
    torch.testing.assert_close(got, torch.tensor(0.0), rtol=0, atol=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_temperature_gradient(backend: Backend, loss: str, objective: objectives.ObjectiveLike) -> None:
    """Exact for every objective, with a lonely anchor among the others, for one temperature and one per anchor."""
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
        assert torch.autograd.gradcheck(function, (temperature,), fast_mode=is_slow(backend))


@pytest.mark.parametrize("n", [1, 2, 12])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_temperature_of_shape_1_is_one_number(backend: Backend, loss: str, n: int) -> None:
    """As FSDP2 and open_clip's nonscalar_logit_scale have it; of one row, too, where it might be a vector."""
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


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_embedding_gradient_beside_a_lonely_anchor(
    backend: Backend, loss: str, objective: objectives.ObjectiveLike
) -> None:
    x, y = (z.requires_grad_() for z in pair(5, 3, dtype=torch.float64))
    labels = torch.tensor([0, 0, 4, 0, 0])
    options = {"objective": objective, "reduction": "none", "impl": backend.impl}
    function = functools.partial(LOSSES[loss], labels=labels, **options)
    assert torch.autograd.gradcheck(function, (x, y), fast_mode=is_slow(backend))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_clip_is_both_directions_with_labels_of_their_own(
    backend: Backend, objective: objectives.ObjectiveLike
) -> None:
    """Other labels for the captions: the counts and sums of the two directions differ."""
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
    x, y = (300 * z for z in pair(20, 64))  # whose squares overflow fp16
    x, y = x.to(dtype), y.to(dtype)
    unit = [F.normalize(z.double()).to(dtype).double() for z in (x, y)]
    who = (
        {"positive": y, "temperature": 0.1, "impl": backend.impl}
        if queue
        else {"temperature": 0.1, "impl": backend.impl}
    )
    got = masked_info_nce(x, y, reduction="none", **who)
    logits = unit[0] @ unit[1].T / 0.1
    if queue:
        logits = torch.cat((logits.diagonal().unsqueeze(1), logits), dim=1)
        expected = F.cross_entropy(logits, torch.zeros(20, dtype=torch.long), reduction="none")
    else:
        expected = F.cross_entropy(logits, torch.arange(20), reduction="none")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_wide_positive_widens_the_loss(backend: Backend) -> None:
    x, y = pair(6)
    assert masked_info_nce(x, y, positive=y.double(), impl=backend.impl).dtype == torch.float64


# --- Modules --------------------------------------------------------------------------------------------------


def test_modules_are_the_functions(backend: Backend) -> None:
    x, y = pair(12)
    labels, queue = torch.arange(12) % 3, pair(20, seed=2)[0]
    options = {"objective": objectives.ifm(), "reduction": "sum", "impl": backend.impl}
    assert torch.equal(NTXentLoss(0.2, **options)(x, y, labels), nt_xent(x, y, labels, temperature=0.2, **options))
    assert torch.equal(
        MaskedInfoNCE(0.2, **options)(x, queue, labels, torch.arange(20) % 3, positive=y),
        masked_info_nce(x, queue, labels, torch.arange(20) % 3, positive=y, temperature=0.2, **options),
    )
    assert torch.equal(
        ClipLoss(**options)(x, y, torch.tensor(3.0), labels), clip_loss(x, y, labels, logit_scale=3.0, **options)
    )


def test_modules_learn_a_temperature() -> None:
    temperature = torch.nn.Parameter(torch.tensor(0.5))
    module = NTXentLoss(temperature, objective=objectives.hard_negative(0.5))
    module(*pair(6)).backward()
    assert dict(module.named_parameters())["temperature"] is temperature
    assert temperature.grad is not None


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (MaskedInfoNCE(), "MaskedInfoNCE(temperature=0.07)"),
        (NTXentLoss(0.2, normalize=True, impl="auto"), "NTXentLoss(temperature=0.2)"),
        (NTXentLoss(torch.tensor(0.25)), "NTXentLoss(temperature=0.25)"),
        (NTXentLoss(torch.nn.Parameter(torch.tensor([0.25]))), "NTXentLoss(temperature=0.25 (learned))"),
        (NTXentLoss(torch.nn.Parameter(torch.ones(6))), "NTXentLoss(temperature=tensor [6] (learned))"),
        (NTXentLoss(torch.ones((), device="meta")), "NTXentLoss(temperature=tensor [])"),
        (ClipLoss(), "ClipLoss()"),
        (ClipLoss(normalize=True, reduction="sum"), "ClipLoss(normalize=True, reduction=sum)"),
        (MaskedInfoNCE(objective=objectives.decoupled), "MaskedInfoNCE(temperature=0.07, objective=decoupled)"),
        (ClipLoss(objective=objectives.ifm()), "ClipLoss(objective=ifm(eps=0.1, alpha=1.0))"),
    ],
)  # fmt: skip
def test_modules_print_their_temperature_and_what_differs_from_the_defaults(
    module: torch.nn.Module, expected: str
) -> None:
    assert repr(module) == expected
    assert repr(copy.deepcopy(module)) == expected


@pytest.mark.parametrize("module", [MaskedInfoNCE, NTXentLoss, ClipLoss])
def test_modules_list_the_options_of_their_function(module: type[torch.nn.Module]) -> None:
    """With equal defaults; what is not an option is a tensor, which `forward` takes."""
    function = {MaskedInfoNCE: masked_info_nce, NTXentLoss: nt_xent, ClipLoss: clip_loss}[module]
    of_function = dict(inspect.signature(function).parameters)
    of_module = inspect.signature(module).parameters
    of_forward = inspect.signature(module.forward).parameters
    assert of_module.keys() | of_forward.keys() == of_function.keys() | {"self"}
    for name, parameter in of_module.items():
        assert parameter.default == of_function[name].default
        assert parameter.annotation == of_function[name].annotation
