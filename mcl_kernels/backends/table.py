"""Table of the backends: the devices on which each runs, or the reason why it does not. `impl=` names a row.

A backend computes one or more operations, each in a module of its own that is imported when it is first called. "auto"
prefers earlier rows. To add a backend: write its modules, and add a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch

from mcl_kernels._validate import check_choice
from mcl_kernels.backends import cuda, native, triton


class Backend(NamedTuple):
    """A row of the table."""

    modules: dict[str, str]  # by operation: the module that computes it
    unavailable_reason: Callable[[torch.device], str | None]  # why it does not run on a device; None if it does
    describe: Callable[[], tuple[list[str], str]]  # types of device here that it runs on; its description, or why none
    automatic_on: tuple[str, ...] = ()  # types of device on which "auto" picks it if it is available
    check: Callable[[torch.device], None] | None = None  # raises its own errors if it is unavailable on a device


def _faiss_reason(device: torch.device) -> str | None:
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        return f"faiss cannot be imported ({error}); pip install faiss-cpu, or its build for GPUs"
    return None


def _describe_faiss() -> tuple[list[str], str]:
    reason = _faiss_reason(torch.device("cpu"))
    return ([], reason) if reason else (_devices(), "k-means alone: a flat index of faiss finds the nearest centres")


def _no_reason(device: torch.device) -> None:
    """Reason why a backend that runs on every device is unavailable: none."""


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


TABLE = {
    "native": Backend(
        {"logsumexp": "mcl_kernels.logsumexp.native", "kmeans": "mcl_kernels.kmeans.native"},
        native.unavailable_reason,
        native.describe,
        automatic_on=("cpu",),
        check=native.check,
    ),
    "triton": Backend(
        {"logsumexp": "mcl_kernels.logsumexp.triton.launch", "kmeans": "mcl_kernels.kmeans.triton.launch"},
        triton.unavailable_reason,
        triton.describe,
        automatic_on=("cuda",),
    ),
    "cuda": Backend(
        {"logsumexp": "mcl_kernels.logsumexp.cuda", "kmeans": "mcl_kernels.kmeans.cuda"},
        cuda.unavailable_reason,
        cuda.describe,
        automatic_on=("cuda",),
    ),
    "faiss": Backend(
        {"kmeans": "mcl_kernels.kmeans.faiss"},
        _faiss_reason,
        _describe_faiss,
    ),
    "reference": Backend(
        {"logsumexp": "mcl_kernels.logsumexp.reference", "kmeans": "mcl_kernels.kmeans.reference"},
        _no_reason,
        lambda: (_devices(), "dense PyTorch, differentiable to any order: the definition, stores the N x M matrix"),
    ),
    "blockwise": Backend(
        {"logsumexp": "mcl_kernels.logsumexp.blockwise"},
        _no_reason,
        lambda: (_devices(), "PyTorch by tiles, in memory that grows with N + M; runs wherever torch does"),
    ),
}
FALLBACKS = {"logsumexp": "blockwise", "kmeans": "reference"}
# Values of `impl` for each operation.
IMPLS = {
    operation: ("auto", *(name for name, backend in TABLE.items() if operation in backend.modules))
    for operation in FALLBACKS
}


def resolve(operation: str, impl: str, device: torch.device) -> str:
    """Name of the backend that computes an operation on a device: `impl` itself, or the choice of "auto".

    Raises:
        TypeError, ValueError: `impl` is no name of a backend of the operation, or "native" for a GPU.
        RuntimeError: the backend does not run on the device, for the reason in the message. It is never replaced.
    """
    check_choice("impl", impl, IMPLS[operation])
    if impl == "auto":
        return _choose(operation, device)
    _check_available(impl, device)
    return impl


@cache
def load(operation: str, impl: str) -> ModuleType:
    """Module of the backend that computes the operation."""
    return import_module(TABLE[impl].modules[operation])


@cache
def _automatic(operation: str, device: torch.device) -> str:
    """Name of the first backend that runs on the device; else the fallback, with a warning that holds the reasons."""
    reasons = []
    for name, backend in TABLE.items():
        if device.type in backend.automatic_on and operation in backend.modules:
            reason = backend.unavailable_reason(device)
            if reason is None:
                return name
            reasons.append(f"impl={name!r}: {reason}")
    if reasons:
        _warn_once("; ".join(reasons))
    return FALLBACKS[operation]


@cache
def _warn_once(reasons: str) -> None:
    warnings.warn(f"mcl_kernels: PyTorch operations compute, several times slower: {reasons}", RuntimeWarning, 4)


def _choose(operation: str, device: torch.device) -> str:
    return _automatic(operation, device)  # Dynamo traces through a cache, but not through this function


def _check_available(impl: str, device: torch.device) -> None:
    backend = TABLE[impl]
    if backend.check is not None:
        backend.check(device)
    elif reason := backend.unavailable_reason(device):
        raise RuntimeError(f"impl={impl!r}: {reason} (or use impl='auto')")


# A compiled graph holds the results of these functions, without building and loading. The attribute is the one that
# `torch.compiler.assume_constant_result` sets; the decorator itself would import the compiler with this module.
_CONSTANT: tuple[Any, ...] = (_choose, _check_available)
for _function in _CONSTANT:
    _function._dynamo_marked_constant = True


def capabilities() -> dict[str, dict[str, object]]:
    """Availability of each `impl` on this machine, with its devices and a description or the reason.

    Loads the native kernels, and builds them first if there is no library yet.

    Returns:
        A dictionary from the name of each implementation, and "auto", to `available` (bool), `devices`
        (list of device types of this machine it runs on) and `reason` (str).

    Example:
        >>> capabilities()["blockwise"]["available"]
        True
    """
    found = {name: backend.describe() for name, backend in TABLE.items()}
    entries: dict[str, dict[str, object]] = {
        name: {"available": bool(devices), "devices": devices, "reason": reason}
        for name, (devices, reason) in found.items()
    }
    choices = {device: _first_of(device, found) for device in _devices()}
    picks = [f"{name} for {device.upper()} tensors, " for device, name in choices.items() if name] + ["else blockwise"]
    reason = f"picks {''.join(picks)} (k-means: reference)"
    return {**entries, "auto": {"available": True, "devices": _devices(), "reason": reason}}


def _first_of(device: str, found: dict[str, tuple[list[str], str]]) -> str | None:
    names = (name for name, backend in TABLE.items() if device in backend.automatic_on and device in found[name][0])
    return next(names, None)
