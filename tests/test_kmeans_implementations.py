"""The choice of an implementation of k-means: a name is never replaced by another."""

from __future__ import annotations

import contextlib

import pytest
import torch

from mcl_kernels.backends import cuda as _cuda
from mcl_kernels.kmeans.implementations import IMPLEMENTATIONS, implementation
from mcl_kernels.logsumexp.api import for_cuda


def test_native_is_for_cpu_tensors() -> None:
    with pytest.raises(ValueError, match="impl='native' computes on CPU tensors: got device meta"):
        implementation("native", torch.device("meta"))


def test_triton_is_never_replaced() -> None:
    with pytest.raises(RuntimeError, match=r"impl='triton': .*use impl='auto'"):
        implementation("triton", torch.device("meta"))


def test_cuda_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="impl='cuda': computes on CUDA tensors: got device meta"):
        implementation("cuda", torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cuda, "_loaded", lambda: "is not built")
    with pytest.raises(RuntimeError, match=r"impl='cuda': is not built \(or use impl='auto'\)"):
        implementation("cuda", torch.device("cuda"))


@pytest.mark.parametrize(
    ("missing", "chosen"), [((), "triton"), (("triton",), "cuda"), (("triton", "cuda"), "reference")]
)
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], chosen: str) -> None:
    for name, why_not in (("triton", "triton.unavailable_reason"), ("cuda", "cuda.why_not")):
        reason = "is missing" if name in missing else None
        monkeypatch.setattr(f"mcl_kernels.backends.{why_not}", lambda _, reason=reason: reason)
    for_cuda.cache_clear()
    warning = "impl='reference' computes.*: impl='triton': is missing; impl='cuda': is missing"
    with pytest.warns(RuntimeWarning, match=warning) if chosen == "reference" else contextlib.nullcontext():
        assert implementation("auto", torch.device("cuda")).__name__ == IMPLEMENTATIONS[chosen]
    for_cuda.cache_clear()
