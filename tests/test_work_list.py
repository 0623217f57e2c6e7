"""The work list of the Triton kernels: the same results however many programs share it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.knobs", reason="the test extra brings it, where there is one")

from mcl_kernels.logsumexp import gpu_common, reference
from mcl_kernels.logsumexp.inputs import Inputs, LseGradients, Wanted
from mcl_kernels.logsumexp.pairs import Pairs
from mcl_kernels.logsumexp.triton import tile_table
from mcl_kernels.logsumexp.triton.arguments import Copies
from mcl_kernels.logsumexp.triton.backward import run_backward
from mcl_kernels.logsumexp.triton.forward import run_forward
from tests.cases import make_case

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tiles of the interpreter")

# Small tiles: 200 rows in 7 row tiles of up to 7 units; with clusters there are fewer units than the last of programs.
SMALL = tile_table.Tiles(rows=32, columns=32, features=32, gradients=32, warps=4, stages=1, piece=16, joined=2)
ALL = 7 * 7
FORMS = [("self", None), ("rows", 150), ("both", 150)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_table, "choose_tiles", tile_table.choose_tiles.__wrapped__)
    for module in ("forward", "backward"):
        monkeypatch.setattr(f"mcl_kernels.logsumexp.triton.{module}.choose_tiles", tile_table.choose_tiles)
    monkeypatch.setattr(tile_table, "INTERPRETED", SMALL)


def results(inputs: Inputs, programs: int, threshold: Tensor | None = None) -> list[Tensor]:
    """LSEs, gradients, and the counts above a threshold."""
    saved = gpu_common.forward(partial(run_forward, Copies(), programs=programs), inputs)
    row, column = (torch.linspace(-1, 2, len(x)) for x in saved[:2])
    grads = LseGradients(row * saved.row_lse.isfinite(), column * saved.column_lse.isfinite())
    run = partial(run_backward, Copies(), programs=programs)
    gradients = gpu_common.backward(run, inputs, saved, grads, Wanted(True, inputs.key is not None, True))
    counts = []
    if threshold is not None:
        counts = [gpu_common.count_above(partial(run_forward, Copies(), programs=programs), inputs, threshold)]
    return [saved.row_lse, saved.column_lse, *gradients, *counts]


def exact_results(inputs: Inputs, threshold: Tensor) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in (inputs.query, inputs.key, inputs.scale) if x is not None]
    query, key = leaves[0], None if inputs.key is None else leaves[1]
    wide = Inputs(query, key, leaves[-1], inputs.pairs, inputs.bidirectional)
    row_lse, column_lse = reference.logsumexp(wide)
    total = torch.zeros((), dtype=torch.float64)
    for lse in (row_lse, column_lse):
        weight = torch.linspace(-1, 2, len(lse)) * lse.isfinite()
        total = total + (weight * lse.masked_fill(lse.isinf(), 0)).sum()
    gradients = list(torch.autograd.grad(total, leaves))
    if key is None:
        gradients.insert(1, query.new_empty(0))
    return [row_lse.detach(), column_lse.detach(), *gradients, reference.count_above(inputs, threshold)]


def make_inputs(form: str, m: int | None, negatives: str, labels: Tensor | None = None) -> Inputs:
    case = make_case(200, m, 24)
    pairs = Pairs(*case[2:], negatives)
    if labels is not None:
        pairs = Pairs(labels, pairs.key_labels, *pairs[2:])
    return Inputs(case.query, case.key, torch.tensor(5.0), pairs, form == "both")


@pytest.mark.parametrize(
    "negatives", ["same", *(pytest.param(x, marks=pytest.mark.slow) for x in ("different", "all"))]
)
@pytest.mark.parametrize(("form", "m"), FORMS)
def test_any_number_of_programs(poisoned_memory: None, form: str, m: int | None, negatives: str) -> None:
    """Row tiles of one program, of two and of many; more programs than units, whose slots are never written."""
    inputs = make_inputs(form, m, negatives)
    threshold = torch.linspace(-0.5, 0.5, 200)
    exact = exact_results(inputs, threshold)
    for programs in (1, 2, 3, 7, 16, ALL) if negatives == "same" else (3, ALL):
        for value, expected in zip(results(inputs, programs, threshold), exact, strict=True):
            torch.testing.assert_close(value.double(), expected.double(), rtol=2e-5, atol=2e-5)


def test_the_same_bits_twice(poisoned_memory: None) -> None:
    inputs = make_inputs("both", 150, "same")
    for value, again in zip(results(inputs, 7), results(inputs, 7), strict=True):
        assert torch.equal(value, again)


@pytest.mark.parametrize("programs", [1, 5])
def test_no_units(poisoned_memory: None, programs: int) -> None:
    inputs = make_inputs("self", None, "same", torch.full((200,), -1))
    row_lse, _, grad_query, _, grad_scale = results(inputs, programs)
    assert (row_lse == -torch.inf).all()
    assert not grad_query.any()
    assert not grad_scale.any()


def test_row_tiles_without_units_between_others(poisoned_memory: None) -> None:
    """Rows of labels that no key has fill row tiles of their own."""
    case = make_case(200, 150, 24, with_ids=False)
    labels = torch.arange(200) // 40 * 2
    key_labels = torch.where(torch.arange(150) < 75, 0, 8)
    inputs = Inputs(case.query, case.key, torch.tensor(5.0), Pairs(labels, key_labels, None, None, "same"))
    threshold = torch.zeros(200)
    exact = exact_results(inputs, threshold)
    for programs in (1, 4, 11):
        for value, expected in zip(results(inputs, programs, threshold), exact, strict=True):
            torch.testing.assert_close(value.double(), expected.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 60.0, 500.0])
def test_one_exponential_or_two(scale: float) -> None:
    """Weights of large logits take two exponentials, those of small ones one; in one call rows of both kinds."""
    case = make_case(200, None, 24)
    size = torch.where(torch.arange(200) % 3 == 0, 0.1, 1.0).unsqueeze(1)
    inputs = Inputs(case.query * size, None, torch.tensor(scale), Pairs(case.labels, None, case.ids, None, "same"))
    threshold = torch.zeros(200)
    for value, expected in zip(results(inputs, 4, threshold), exact_results(inputs, threshold), strict=True):
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-4, atol=1e-4 * scale)


def test_sums_of_parts_that_overflow() -> None:
    """Products of the parts of huge numbers overflow with both signs: the logsumexp is infinite, not NaN."""
    x = torch.full((40, 24), 1.5e19)
    x[20:] = -1.1e19
    inputs = Inputs(x, None, torch.ones(()), Pairs(None, None, torch.arange(40), None, "same"))
    saved = gpu_common.forward(partial(run_forward, Copies()), inputs)
    assert (saved.row_lse == torch.inf).all()


@pytest.mark.parametrize("multiprocessors", [108, 132, 160])
def test_the_workspace_is_small_whatever_the_batch(multiprocessors: int) -> None:
    for (kernel, precision, architecture), by_width in tile_table.TABLE.items():
        for width in (64, 128, 200, 256, 512, 768, 1024, 4096):
            tiles = tile_table.choose_tiles(kernel, precision, torch.bfloat16, width, (architecture // 10, 0))
            programs = max(1, tiles.per_multiprocessor * multiprocessors // tiles.parts)
            numbers = tiles.parts * tiles.gradients if kernel == "backward" else 2
            assert 2 * programs * tiles.rows * numbers * 4 <= 64 << 20, (
                kernel,
                precision,
                architecture,
                width,
                by_width,
            )


def test_tiles_read_by_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on sm_90 and later; a descriptor reads zeros past the last feature."""
    case = make_case(100, 70, 40)  # 48 features of a copy, 64 of a tile
    inputs = Inputs(case.query, case.key, torch.tensor(5.0), Pairs(*case[2:], "different"), bidirectional=True)
    tiles = SMALL._replace(features=64, gradients=64)
    monkeypatch.setattr(tile_table, "INTERPRETED", tiles)
    expected = results(inputs, 3)
    monkeypatch.setattr(tile_table, "INTERPRETED", tiles._replace(descriptors=True))
    for value, by_pointers in zip(results(inputs, 3), expected, strict=True):
        assert torch.equal(value.nan_to_num(), by_pointers.nan_to_num())
