"""Promises of the Triton implementation alone; its numbers are in the tests that every implementation runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mcl_kernels import masked_logsumexp
from mcl_kernels.logsumexp import device_plan
from mcl_kernels.logsumexp.inputs import Inputs, LseGradients, Wanted
from mcl_kernels.logsumexp.pairs import Pairs, kept_pairs, make_plan
from tests.accuracy import assert_accurate
from tests.cases import Case, make_case
from tests.new_process import run_python
from tests.test_logsumexp import as_float64, run

pytest.importorskip("triton.knobs", reason="the test extra brings it, where there is one")

from mcl_kernels.logsumexp.triton import launch as triton
from mcl_kernels.logsumexp.triton.tile_table import choose_tiles

KERNELS = {
    "arguments": ("copy_kernel", "sum_units_kernel"),
    "forward": ("forward_kernel", "join_forward_kernel"),
    "backward": ("backward_kernel", "join_backward_kernel"),
}
FORMS = [("self", None, False), ("rows", 40, False), ("both", 40, True)]


class Launches:
    """Replaces a kernel, and records the grids of its launches."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *arguments, **options: None


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()
    for module, kernels in KERNELS.items():
        for kernel in kernels:
            monkeypatch.setattr(f"mcl_kernels.logsumexp.triton.{module}.{kernel}", launches)
    monkeypatch.setattr("mcl_kernels.logsumexp.triton.plan.plan_kernel", launches)
    monkeypatch.setattr(device_plan, "_is_built", lambda device: False)
    return launches


@pytest.mark.parametrize("negatives", ["same", "different", "all"])
@pytest.mark.parametrize(("form", "m", "bidirectional"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_waits_for_the_device(
    launches: Launches, form: str, m: int | None, bidirectional: bool, negatives: str, dtype: torch.dtype
) -> None:
    """Fake tensors raise if a value is read: planning and launching read none."""
    case = make_case(30, m, 8, dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        query, key, *identities = (None if x is None else mode.from_tensor(x) for x in case)
        inputs = Inputs(query, key, torch.ones(()), Pairs(*identities, negatives), bidirectional)
        saved = triton.forward(inputs)
        gradients = LseGradients(torch.ones_like(saved.row_lse), torch.ones_like(saved.column_lse))
        shapes = [x.shape for x in triton.backward(inputs, saved, gradients, Wanted(True, True, True))]
    assert shapes == [case.query.shape, (0,) if case.key is None else case.key.shape, ()]
    # Forward and backward have four launches for each side: copies, work list, tiles, join. The plan is one launch, and
    # one more for the ranges of keys that only the backward pass needs.
    plans = 2 if form == "rows" else 1
    assert len(launches.grids) == plans + 4 * ((2 if bidirectional else 1) + (1 if form == "self" else 2))


class Operators(TorchDispatchMode):
    """Counts operators, each of which a GPU launches at least once."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "empty" not in function.__name__
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("m", "most"), [(None, 12), (40, 18)])
def test_planning_is_a_handful_of_launches(m: int | None, most: int) -> None:
    case = make_case(30, m, 8)
    with Operators() as operators:
        make_plan(case.query, case.key, Pairs(case.labels, case.key_labels, case.ids, case.key_ids, "same"))
    assert 0 < operators.count <= most


def test_the_grid_depends_on_the_rows_alone(launches: Launches) -> None:
    grids = []
    for labels in (torch.zeros(300), torch.arange(300), torch.full((300,), -1)):
        launches.grids.clear()
        pairs = Pairs(labels.long(), None, torch.arange(300), None, "same")
        triton.forward(Inputs(torch.randn(300, 8), None, torch.ones(()), pairs))
        grids.append(list(launches.grids))
    assert grids[0] == grids[1] == grids[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the products of the interpreter")
@pytest.mark.parametrize("negatives", ["same", "different", "all"])
def test_tiles_that_are_visited(negatives: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of rows that holds negative labels, three tiny clusters and the head of a huge one."""
    from triton.runtime.interpreter import InterpreterBuilder

    tiles = choose_tiles("forward", "bf16x6", torch.float32, 16, None)
    sizes = [20, 3, 4, 5, 4 * tiles.columns]  # of the labels -1 to 3
    labels = torch.arange(-1, 4).repeat_interleave(torch.tensor(sizes))
    n = len(labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    x[labels == -1] = torch.nan

    products = 0
    create_dot = InterpreterBuilder.create_dot

    def counted(*arguments: Any) -> Any:
        nonlocal products
        products += 1
        return create_dot(*arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    ids = torch.arange(n)
    got = masked_logsumexp(x[order], labels=labels[order], ids=ids, negatives=negatives, impl="triton")
    expected = masked_logsumexp(x[order].double(), labels=labels[order], ids=ids, negatives=negatives, impl="reference")
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)

    plan = make_plan(x, None, Pairs(labels[order], None, ids, None, negatives))
    sorted_labels = labels[order][plan.query_order]
    visited = 0
    for first in range(0, n, tiles.rows):
        rows = slice(first, first + tiles.rows)
        has_keys = plan.key_begin[rows] < plan.key_end[rows]
        if not has_keys.any():
            continue
        begin, end = int(plan.key_begin[rows][has_keys].min()), int(plan.key_end[rows][has_keys].max())
        for start in range(begin, end, tiles.columns):
            differ = sorted_labels[rows][has_keys].unsqueeze(1) != sorted_labels[start : start + tiles.columns]
            visited += bool(negatives != "different" or differ.any())
    assert products == 6 * visited  # of fp32 numbers
    # Negative labels cost no tile, and under "different" the huge cluster costs almost none.
    max_visited = -(-n // tiles.rows) * -(-(n - sizes[0]) // tiles.columns)
    assert visited <= (max_visited // 2 if negatives == "different" else max_visited)


def to_tf32(x: Tensor) -> Tensor:
    """Cuts the mantissa to 10 bits: tensor cores read no others."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def truncated(x: Tensor) -> Tensor:
    """Rounds fp64 to fp32 toward zero, as tensor cores are assumed to round their sums."""
    nearest = x.float()
    return torch.where(nearest.double().abs() > x.abs(), torch.nextafter(nearest, torch.zeros(())), nearest)


def multiply(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Multiplies as tensor cores do: operands are cut or split, 16 exact products are added at a time, sums truncated.

    bf16x6 sums the products of at most 256 terms apart, small ones first, and adds them with rounding to nearest. For
    half precision only the rounding of the operands is emulated, not that of the sums.
    """
    if precision == "half":
        return a.float() @ b.float()
    sums = torch.zeros(len(a), b.shape[1])
    if precision == "tf32":
        return add_products(sums, to_tf32(a), to_tf32(b))
    for part in torch.arange(a.shape[1]).split(256):
        left, right, part_sums = bfloat16_parts(a[:, part]), bfloat16_parts(b[part]), torch.zeros_like(sums)
        for order in range(3):
            for split in range(3 - order):
                part_sums = add_products(part_sums, left[split], right[2 - order - split])
        sums = sums + part_sums
    return sums


def bfloat16_parts(x: Tensor) -> list[Tensor]:
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16().float())
        x = x - parts[-1]
    return parts


def add_products(sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    for part in torch.arange(a.shape[1]).split(16):
        sums = truncated(sums.double() + a[:, part].double() @ b[part].double())
    return sums


def emulated(case: Case, scale: float, precision: str) -> dict[str, Tensor]:
    """LSE and gradient of the self form with the roundings of the kernels; the LSE has the weights of `run`."""
    x, dtype = case.query, case.query.dtype
    keep = kept_pairs(Pairs(case.labels, case.labels, case.ids, case.ids, "same"))
    assert keep is not None
    logits = (scale * multiply(x, x.T, precision)).masked_fill(~keep, -torch.inf)
    lse = logits.logsumexp(1)
    weight = torch.linspace(-1, 2, len(x)).masked_fill(lse.isinf(), 0)
    terms = torch.where(keep, (logits - lse.unsqueeze(1)).exp(), 0) * weight.unsqueeze(1)
    weights = torch.where(keep, terms + terms.T, 0)
    fp16_scale = 2.0**13 if dtype == torch.float16 else 1.0
    rounded = (fp16_scale * weights).to(dtype) if precision == "half" else weights
    return {"lse": lse, "grad_query": (scale * multiply(rounded, x, precision) / fp16_scale).to(dtype)}


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("d", [24, 512])
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("half", torch.bfloat16), ("half", torch.float16), ("bf16x6", torch.float32), ("tf32", torch.float32)],
    ids=str,
)
def test_operands_as_the_tensor_cores_round_them(precision: str, dtype: torch.dtype, d: int, scale: float) -> None:
    """Results are as accurate as the definition; in tf32, which users choose, to the 11 bits of its operands."""
    case = make_case(300, None, d, dtype=dtype)
    got = emulated(case, scale, precision)
    exact = run(as_float64(case), scale, "reference")
    reference = run(case, scale, "reference")
    for name, value in got.items():
        if precision == "tf32":
            finite = exact[name].isfinite()
            error = (value.double() - exact[name])[finite].norm() / exact[name][finite].norm()
            assert error <= 2**-10 * max(scale, 1), name
        else:
            assert_accurate(value, reference[name], exact[name], name)


run_on_cpu = partial(run_python, TRITON_INTERPRET="")  # without the interpreter


def test_on_a_cpu_without_the_interpreter() -> None:
    result = run_on_cpu("import torch, mcl_kernels\nmcl_kernels.masked_logsumexp(torch.eye(3), impl='triton')")
    assert "impl='triton': computes on CUDA tensors: got device cpu" in result.stderr


def test_without_triton() -> None:
    result = run_on_cpu(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mcl_kernels\n"
        "print(mcl_kernels.capabilities()['triton'])\n"
        "mcl_kernels.masked_logsumexp(torch.eye(3), impl='triton')"
    )
    assert "'available': False" in result.stdout
    assert "triton cannot be imported" in result.stderr
    assert "use impl='auto'" in result.stderr


def test_either_switch_of_torch_selects_tf32() -> None:
    """Once the newer one was used, torch refuses to answer through the older one."""
    result = run_on_cpu(
        "import torch; from mcl_kernels.backends import triton\n"
        "x = torch.eye(3)\n"
        "print(triton.product_precision(x, x, torch.ones(())))\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "print(triton.product_precision(x, x, torch.ones(())))"
    )
    assert result.stdout.split() == ["tf32x3", "tf32"], result.stderr


def test_before_triton_3_4() -> None:
    result = run_on_cpu(
        "import sys, types; old = types.ModuleType('triton'); old.__version__ = '3.2.0'; sys.modules['triton'] = old\n"
        "import torch, mcl_kernels; mcl_kernels.masked_logsumexp(torch.eye(3), impl='triton')"
    )
    assert "needs triton 3.4 or later: got 3.2.0" in result.stderr
