"""Every test of numbers runs through one fixture: each (device, implementation) pair that exists here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from mcl_kernels.logsumexp.api import IMPLS

# The OpenMP threads of small operations spin against each other when two test processes share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


class Backend(NamedTuple):
    device: str
    impl: str


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
BACKENDS = [Backend(device, impl) for device in DEVICES for impl in IMPLS if impl != "auto"]


def pytest_report_header() -> str:
    missing = "" if torch.cuda.is_available() else "; no cuda: torch sees no CUDA device"
    return "backends: " + ", ".join("-".join(backend) for backend in BACKENDS) + missing


@pytest.fixture(params=BACKENDS, ids="-".join)
def backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.param
    return backend


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
