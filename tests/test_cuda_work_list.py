"""Results of the CUDA C++ kernels for any number of programs that share the work.

The emulated GPU has three, so tests of numbers have row tiles within one program, and row tiles of two or three.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mcl_kernels import positive_ranks
from mcl_kernels.logsumexp import cuda, gpu_common
from tests.cases import make_case
from tests.conftest import BACKENDS, Backend
from tests.test_logsumexp import check, run

# The last: at most one unit each, and programs without any.
PROGRAMS = [1, 2, 3, 7, 16, 10**9]
on_cuda = pytest.mark.parametrize("backend", [x for x in BACKENDS if x.impl == "cuda"], ids=str, indirect=True)


@pytest.fixture(params=PROGRAMS)
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of programs that every launch of the backend has."""
    count: int = request.param
    share_among(count, monkeypatch)
    return count


def share_among(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_forward = partial(cuda._run_forward, programs=programs)
    monkeypatch.setattr(cuda, "forward", partial(gpu_common.forward, run_forward))
    monkeypatch.setattr(cuda, "count_above", partial(gpu_common.count_above, run_forward))
    run_backward = partial(cuda._run_backward, programs=programs)
    monkeypatch.setattr(cuda, "backward", partial(gpu_common.backward, run_backward))


@on_cuda
@pytest.mark.parametrize("negatives", ["same", "different", "all"])
def test_results(backend: Backend, poisoned_memory: None, programs: int, negatives: str) -> None:
    case = make_case(130, 200, 40, n_clusters=2, device=backend.device)
    check(case, 5.0, backend, negatives=negatives, bidirectional=True)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_features_in_parts(backend: Backend, poisoned_memory: None, programs: int, dtype: torch.dtype) -> None:
    check(make_case(70, None, 270, n_clusters=1, dtype=dtype, device=backend.device), 5.0, backend)


@on_cuda
def test_float64(backend: Backend, poisoned_memory: None, programs: int) -> None:
    case = make_case(70, 90, 140, n_clusters=1, dtype=torch.float64, device=backend.device)
    got, exact = (run(case, 5.0, impl, bidirectional=True) for impl in (backend.impl, "reference"))
    for name, value in exact.items():
        assert torch.allclose(got[name], value, rtol=1e-12, atol=1e-12), name


@on_cuda
@pytest.mark.parametrize("wanted", [("query",), ("scale",), ("query", "scale")], ids=" ".join)
def test_gradients_of_some_inputs(
    backend: Backend, poisoned_memory: None, programs: int, wanted: tuple[str, ...]
) -> None:
    check(make_case(70, 200, 20, n_clusters=1, device=backend.device), 5.0, backend, wanted=wanted)


@on_cuda
def test_ranks_of_positives(backend: Backend, poisoned_memory: None, programs: int) -> None:
    case = make_case(130, 200, 40, n_clusters=2, device=backend.device)
    positive = case.query.roll(1, 0)
    assert case.key is not None
    got, exact = (
        positive_ranks(
            case.query, case.key, case.labels, case.key_labels, positive=positive, ids=case.ids, key_ids=case.key_ids,
            impl=impl,
        )
        for impl in (backend.impl, "reference")
    )  # fmt: skip
    assert torch.equal(got, exact)


@on_cuda
def test_row_tiles_without_columns(backend: Backend, poisoned_memory: None, programs: int) -> None:
    """Among tiles that have some, and without any others."""
    case = make_case(330, 150, 20, n_clusters=3, device=backend.device)
    labels, key_labels = case.labels, case.key_labels
    assert labels is not None
    assert key_labels is not None
    check(case._replace(labels=torch.where(labels < 2, labels, -1)), 5.0, backend)
    check(case._replace(key_labels=torch.where(key_labels == 1, -1, key_labels)), 5.0, backend)
    got = run(case._replace(labels=torch.full_like(labels, -1)), 5.0, backend.impl)
    assert got.pop("lse").eq(-torch.inf).all()
    assert all(gradient.eq(0).all() for gradient in got.values())


@on_cuda
def test_not_a_number_and_infinity(backend: Backend, poisoned_memory: None, programs: int) -> None:
    """They are in one column tile of several, and in the results of the rows that are compared with it."""
    case = make_case(70, 200, 20, n_clusters=None, with_ids=False, device=backend.device)
    assert case.key is not None
    for value in (torch.nan, torch.inf):
        key = case.key.clone()
        key[100] = value
        got, exact = (run(case._replace(key=key.abs(), query=case.query.abs()), 5.0, impl)["lse"]
                      for impl in (backend.impl, "reference"))  # fmt: skip
        assert torch.equal(got.nan_to_num(1, 2), exact.nan_to_num(1, 2))
        assert not got.isfinite().any()


@on_cuda
def test_the_same_bits_twice(backend: Backend, poisoned_memory: None, programs: int) -> None:
    case = make_case(130, 200, 40, n_clusters=2, device=backend.device)
    first, second = (run(case, 5.0, backend.impl, bidirectional=True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
