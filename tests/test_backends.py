"""The table of backends: which one computes, and why another does not."""

from __future__ import annotations

import contextlib
from importlib import import_module

import pytest
import torch

from mcl_kernels import capabilities
from mcl_kernels.backends import cuda, table
from mcl_kernels.backends.table import FALLBACKS, IMPLS, TABLE, load, resolve
from tests.conftest import unavailable_reason

OPERATIONS = list(FALLBACKS)
every_operation = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.mark.parametrize(("operation", "impl"), [(o, i) for o in OPERATIONS for i in IMPLS[o][1:]])
def test_every_backend_has_a_module_for_each_of_its_operations(operation: str, impl: str) -> None:
    if impl == "triton" and (reason := unavailable_reason("triton", "cpu")):
        pytest.skip(reason)
    passes = {"logsumexp": ["forward", "backward", "count_above"], "kmeans": ["assign", "assign_and_sum"]}
    if (operation, impl) == ("logsumexp", "reference"):  # plain PyTorch, which autograd differentiates
        passes = {"logsumexp": ["logsumexp", "count_above"]}
    assert load(operation, impl) is import_module(TABLE[impl].modules[operation])
    assert all(hasattr(load(operation, impl), name) for name in passes[operation])


@every_operation
def test_native_is_for_cpu_tensors(operation: str) -> None:
    with pytest.raises(ValueError, match="impl='native' computes on CPU tensors: got device meta"):
        resolve(operation, "native", torch.device("meta"))


@every_operation
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_a_named_backend_is_never_replaced(operation: str, impl: str) -> None:
    with pytest.raises(RuntimeError, match=f"impl='{impl}': .*use impl='auto'"):
        resolve(operation, impl, torch.device("meta"))


@every_operation
def test_cuda_that_is_not_built_is_never_replaced(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_loaded", lambda: "is not built")
    with pytest.raises(RuntimeError, match=r"impl='cuda': is not built \(or use impl='auto'\)"):
        resolve(operation, "cuda", torch.device("cuda"))


@every_operation
@pytest.mark.parametrize(
    ("missing", "chosen"), [((), "triton"), (("triton",), "cuda"), (("triton", "cuda"), "fallback")]
)
def test_auto_on_a_gpu(operation: str, missing: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "cuda"):
        reason = "is missing" if name in missing else None
        row = TABLE[name]._replace(unavailable_reason=lambda device, reason=reason: reason)
        monkeypatch.setitem(TABLE, name, row)
    for function in (table._automatic, table._warn_once):
        function.cache_clear()
    try:
        warning = "PyTorch operations compute, several times slower: impl='triton': is missing; impl='cuda': is missing"
        warns = pytest.warns(RuntimeWarning, match=warning) if chosen == "fallback" else contextlib.nullcontext()
        with warns:
            expected = FALLBACKS[operation] if chosen == "fallback" else chosen
            assert resolve(operation, "auto", torch.device("cuda")) == expected
    finally:
        for function in (table._automatic, table._warn_once):
            function.cache_clear()


@every_operation
def test_auto_on_another_device_is_the_fallback_without_a_warning(operation: str) -> None:
    assert resolve(operation, "auto", torch.device("meta")) == FALLBACKS[operation]


def test_capabilities_name_every_backend_and_give_a_reason() -> None:
    every = capabilities()
    assert set(every) == {"auto", *TABLE}
    for name, entry in every.items():
        assert entry["reason"], name
        assert entry["available"] is bool(entry["devices"]), name
    for name in ("auto", "native", "reference", "blockwise"):
        assert "cpu" in every[name]["devices"], name  # type: ignore[operator]
