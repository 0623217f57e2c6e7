"""Backends and rows for the tests of k-means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcl_kernels.backends.table import IMPLS
from tests.conftest import DEVICES, EMULATED, Backend, unavailable_reason, use_instruction_set

BACKENDS = [
    *(Backend("cpu", "native", name) for name in ("avx512", "avx2", "portable")),
    Backend(DEVICES[-1], "triton"),
    *(Backend(device, "cuda") for device in DEVICES),  # on a CPU emulated
    *(Backend(device, "reference") for device in DEVICES),
    Backend("cpu", "faiss"),
]
# For fits, which are composed of passes: tests of passes cover emulated kernels.
composed = pytest.mark.parametrize("backend", [x for x in BACKENDS if x not in EMULATED], ids=str, indirect=True)
listed = {backend.impl for backend in BACKENDS}
assert listed == set(IMPLS["kmeans"]) - {"auto"}, "BACKENDS must list every backend of k-means in the table"


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend: Backend = request.param
    if backend.impl == "native":
        use_instruction_set(backend.instruction_set, monkeypatch)
    elif reason := unavailable_reason(backend.impl, backend.device):
        pytest.skip(reason)
    return backend


@pytest.fixture
def impl(backend: Backend) -> str:
    return backend.impl


@pytest.fixture
def device(backend: Backend) -> str:
    """Device of the rows."""
    return backend.device


def blobs(
    n: int = 600, k: int = 6, d: int = 5, spread: float = 0.3, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(k, d, generator=generator)
    labels = torch.arange(n) % k
    x = centers[labels] + spread * torch.randn(n, d, generator=generator)
    return x.to(device), labels.to(device)


def normal(n: int, d: int, device: str) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(device)
