"""The torch.library contract: schemas, fakes, autograd, compilation, saved tensors and imports."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mcl_kernels import (
    clip_loss,
    count_negatives,
    masked_info_nce,
    masked_logsumexp,
    nt_xent,
    objectives,
    positive_ranks,
    supcon_loss,
)
from mcl_kernels.logsumexp import ops
from mcl_kernels.logsumexp.pairs import Plan
from tests.cases import OBJECTIVES, make_case
from tests.conftest import CPU_IMPLS, EMULATED_IMPLS
from tests.new_process import run_python

FUSED = [impl for impl in CPU_IMPLS if impl != "reference"]
FORMS = [("self", None), ("rows", 40), ("both", 40)]


def op_inputs(form: str, m: int | None, impl: str, *, labelled: bool = True) -> tuple[object, ...]:
    case = make_case(30, m, 8, n_clusters=3 if labelled else None, with_ids=labelled)
    query = case.query.requires_grad_()
    key = None if case.key is None else case.key.requires_grad_()
    scale = torch.tensor(4.0, requires_grad=True)
    if not labelled and key is None:
        case = case._replace(ids=torch.arange(30))
    views = 0
    if not labelled and form != "rows" and impl in ops.GPU_IMPLS:  # these take default ids
        case, views = case._replace(ids=None), 1
    return query, key, scale, *case[2:], "same", views, form == "both", impl


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("form", "m"), FORMS)
def test_opcheck_forward(form: str, m: int | None, labelled: bool, impl: str) -> None:
    torch.library.opcheck(ops.masked_logsumexp, op_inputs(form, m, impl, labelled=labelled))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("needs_grad", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize(("form", "m"), FORMS)
def test_opcheck_backward(form: str, m: int | None, needs_grad: tuple[bool, ...], impl: str) -> None:
    *tensors, negatives, views, bidirectional, _ = op_inputs(form, m, impl)
    tensors = [x.detach() if isinstance(x, Tensor) else x for x in tensors]
    saved = ops.masked_logsumexp(*tensors, negatives, views, bidirectional, impl)
    grads = torch.ones_like(saved[0]), torch.ones_like(saved[1])
    inputs = (*tensors, negatives, views, bidirectional, *saved, *grads, list(needs_grad), impl)
    torch.library.opcheck(ops.masked_logsumexp_backward, inputs)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("form", "m"), FORMS)
def test_a_call_has_the_bits_of_the_operator(form: str, m: int | None, labelled: bool, impl: str) -> None:
    """Outside of graphs no operator is called; labels are given or not, each gradient is wanted alone too."""
    *arguments, _ = op_inputs(form, m, impl, labelled=labelled)
    inputs = ops.Inputs.unflatten(arguments)
    leaves = [x for x in (inputs.query, inputs.key, inputs.scale) if x is not None]
    by_call, by_operator = ops.compute(inputs, impl), ops.masked_logsumexp(*arguments, impl)[:2]
    for wanted in (leaves, *([leaf] for leaf in leaves)):
        results = []
        for lse in (by_call, by_operator):
            losses = [(x.exp() * torch.linspace(-1, 2, len(x))).sum() for x in lse]
            results.append([*lse, *torch.autograd.grad(sum(losses), wanted, retain_graph=True)])  # type: ignore[arg-type]
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", FUSED)
def test_a_side_of_both_that_is_not_used(impl: str) -> None:
    *arguments, _ = op_inputs("both", 40, impl)
    inputs = ops.Inputs.unflatten(arguments)
    for side in range(2):
        lse = ops.compute(inputs, impl)[side], ops.masked_logsumexp(*arguments, impl)[side]
        got, expected = (torch.autograd.grad(x.exp().sum(), (inputs.query, inputs.key)) for x in lse)  # type: ignore[arg-type]
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck_count_above(impl: str) -> None:
    case = make_case(30, 40, 8)
    inputs = (case.query, case.key, torch.ones(()), *case[2:], "same", 0, False)
    torch.library.opcheck(ops.fused_count_above, (*inputs, torch.zeros(30), impl))


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
@pytest.mark.parametrize("negatives", ["same", "different", "all"])
@pytest.mark.parametrize(("form", "m"), FORMS)
def test_gradcheck(form: str, m: int | None, negatives: str, impl: str) -> None:
    case = make_case(9, None if m is None else 11, 3, dtype=torch.float64, n_clusters=2)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def function(scale: Tensor, query: Tensor, key: Tensor | None = None) -> Tensor:
        lse = masked_logsumexp(
            query, key, case.labels, case.key_labels, scale=scale, ids=case.ids, key_ids=case.key_ids,
            negatives=negatives, bidirectional=form == "both", impl=impl,
        )  # fmt: skip
        values = torch.cat(lse) if form == "both" else lse
        return torch.where(values.isinf(), 0.0, values)

    leaves = [x.requires_grad_() for x in (case.query, case.key) if x is not None]
    # In fast mode one random direction stands for all elements.
    assert torch.autograd.gradcheck(function, (scale, *leaves), fast_mode=impl in EMULATED_IMPLS)


def test_second_derivatives() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for labels in (None, torch.tensor([0, 0, 0, 1, -1])):  # rows without negatives among them
        lse = partial(masked_logsumexp, labels=labels, impl="reference")
        assert torch.autograd.gradgradcheck(lambda x: lse(x)[:3], (x,))  # noqa: B023


@pytest.mark.parametrize("impl", FUSED)
def test_double_backward_is_refused(impl: str) -> None:
    x = torch.randn(5, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(masked_logsumexp(x, impl=impl).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(("form", "m"), FORMS)
def test_tensors_saved_for_backward(form: str, m: int | None, impl: str) -> None:
    """Saved are inputs, LSE and plan; their size depends on neither N x M nor the number of clusters."""
    n, d = 400, 32
    case = make_case(n, None if m is None else 500, d, n_clusters=7)
    leaves = [x.requires_grad_() for x in (case.query, case.key) if x is not None]
    scale = torch.tensor(4.0, requires_grad=True)
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        masked_logsumexp(
            *leaves, *([None] if m is None else []), case.labels, case.key_labels, scale=scale, ids=case.ids,
            key_ids=case.key_ids, bidirectional=form == "both", impl=impl,
        )  # fmt: skip
    rows = sum(len(x) for x in leaves)
    # Per row: D features, labels and ids, LSE, and the order and ranges of the plan.
    assert sum(saved.values()) <= rows * (4 * d + 2 * 8 + 4 + 4 * 8) + 64


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        return out


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("labelled", [True, False])
def test_no_matrix_of_all_pairs(impl: str, labelled: bool) -> None:
    n, d = 1024 if impl in EMULATED_IMPLS else 4096, 16
    case = make_case(n, None, d, n_clusters=4 if labelled else None, with_ids=labelled)
    with LargestTensor() as largest:
        masked_logsumexp(
            case.query.requires_grad_(), labels=case.labels, ids=case.ids, impl=impl
        ).exp().sum().backward()
    assert n * d <= largest.numel <= n * n // 16


@pytest.mark.parametrize("impl", FUSED)
def test_forward_mode_is_refused(impl: str) -> None:
    x, tangent = torch.randn(2, 5, 3)
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        torch.func.jvp(lambda x: masked_logsumexp(x, impl=impl), (x,), (tangent,))
    value, derivative = torch.func.jvp(lambda x: masked_logsumexp(x, impl="reference"), (x,), (tangent,))
    assert derivative.abs().sum() > 0
    torch.testing.assert_close(value, masked_logsumexp(x, impl=impl))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "vjp": lambda loss, x: torch.func.vjp(loss, x)[1](torch.ones(())),
    "jacrev": lambda loss, x: torch.func.jacrev(loss)(x),
    "hessian": lambda loss, x: torch.func.hessian(loss)(x),
    "vmap of grad": lambda loss, x: torch.func.vmap(torch.func.grad(loss))(torch.stack((x, x))),
    "grad of vmap": lambda loss, x: torch.func.grad(lambda z: torch.func.vmap(loss)(z).sum())(torch.stack((x, x))),
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    "jacfwd": lambda loss, x: torch.func.jacfwd(loss)(x),
}  # fmt: skip


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_that_fused_implementations_lack_are_refused(transform: str, impl: str) -> None:
    x, y = torch.randn(2, 6, 3)
    for loss in (nt_xent, masked_info_nce, partial(clip_loss, logit_scale=2.0)):
        with pytest.raises(NotImplementedError, match="impl='reference'"):
            TRANSFORMS[transform](lambda z: loss(z, y, impl=impl), x)  # noqa: B023
        TRANSFORMS[transform](lambda z: loss(z, y, impl="reference"), x)  # noqa: B023


def test_transforms_that_differentiate_something_else_are_not_refused() -> None:
    x, y = torch.randn(2, 6, 3)
    expected = nt_xent(x, y)
    assert torch.equal(torch.func.grad(lambda z: z * nt_xent(x, y))(torch.ones(())), expected)
    assert torch.equal(torch.func.grad(lambda z: (z.detach() * nt_xent(z.detach(), y) + z).sum())(x), torch.ones(6, 3))
    torch.testing.assert_close(torch.func.vmap(lambda z: nt_xent(z, y))(x[None]), expected[None])


@pytest.mark.parametrize("impl", FUSED)
def test_the_plan_does_not_depend_on_the_clusters(impl: str) -> None:
    x = torch.randn(64, 4)
    sizes = []
    for labels in (torch.zeros(64), torch.arange(64), torch.full((64,), -1)):
        identities = labels.long(), None, torch.arange(64), None
        outputs = ops.masked_logsumexp(x, None, torch.tensor(1.0), *identities, "same", 0, False, impl)
        sizes.append([len(tensor) for tensor in Plan(*outputs[2:])])
    assert sizes == [sizes[0]] * 3


def losses(impl: str) -> dict[str, Callable[..., Tensor]]:
    def simclr(x: Tensor, y: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        return nt_xent(x, y, labels, temperature=temperature, impl=impl)

    def moco(x: Tensor, y: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        return masked_info_nce(
            x, y, labels, labels, positive=y, ids=labels, key_ids=labels + 1, temperature=temperature, impl=impl,
            objective=objectives.hard_negative(0.5),
        )  # fmt: skip

    def clip(x: Tensor, y: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        return clip_loss(x, y, labels, logit_scale=1 / temperature, impl=impl, objective=objectives.debiased())

    def ranks(x: Tensor, y: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        rank = positive_ranks(x, y, labels, impl=impl)
        return (x * y * temperature).sum() * (rank < 1).float().mean()

    return {"nt_xent": simclr, "masked_info_nce": moco, "clip_loss": clip, "positive_ranks": ranks}


# The reference compiles too, but inductor guards the size of its dense matrices, so it recompiles with them.
# Fused implementations are one operator, which compilers do not look into: every loss with one of them.
COMPILED = [(loss, impl, "aot_eager") for loss in losses("auto") for impl in ("native", "reference")]
COMPILED += [("nt_xent", impl, "aot_eager") for impl in FUSED if impl != "native"]
COMPILED += [(loss, "native", "inductor") for loss in ("nt_xent", "clip_loss")]


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "impl", "compiler"), COMPILED)
def test_compile(loss: str, impl: str, compiler: str) -> None:
    """One graph with dynamic shapes serves all label histograms; value and gradients are the eager ones."""
    if compiler == "inductor" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    function = losses(impl)[loss]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    generator = torch.Generator().manual_seed(0)
    for step, (n, n_clusters) in enumerate([(240, 3), (400, 3), (400, 370), (310, 1)]):
        x, y = (torch.randn(n, 8, generator=generator, requires_grad=True) for _ in range(2))
        temperature = torch.tensor(0.5, requires_grad=True)
        labels = torch.randint(0, n_clusters, (n,), generator=generator)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = compiled(x, y, labels, temperature)
        expected = function(x, y, labels, temperature)
        torch.testing.assert_close(got, expected)
        inputs = (x, y, temperature)
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_compile_of_rows_whose_norm_overflows(impl: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(losses(impl)["nt_xent"], fullgraph=True, dynamic=True, backend="aot_eager")
    x, y = torch.randn(2, 40, 8)
    labels, temperature = torch.arange(40) % 3, torch.tensor(0.5)
    expected = losses(impl)["nt_xent"](x.requires_grad_(), y, labels, temperature)
    long = (2.0**80 * x.detach()).requires_grad_()
    got = compiled(long, y, labels, temperature)
    torch.testing.assert_close(got, expected)
    got.backward()
    expected.backward()
    assert long.grad is not None
    torch.testing.assert_close(2.0**80 * long.grad, x.grad)


def _moco(x: Tensor, y: Tensor, labels: Tensor, queue: Tensor, queue_labels: Tensor, **options: Any) -> Tensor:
    return masked_info_nce(x, queue, labels, queue_labels, positive=y, **options)


def _clip(x: Tensor, y: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return clip_loss(x, y, labels, logit_scale=5.0, **options)


def _temperatures(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    return masked_info_nce(x, y, labels, temperature=0.1 + x[:, 0].square(), reduction="none")


EXPORTED: dict[str, Callable[..., Any]] = {
    "masked_info_nce": masked_info_nce,
    "masked_info_nce, queue": _moco,
    "masked_info_nce, temperatures": _temperatures,
    "nt_xent": nt_xent,
    "nt_xent, rows as they are": partial(nt_xent, normalize=False),
    "clip_loss": _clip,
    "masked_logsumexp": lambda x, y, labels: masked_logsumexp(x, labels=labels),
    "masked_logsumexp, without labels": lambda x, y, labels: masked_logsumexp(x),
    "masked_logsumexp, keys": lambda x, y, labels, queue, queue_labels: masked_logsumexp(
        x, queue, labels, queue_labels, bidirectional=True
    ),
    "count_negatives": lambda x, y, labels: count_negatives(labels),
    "positive_ranks": positive_ranks,
    "supcon_loss": lambda x, y, labels: supcon_loss(x, labels, labels % 2),
    "supcon_loss, views": lambda x, y, labels: supcon_loss(torch.stack((x, y), 1), labels=labels, positives="sum"),
}
EXPORTED |= {
    f"{name}, {objective.id}": partial(EXPORTED[name], objective=objective.values[0])
    for name in ("masked_info_nce, queue", "nt_xent")
    for objective in OBJECTIVES[1:]
}
EXPORTED |= {f"nt_xent, impl={impl}": partial(nt_xent, impl=impl) for impl in CPU_IMPLS}


class Exported(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


# Dynamo, which strict export uses, traces objectives and implementations in test_compile.
STRICT = [(name, True) for name in EXPORTED if "impl=" not in name and not any(x.id in name for x in OBJECTIVES[1:])]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strict"), [(name, False) for name in EXPORTED] + STRICT)
def test_export(name: str, strict: bool) -> None:
    """A single export serves a batch and a queue of any size."""
    torch._dynamo.reset()
    function, n_inputs = EXPORTED[name], 5 if "queue" in name or "keys" in name else 3

    def inputs(n: int, m: int) -> tuple[Tensor, ...]:
        x, y = torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n))
        queue = torch.randn(m, 8, generator=torch.Generator().manual_seed(m))
        return (x, y, torch.arange(n) % 3, queue, torch.arange(m) % 3)[:n_inputs]

    n, m = (torch.export.Dim(size, min=2, max=1000) for size in "nm")
    shapes = tuple({0: size} for size in (n, n, n, m, m)[:n_inputs])
    exported = torch.export.export(Exported(function), inputs(10, 16), dynamic_shapes=(shapes,), strict=strict).module()
    for sizes in ((33, 64), (5, 3)):
        torch.testing.assert_close(exported(*inputs(*sizes)), function(*inputs(*sizes)))


def output_of(code: str) -> str:
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_torch_and_numpy_only() -> None:
    loaded = output_of(
        "import sys, torch, numpy; before = {name.split('.')[0] for name in sys.modules}\n"
        "import mcl_kernels; after = {name.split('.')[0] for name in sys.modules}\n"
        "print(*sorted(after - before))"
    )
    assert set(loaded.split()) <= {"mcl_kernels", *sys.stdlib_module_names}


def test_works_without_triton_and_without_a_compiler() -> None:
    output_of(
        "import os, sys; os.environ['PATH'] = ''; os.environ['CC'] = os.environ['CXX'] = '/nowhere'\n"
        "for name in ('triton', 'faiss', 'sklearn', 'matplotlib', 'rich', 'jinja2', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import torch, mcl_kernels\n"
        "x = torch.randn(8, 4, requires_grad=True)\n"
        "mcl_kernels.nt_xent(x, x.detach(), torch.arange(8) % 2).backward()\n"
        "assert x.grad.abs().sum() > 0\n"
        "assert mcl_kernels.capabilities()['auto']['available']"
    )
