"""`supcon_loss` against the formulas of other libraries and a double loop; edge cases, precision and memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels import nt_xent, supcon_loss
from mcl_kernels.losses.group_means import Groups, _operator, mean_of_others
from tests import oracles
from tests.accuracy import assert_accurate, relative_error
from tests.conftest import Backend, composed
from tests.loss_cases import pair
from tests.test_ops import LargestTensor

TARGETS = torch.tensor([3, 0, 3, 10**15, 1, 0, 3, 2, 1, 0, 3, 3])  # two classes of one sample
POSITIVES = ["mean", "sum"]


def views(count: int, n: int = 12, d: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Views of n samples, [n, count, d], of unit length."""
    x = torch.randn(n, count + 1, d, generator=torch.Generator("cpu").manual_seed(0), dtype=dtype, device="cpu")
    return F.normalize(x[:, :1] + 0.7 * x[:, 1:], dim=2).to(torch.get_default_device())


def check_values_and_gradients(got: Tensor, expected: Tensor, leaf: Tensor) -> None:
    weight = torch.linspace(-1, 2, len(expected), dtype=expected.dtype)
    torch.testing.assert_close(got, expected)
    for x, y in zip(*(torch.autograd.grad(weight @ loss, leaf) for loss in (got, expected)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("classes", [True, False])
def test_equals_supcontrast(backend: Backend, count: int, classes: bool) -> None:
    features = views(count).requires_grad_()
    targets = TARGETS.to(features.device) if classes else None
    got = supcon_loss(features, targets, temperature=0.1, normalize=False, reduction="none", impl=backend.impl)
    check_values_and_gradients(got, oracles.supcontrast(features, targets, 0.1), features)


def test_equals_pytorch_metric_learning(backend: Backend) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    rows = views(1)[:, 0].requires_grad_()
    targets = TARGETS.to(rows.device)
    host = losses.SupConLoss(temperature=0.1, reducer=reducers.DoNothingReducer())
    got = supcon_loss(rows, targets, temperature=0.1, reduction="none", impl=backend.impl)
    check_values_and_gradients(got, host(rows, targets)["loss"]["losses"], rows)


def test_the_sum_of_positives_equals_solo_learn(backend: Backend) -> None:
    """Eight views; some samples are in the batch twice, so their index repeats."""
    features, indexes = views(8).requires_grad_(), torch.arange(12) % 9
    expected = oracles.solo_simclr(features.transpose(0, 1).flatten(0, 1), indexes.repeat(8), 0.2)
    options = {"temperature": 0.2, "positives": "sum", "reduction": "none", "impl": backend.impl}
    check_values_and_gradients(supcon_loss(features, indexes, **options), expected, features)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("options", [{}, {"labels": 3}, {"labels": 3, "ids": 9}, {"ids": 9}], ids=str)
def test_two_views_without_targets_are_nt_xent(backend: Backend, options: dict[str, int], positives: str) -> None:
    x, y = (z.requires_grad_() for z in pair(12, dtype=torch.float64))
    numbers = {name: torch.arange(12) % modulus for name, modulus in options.items()}
    shared = {"temperature": 0.3, "reduction": "none", "impl": backend.impl, **numbers}
    expected = nt_xent(x, y, **shared)
    check_values_and_gradients(supcon_loss(torch.stack((x, y), 1), positives=positives, **shared), expected, x)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("negatives", ["same", "different", "all"])
@pytest.mark.parametrize("count", [1, 2])
def test_by_hand(backend: Backend, negatives: str, count: int, positives: str) -> None:
    """A negative target is a class of its own, a negative label has no negatives, equal ids are never negatives."""
    targets = torch.tensor([3, 0, 3, -1, 1, 0, -1, -2, 1, 0, 3, 3], device="cpu")
    labels = torch.tensor([0, 0, 1, 0, -1, 2, 0, 1, 1, 0, 1, 0], device="cpu")
    ids = torch.tensor([7, 0, 7, 4, 1, 9, 4, 5, 2, 8, 7, -6], device="cpu")
    sample = torch.arange(12 * count) % 12
    alike = torch.where(targets < 0, -1 - torch.arange(12, device="cpu"), targets)
    rows = range(12 * count)

    def is_positive(i: int, j: int) -> bool:
        return i != j and bool(alike[sample[i]] == alike[sample[j]])

    def is_negative(i: int, j: int) -> bool:
        a, b = int(sample[i]), int(sample[j])
        kept = oracles.kept(int(labels[a]), int(labels[b]), int(ids[a]), int(ids[b]), negatives)
        return kept and bool(alike[a] != alike[b])

    features = views(count)
    expected = oracles.supcon_by_hand(
        features.transpose(0, 1).flatten(0, 1),
        4.0,
        [[j for j in rows if is_positive(i, j)] for i in rows],
        [[j for j in rows if is_negative(i, j)] for i in rows],
        mean=positives == "mean",
    )
    device = features.device
    got = supcon_loss(
        features, targets.to(device), labels.to(device), temperature=torch.tensor([0.25], dtype=torch.float64),
        positives=positives, ids=ids.to(device), negatives=negatives, reduction="none", impl=backend.impl,
    )  # fmt: skip
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_rows_are_views_of_one(backend: Backend) -> None:
    rows, targets = views(1, dtype=torch.float32), torch.arange(12) % 3
    assert torch.equal(
        supcon_loss(rows[:, 0], targets, targets, impl=backend.impl),
        supcon_loss(rows, targets, targets, impl=backend.impl),
    )


@composed
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_integers_of_any_dtype(backend: Backend, dtype: torch.dtype) -> None:
    features, targets, labels, ids = views(2), torch.arange(12) % 5, torch.arange(12) % 2, torch.arange(12) % 10
    got = supcon_loss(features, targets.to(dtype), labels.to(dtype), ids=ids.to(dtype), impl=backend.impl)
    assert torch.equal(got, supcon_loss(features, targets, labels, ids=ids, impl=backend.impl))


@composed
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_tiny_batches(backend: Backend, n: int, count: int, positives: str) -> None:
    features = views(count, n).requires_grad_()
    for targets in (None, torch.zeros(n, dtype=torch.int64), torch.arange(n)):
        loss = supcon_loss(features, targets, positives=positives, impl=backend.impl)
        (grad,) = torch.autograd.grad(loss, features)
        assert loss.isfinite()
        assert grad.isfinite().all()
        alike = n * count if targets is not None and not targets.any() else count
        if alike < 2:
            assert loss == 0
            assert (grad == 0).all()


@composed
@pytest.mark.parametrize("positives", POSITIVES)
def test_without_positives_loss_and_gradient_are_0(backend: Backend, positives: str) -> None:
    rows, temperature = views(1)[:, 0].requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    for targets in (torch.arange(12) * 10**15, torch.full((12,), -1)):
        loss = supcon_loss(rows, targets, temperature=temperature, positives=positives, impl=backend.impl)
        gradients = torch.autograd.grad(loss, (rows, temperature))
        assert loss == 0
        assert all(bool((grad == 0).all()) for grad in gradients)


@composed
@pytest.mark.parametrize("positives", POSITIVES)
def test_an_anchor_without_positives_counts_in_the_mean(backend: Backend, positives: str) -> None:
    rows, targets = views(1)[:, 0].requires_grad_(), TARGETS.clone()
    each = supcon_loss(rows, targets, positives=positives, reduction="none", impl=backend.impl)
    alone = torch.isin(torch.arange(12), torch.tensor([3, 7]))
    assert (each[alone] == 0).all()
    assert (each[~alone] > 0).all()
    mean = supcon_loss(rows, targets, positives=positives, impl=backend.impl)
    torch.testing.assert_close(mean, each.sum() / 12)
    # It is still a negative of others: its row has a gradient from their losses alone.
    torch.testing.assert_close(
        torch.autograd.grad(mean, rows)[0], torch.autograd.grad(each[~alone].sum() / 12, rows)[0]
    )


@composed
@pytest.mark.parametrize("labels", [torch.arange(12), torch.full((12,), -1)], ids=["alone", "no label"])
def test_without_negatives_positives_are_left(backend: Backend, labels: Tensor) -> None:
    rows, targets = views(1)[:, 0].requires_grad_(), torch.arange(12) // 4
    labels = labels.to(rows.device)
    loss = supcon_loss(rows, targets, labels, temperature=0.5, normalize=False, impl=backend.impl)
    classes = rows.unflatten(0, (3, 4))
    logits = (classes @ classes.mT * 2.0).flatten(0, 1)[~torch.eye(4).bool().repeat(3, 1)].view(12, 3)
    expected = (logits.logsumexp(1) - logits.mean(1)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, rows), torch.autograd.grad(expected, rows))
    assert supcon_loss(rows, targets, labels, positives="sum", impl=backend.impl) == 0


@composed
@pytest.mark.parametrize("positives", POSITIVES)
def test_one_cluster_is_the_plain_loss(backend: Backend, positives: str) -> None:
    features, one = views(2), torch.full((12,), 10**15)
    losses = [
        supcon_loss(features, TARGETS.to(features.device), labels, positives=positives, impl=backend.impl)
        for labels in (one, None)
    ]
    torch.testing.assert_close(*losses)


@composed
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("targets", [torch.arange(12), torch.arange(12) % 3], ids=["alone", "classes"])
def test_bad_features_never_give_a_finite_loss(
    backend: Backend, value: float, normalize: bool, targets: Tensor
) -> None:
    rows = views(1)[:, 0].clone()
    rows[4, 2] = value
    labels, targets = torch.arange(12), targets.to(rows.device)  # each class by itself: a NaN has to stay in its own
    options = {"normalize": normalize, "reduction": "none", "impl": backend.impl}
    for positives in POSITIVES:
        each = supcon_loss(rows, targets, labels, positives=positives, **options)
        assert not each[4].isfinite()
        assert each[targets != targets[4]].isfinite().all()


@composed
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_zero_rows(backend: Backend, dtype: torch.dtype) -> None:
    features = views(2).to(dtype)
    features[3] = 0.0
    features.requires_grad_()
    loss = supcon_loss(features, TARGETS.to(features.device), impl=backend.impl)
    (grad,) = torch.autograd.grad(loss, features)
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert grad.isfinite().all()
    assert grad.dtype == dtype


@composed
def test_exponentials_beyond_fp32(backend: Backend) -> None:
    features = views(2, dtype=torch.float32).requires_grad_()
    targets = TARGETS.to(features.device)
    loss = supcon_loss(features, targets, temperature=1e-3, impl=backend.impl)
    torch.testing.assert_close(
        loss.double(), supcon_loss(features.double(), targets, temperature=1e-3), rtol=1e-5, atol=0
    )
    assert torch.autograd.grad(loss, features)[0].isfinite().all()


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(backend: Backend, dtype: torch.dtype, positives: str) -> None:
    """One large class, small ones, rows of different lengths that are used as they are, strides."""
    n = 200
    rows = torch.randn(n, 3, 24, generator=torch.Generator("cpu").manual_seed(0), device="cpu")[:, 1, ::2] * 0.3
    rows = (rows * torch.linspace(0.1, 2, n, device="cpu")[:, None]).to(dtype).to(torch.get_default_device())
    targets, labels = torch.arange(n).clamp(min=120) // 3, torch.arange(n) % 4

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        x = rows.to(dtype).requires_grad_()
        temperature = torch.tensor(0.2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        leaves = (x, temperature.requires_grad_())
        loss = supcon_loss(
            x,
            targets,
            labels,
            temperature=temperature,
            positives=positives,
            normalize=False,
            reduction="none",
            impl=impl,
        )
        weight = torch.linspace(-1, 2, n, dtype=loss.dtype)
        return [loss.detach(), *torch.autograd.grad(weight @ loss, leaves)]

    got, reference, exact = run(backend.impl, dtype), run("reference", dtype), run("reference", torch.float64)
    usual = max(torch.finfo(torch.float32).eps, relative_error(reference[1], exact[1]))
    for name, *values in zip(("loss", "rows", "temperature"), got, reference, exact, strict=True):
        assert_accurate(*values, name, usual)


@composed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: Backend, dtype: torch.dtype) -> None:
    features, labels = views(2, dtype=torch.float32).requires_grad_(), torch.arange(12) % 3
    outside = supcon_loss(features, TARGETS.to(features.device), labels, impl=backend.impl)
    with torch.autocast(backend.device, dtype=dtype):
        inside = supcon_loss(features, TARGETS.to(features.device), labels, impl=backend.impl)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)
    torch.testing.assert_close(*(torch.autograd.grad(loss, features) for loss in (inside, outside)))


@composed
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("labelled", [True, False])
def test_gradients(backend: Backend, labelled: bool, positives: str) -> None:
    """An anchor without positives, one without negatives and one without either are among them."""
    features = views(1, n=7, d=3).requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    targets, labels = torch.tensor([0, 0, 1, 2, 2, 2, 3]), torch.tensor([0, 0, 0, 5, 0, 0, 7])

    def loss(features: Tensor, temperature: Tensor) -> Tensor:
        return supcon_loss(
            features, targets, labels if labelled else None, temperature=temperature, positives=positives,
            reduction="none", impl=backend.impl,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (features, temperature))
    if backend.impl == "reference":
        assert torch.autograd.gradgradcheck(loss, (features, temperature))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch maps segment_reduce in a loop
def test_transforms_of_the_reference() -> None:
    features, tangent = views(2, d=4), views(2, d=4).flip(0)

    def loss(features: Tensor) -> Tensor:
        return supcon_loss(features, TARGETS, TARGETS % 2, impl="reference")

    derivative = torch.func.jvp(loss, (features,), (tangent,))[1]
    gradient = torch.func.grad(loss)(features)
    torch.testing.assert_close(derivative, (gradient * tangent).sum())
    both = torch.func.vmap(torch.func.grad(loss))(torch.stack((features, features.flip(0))))
    torch.testing.assert_close(both[0], gradient)
    assert torch.autograd.gradcheck(loss, (features.requires_grad_(),), check_forward_ad=True)


def test_double_backward_of_a_fused_implementation_is_refused() -> None:
    features = views(2).requires_grad_()
    (grad,) = torch.autograd.grad(supcon_loss(features, impl="native"), features, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        grad.sum().backward()


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("positives", POSITIVES)
def test_the_same_bits_for_any_number_of_threads(thread_count: None, positives: str) -> None:
    targets, labels = (torch.arange(1500).clamp(max=700) // k for k in (3, 100))
    features = views(2, 1500, 40, torch.float32).requires_grad_()

    def run(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        each = supcon_loss(features, targets, labels, positives=positives, reduction="none")
        return each, *torch.autograd.grad(torch.linspace(-1, 2, 3000) @ each, features)

    expected = run(1)
    for threads in (1, 2, 4, 4):
        assert all(map(torch.equal, run(threads), expected))


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("clusters", [True, False])
def test_memory_is_linear(clusters: bool, positives: str) -> None:
    n, d = 4096, 32
    rows, targets = views(1, n, d, torch.float32)[:, 0].requires_grad_(), torch.arange(n) % 3
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = supcon_loss(rows, targets, targets if clusters else None, positives=positives)
    with largest:
        loss.backward()
    assert largest.numel == n * d
    # The rows, their unit rows and the means of positives; per row integers of targets, plans and vectors.
    assert sum(saved.values()) <= n * (3 * 4 * d + 300)


def test_meta_features() -> None:
    features, targets = torch.empty(6, 2, 3, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    for positives in POSITIVES:
        loss = supcon_loss(features, targets, targets, positives=positives, reduction="none")
        assert loss.device.type == "meta"
        assert loss.shape == (12,)


def test_the_mean_of_others_by_hand() -> None:
    """Rows 10^8 times as long as others of their group keep the digits of these."""
    x = torch.tensor([[1e8], [1.0], [2.0], [-1e8], [torch.nan], [5.0], [4.0]])
    groups = Groups.of(torch.tensor([7, 7, 7, 7, -3, 2**62, 2**62]))
    assert groups.row_group.tolist() == [1, 1, 1, 1, 0, 2, 2]
    assert groups.others().tolist() == [3, 3, 3, 3, 0, 1, 1]
    means = mean_of_others(x, groups)
    expected = torch.tensor([[(3.0 - 1e8) / 3], [2 / 3], [1 / 3], [(1e8 + 3.0) / 3], [torch.nan], [4.0], [5.0]])
    torch.testing.assert_close(means, expected, rtol=1e-7, atol=0, equal_nan=True)


def test_opcheck() -> None:
    x = torch.randn(20, 70, requires_grad=True)
    torch.library.opcheck(_operator, (x, *Groups.of(torch.arange(20) % 6)))


@pytest.mark.slow
@pytest.mark.parametrize("positives", POSITIVES)
def test_compile(positives: str) -> None:
    """One graph for any number of samples, classes and clusters, with the values and gradients of the call."""
    torch._dynamo.reset()
    loss = partial(supcon_loss, temperature=0.2, positives=positives)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, (n, classes) in enumerate([(240, 3), (400, 3), (400, 370), (310, 1)]):
        features = views(2, n, 8, torch.float32).requires_grad_()
        targets, labels = torch.arange(n) % classes, torch.arange(n) // 50
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = compiled(features, targets, labels)
        expected = loss(features, targets, labels)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value, features) for value in (got, expected)))
