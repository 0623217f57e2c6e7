"""Fixtures of all tests, and the backends that exist here: every test of numbers runs on each of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from mcl_kernels.backends import native
from mcl_kernels.backends.table import IMPLS, TABLE, device_types
from mcl_kernels.logsumexp import device_plan
from tests import emulated_cuda
from tests.process_pool import RankPool

# The OpenMP threads of small operations spin against each other when two test processes share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


class Backend(NamedTuple):
    device: str
    impl: str
    instruction_set: str = ""  # of native

    def __str__(self) -> str:
        return "-".join(filter(None, self))


INSTRUCTION_SETS = ["amx", "avx512", "avx2", "portable"]
DEVICES = device_types()
BACKENDS = [Backend("cpu", "native", name) for name in INSTRUCTION_SETS]
BACKENDS += [Backend(DEVICES[-1], "triton")]
BACKENDS += [Backend(device, "cuda") for device in DEVICES]  # on a CPU emulated
BACKENDS += [Backend(device, impl) for device in DEVICES for impl in ("blockwise", "reference")]
listed = {backend.impl for backend in BACKENDS}
assert listed == set(IMPLS["logsumexp"]) - {"auto"}, "BACKENDS must list every backend of the operation in the table"
# Kernels that run on this CPU many times slower than elsewhere: interpreted, and emulated thread by thread.
EMULATED = [Backend("cpu", "triton"), Backend("cpu", "cuda")]
EMULATED_IMPLS = [backend.impl for backend in EMULATED]


if emulated_cuda.unavailable_reason() is None:
    emulated_cuda.install()


def unavailable_reason(impl: str, device: str) -> str | None:
    """Returns why an implementation does not run on a device here, or None."""
    return TABLE[impl].unavailable_reason(torch.device(device))


# Implementations that compute CPU tensors here, for tests that need each of them once.
CPU_IMPLS = [impl for impl in IMPLS["logsumexp"][1:] if impl == "native" or unavailable_reason(impl, "cpu") is None]


def pytest_report_header() -> str:
    missing = "" if torch.cuda.is_available() else "; no cuda: torch sees no CUDA device"
    return "backends: " + ", ".join(map(str, BACKENDS)) + missing


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Backend that computes; tensors that a test makes are on its device."""
    backend: Backend = request.param
    if backend.impl == "native":
        use_instruction_set(backend.instruction_set, monkeypatch)
    elif reason := unavailable_reason(backend.impl, backend.device):
        pytest.skip(reason)
    if backend.impl == "triton":
        monkeypatch.setattr(device_plan, "_is_built", lambda device: False)  # as most installations are
    with torch.device(backend.device) if backend.device != "cpu" else contextlib.nullcontext():
        yield backend


# For what is composed of the operation in PyTorch, as objectives are: emulated kernels and further instruction sets add
# no code path to it.
COMPOSED = [x for x in BACKENDS if x not in EMULATED and x.instruction_set in ("", "avx2")]
composed = pytest.mark.parametrize("backend", COMPOSED, ids=str, indirect=True)


def use_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selects the native kernels of an instruction set for the rest of the test; skips it if this CPU lacks the set."""
    available, reason = native.describe()
    if not available:
        pytest.skip(reason)
    monkeypatch.setenv("MCL_KERNELS_CPU", name)
    try:
        assert torch.ops.mcl_kernels_native.instruction_set() == name
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=[2, 4], ids=lambda n: f"{n} ranks")
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Processes that communicate over gloo, kept for all modules: they take seconds to start."""
    with RankPool(request.param) as pool:
        yield pool


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills the memory of `torch.empty` with NaN, so that an unwritten element is detected."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
