"""What only the Triton implementation promises; its numbers are in the tests that every implementation runs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mcl_kernels import masked_logsumexp
from mcl_kernels.logsumexp import triton
from mcl_kernels.logsumexp.plan import Pairs, make_plan
from tests.cases import make_case

pytest.importorskip("triton", reason="the test extra brings it, where there is one")

FORMS = [("self", None, False), ("rows", 40, False), ("both", 40, True)]


class Launches:
    """Stands where a kernel does, and keeps the grids it was launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *arguments, **options: None


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    from mcl_kernels.logsumexp import triton_backward, triton_forward, triton_tiles

    launches = Launches()
    monkeypatch.setattr(triton_forward, "forward_kernel", launches)
    monkeypatch.setattr(triton_backward, "backward_kernel", launches)
    monkeypatch.setattr(triton_tiles, "drop_kernel", launches)
    return launches


@pytest.mark.parametrize("negatives", ["same", "different", "all"])
@pytest.mark.parametrize(("form", "m", "bidirectional"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_waits_for_the_device(
    launches: Launches, form: str, m: int | None, bidirectional: bool, negatives: str, dtype: torch.dtype
) -> None:
    """Tensors without data raise where a value is read: by planning and launching none is."""
    case = make_case(30, m, 8, dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        query, key, *identities = (None if x is None else mode.from_tensor(x) for x in case)
        scale, pairs = torch.ones(()), Pairs(*identities, negatives)
        row_lse, column_lse, plan = triton.forward(query, key, scale, pairs, bidirectional)
        gradients = torch.ones_like(row_lse), torch.ones_like(column_lse)
        saved = query, key, scale, pairs, row_lse, column_lse, plan
        shapes = [x.shape for x in triton.backward(*gradients, *saved, bidirectional, (True, True, True))]
    assert shapes == [case.query.shape, (0,) if case.key is None else case.key.shape, ()]
    # One to drop columns before each kernel; 1 forward and 1 backward, or one of each side.
    sides = 1 if form == "self" else 2
    assert len(launches.grids) == 2 * ((2 if bidirectional else 1) + sides)


def test_the_grid_depends_on_the_rows_alone(launches: Launches) -> None:
    grids = []
    for labels in (torch.zeros(300), torch.arange(300), torch.full((300,), -1)):
        launches.grids.clear()
        pairs = Pairs(labels.long(), None, torch.arange(300), None, "same")
        triton.forward(torch.randn(300, 8), None, torch.ones(()), pairs, False)
        grids.append(list(launches.grids))
    assert grids[0] == grids[1] == grids[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the products of the interpreter")
@pytest.mark.parametrize("negatives", ["same", "different", "all"])
def test_tiles_that_are_visited(negatives: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of rows that holds negative labels, three tiny clusters and the head of a huge one."""
    from triton.runtime.interpreter import InterpreterBuilder

    tiles = triton.choose_tiles("forward", "tf32x3", 16, None)
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
    visited = 0
    for first in range(0, n, tiles.rows):
        begin, end = plan.key_begin[first : first + tiles.rows], plan.key_end[first : first + tiles.rows]
        if (met := begin < end).any():
            visited += -(-int(end[met].max() - begin[met].min()) // tiles.columns)
    assert products == visited
    # Nobody meets the negative labels: less than a row of tiles per tile of rows.
    assert visited <= -(-n // tiles.rows) * -(-(n - sizes[0]) // tiles.columns)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, env=environment
    )


def test_on_a_cpu_without_the_interpreter() -> None:
    result = run_python("import torch, mcl_kernels\nmcl_kernels.masked_logsumexp(torch.eye(3), impl='triton')")
    assert "impl='triton': computes on CUDA tensors: got device cpu" in result.stderr


def test_without_triton() -> None:
    result = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mcl_kernels\n"
        "print(mcl_kernels.capabilities()['triton'])\n"
        "mcl_kernels.masked_logsumexp(torch.eye(3), impl='triton')"
    )
    assert "'available': False" in result.stdout
    assert "triton cannot be imported" in result.stderr
    assert "use impl='blockwise'" in result.stderr
