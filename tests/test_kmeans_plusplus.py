"""Greedy k-means++ against its definition in fp64, with the same random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mcl_kernels.backends import native
from mcl_kernels.kmeans import initial
from mcl_kernels.kmeans.dataset import Dataset
from mcl_kernels.kmeans.initial import Sample, initial_centers
from mcl_kernels.kmeans.passes import Problem
from mcl_kernels.kmeans.summary import Summary
from tests.conftest import use_instruction_set
from tests.kmeans_cases import blobs, normal

ROWS = 200  # PyTorch's operations on them, in the definition, run in one thread


@pytest.fixture(params=["avx512", "avx2", "portable", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Instruction set of the kernels, or "torch" for a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(initial.native, "unavailable_reason", lambda device: "no compiler")
    else:
        use_instruction_set(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def native_path(path: str) -> str:
    if path == "torch":
        pytest.skip("a property of the kernels")
    return path


@pytest.fixture
def set_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def choose(x: Tensor, n_clusters: int, seed: int = 0) -> Tensor:
    """Returns the centres for rows whose offset is their mean."""
    offset, zeros = x.double().mean(0).to(x.dtype), torch.zeros(1, x.shape[1], dtype=torch.float64)
    problem = Problem(
        Dataset.__new__(Dataset), Summary(x.dtype, offset, zeros[0], zeros[0], zeros), "euclidean", native, bounds=True
    )
    return initial_centers(problem, Sample(x, None), n_clusters, "k-means++", torch.Generator().manual_seed(seed))


def definition(x: Tensor, n_clusters: int, seed: int = 0) -> Tensor:
    """The centres by distances from differences in fp64."""
    generator = torch.Generator().manual_seed(seed)
    wide = x.double()
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    nearest = (wide - wide[chosen[0]]).square().sum(1)
    while len(chosen) < n_clusters and nearest.sum() > 0:
        draws = torch.rand(2 + int(math.log(n_clusters)), dtype=torch.float64, generator=generator)
        cumulative = nearest.cumsum(0)
        candidates = torch.searchsorted(cumulative, draws * cumulative[-1], right=True).tolist()
        reachable = [torch.minimum(nearest, (wide - wide[row]).square().sum(1)) for row in candidates]
        best = min(range(len(candidates)), key=lambda i: float(reachable[i].sum()))
        chosen.append(candidates[best])
        nearest = reachable[best]
    return x[chosen]


# Widths: one element; below a vector; below and above MIN_CODED_WIDTH; not a multiple of a chunk of codes.
@pytest.mark.parametrize("width", [1, 5, 63, 64, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_rows_of_the_definition_are_chosen(path: str, width: int, dtype: torch.dtype) -> None:
    clustered, noise = blobs(ROWS, k=9, d=width)[0], normal(ROWS, width, "cpu")
    spread = torch.cat((clustered[:150], 20 * noise[:50])).repeat_interleave(2, 1)[:, ::2]  # with a stride
    # By products in fp32, distances far below the norms have few digits, and another row may be drawn.
    for x in (noise, spread) if path == "torch" and dtype == torch.float32 else (clustered, noise, spread):
        assert torch.equal(choose(x.to(dtype), 40), definition(x.to(dtype), 40))


def hard_data(width: int) -> dict[str, Tensor]:
    x = blobs(2 * ROWS, k=7, d=width)[0]
    far, several_far = x.clone(), x.clone()
    far[0] = 1e5
    several_far[::100] *= 1e4
    return {
        "one far row": far,
        "several far rows": several_far,
        "an offset of 1e6": x + 1e6,
        "one large column": x + 1e4 * (torch.arange(width) == 0) * normal(2 * ROWS, 1, "cpu"),
        "fp64 of 1e-30": 1e-30 * x.double(),
        "fp64 of 1e30": 1e30 * x.double(),
        "fp64 of 1e-160": 1e-160 * x.double(),
        "close pairs": torch.cat((x[:ROWS], x[:ROWS] + 1e-6 * x[:1])),
        "equal rows": x[torch.arange(2 * ROWS) % 30],
        "rows of zeros": torch.cat((torch.zeros(50, width), x)),
    }


@pytest.mark.parametrize("case", hard_data(1))
@pytest.mark.parametrize("width", [3, 70])
def test_data_in_which_products_lose_digits(path: str, case: str, width: int) -> None:
    x = hard_data(width)[case]
    for seed in range(2):
        assert torch.equal(choose(x, 35, seed), definition(x, 35, seed))


@pytest.mark.parametrize("width", [2, 80])
def test_each_distinct_row_is_chosen_once(path: str, width: int) -> None:
    x = normal(40, width, "cpu")
    assert len(choose(x, 40).unique(dim=0)) == 40
    assert len(choose(x, 1)) == 1
    for rows in (7 + x[:13], 1e-25 * x[:13]):  # squares of the second ones are below the range of fp32
        centers = choose(rows.repeat(9, 1), 40)
        assert len(centers) == len(centers.unique(dim=0)) == 13
    assert len(choose(torch.full((50, width), 0.1), 5)) == 1


def test_the_bounds_change_no_bit(native_path: str) -> None:
    """Steps with bounds, and steps that compare every row with every candidate."""
    add_center = native.ops().add_center
    for x in (blobs(3000, k=30, d=70, spread=1.0)[0], normal(3000, 70, "cpu"), hard_data(70)["several far rows"]):
        steps = initial._NativeSteps(Sample(x, None), x.mean(0), coded=True)
        nearest, labels = steps.nearest.clone(), torch.zeros(len(x), dtype=torch.int32)
        chosen = torch.arange(0)
        for step in range(60):
            candidates = torch.randint(len(x), (7,), generator=torch.Generator().manual_seed(step))
            best = steps.add_best(candidates, chosen)
            # Without centres and codes there are no bounds.
            assert add_center(x, x.mean(0), (), candidates, chosen[:0], nearest, labels.zero_(), len(x))[0] == best
            assert torch.equal(steps.nearest, nearest)
            chosen = torch.cat((chosen, candidates[best : best + 1]))
        to_label = (x - x[chosen[steps._labels.long()]]).double().square().sum(1)
        torch.testing.assert_close(to_label, nearest, rtol=1e-5, atol=0)


def test_rows_far_from_all_candidates_are_skipped(native_path: str) -> None:
    x, _ = blobs(3000, k=30, d=70, spread=0.1)
    steps = initial._NativeSteps(Sample(x, None), x.mean(0), coded=True)
    for row in range(30):  # a centre in each cluster
        steps.add_best(torch.tensor([row]), torch.arange(row))
    steps.add_best(torch.tensor([30, 31]), torch.arange(30))
    assert steps._compared == 198  # the rows of clusters 0 and 1 but for their centres


def test_the_same_bits_for_any_number_of_threads(native_path: str, set_threads: None) -> None:
    x = normal(17_000, 512, "cpu")  # enough work for three threads
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        steps = initial._NativeSteps(Sample(x, None), x.mean(0), coded=True)
        chosen = torch.arange(0)
        for step in range(6):
            candidates = torch.randint(len(x), (12,), generator=torch.Generator().manual_seed(step))
            best = steps.add_best(candidates, chosen)
            chosen = torch.cat((chosen, candidates[best : best + 1]))
        results.append((chosen, steps.nearest, steps._labels))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_distances_beyond_fp64(native_path: str) -> None:
    """A distance that overflows is no bound of others."""
    x = torch.tensor([[0.0], [2.0], [1.1], [1.9]], dtype=torch.float64) * 1e154
    steps = initial._NativeSteps(Sample(x, None), x[2], coded=False)
    steps.nearest.fill_(torch.inf)
    steps.add_best(torch.tensor([0]), torch.arange(0))
    steps.add_best(torch.tensor([1]), torch.arange(1))
    assert steps.nearest[3] == pytest.approx(1e306)
