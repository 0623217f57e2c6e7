"""Finds the compiled CPU kernels or builds them once, or gives the reason why there are none.

The library lies in the package if the installation built it, else in the user's cache, under a name made of torch's
version, the compiler's flags, the content of the sources and its own content: another torch or another source has
another file, and a damaged file is built again.
"""

from __future__ import annotations

import contextlib
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mcl_kernels.backends import library as libraries
from mcl_kernels.backends.native_build import (
    PACKAGE,
    NativeUnavailableError,
    RefusedError,
    build,
    find_compiler,
    library_stem,
    source_directory,
)
from mcl_kernels.backends.native_cache import Cache, cache_directory, opened, say


def ops() -> Any:
    """Operators of the kernels. The first call of a process loads them, and builds them if there is no library yet.

    Raises:
        NativeUnavailableError: with the reason.
    """
    if reason := _loaded():
        raise NativeUnavailableError(reason)
    return torch.ops.mcl_kernels_native


def unavailable_reason(device: torch.device) -> str | None:
    """Returns why the kernels do not compute on a device, None if they do. Loads them, as `ops`."""
    return f"computes on CPU tensors: got device {device}" if device.type != "cpu" else _loaded()


def check(device: torch.device) -> None:
    """Raises an error if the kernels do not compute on a device. Loads them, as `ops`.

    Raises:
        ValueError: the device is not the CPU.
        NativeUnavailableError: with the reason.
    """
    if device.type != "cpu":
        raise ValueError(f"impl='native' computes on CPU tensors: got device {device}")
    ops()


def describe() -> tuple[list[str], str]:
    """Returns the types of device of this machine that the kernels compute on; their description, or why none."""
    if reason := _loaded():
        return [], reason
    try:
        instruction_set = ops().instruction_set()
    except RuntimeError as error:  # MCL_KERNELS_CPU names an instruction set that this CPU lacks
        return [], str(error)
    return ["cpu"], f"C++ kernels by tiles in sorted order (csrc/cpu), instruction set {instruction_set}"


@cache
def _loaded() -> str | None:
    """Loads the library, once per process. Returns the reason if that fails, else None."""
    try:
        _find_or_build()
    except NativeUnavailableError as error:
        return str(error)
    return None


def _find_or_build() -> None:
    sources = source_directory()
    stem = library_stem(sources)
    installed = libraries.find_libraries(PACKAGE / "lib", stem)
    if any(_is_intact(library) and libraries.load(library) is None for library in installed):
        return
    try:
        _load_or_build(sources, stem)
    except NativeUnavailableError as error:
        if not any(_loads_changed(library) for library in installed):
            damaged = f"; {installed[0]} was changed after it was built, and does not load" if installed else ""
            raise type(error)(f"{error}{damaged}") from error


def _is_intact(library: Path) -> bool:
    with contextlib.suppress(OSError):
        return libraries.is_intact(library)
    return False


def _loads_changed(library: Path) -> bool:
    """Loads an installed library that was changed after it was built (stripped, for example), after another process."""
    try:
        return libraries.check_loads(library) and libraries.load(library) is None
    except libraries.LibraryError:
        return False


def _load_or_build(sources: Path, stem: str) -> None:
    if sys.platform == "win32":
        raise NativeUnavailableError("the native kernels are built with GCC or Clang, not on Windows")
    with opened(cache_directory()) as cache:
        if _load_kept(cache, stem):
            return
        compiler = find_compiler()
        if reason := cache.remembered_failure(stem, compiler):
            raise NativeUnavailableError(reason)
        with cache.only_builder():
            if _load_kept(cache, stem):  # another process was first
                return
            if reason := cache.remembered_failure(stem, compiler):
                raise NativeUnavailableError(reason)
            try:
                library = _build(cache, sources)
                if reason := libraries.load(library):
                    raise RefusedError(f"the library that was built does not load in this process: {reason}")
            except RefusedError as error:
                cache.remember_failure(stem, compiler, str(error))
                raise


def _load_kept(cache: Cache, stem: str) -> bool:
    """Loads the first library that this process can load: machines of several systems may share a home directory."""
    return any(libraries.load(library) is None for library in cache.libraries(stem))


def _build(cache: Cache, sources: Path) -> Path:
    version = torch.__version__
    say(f"building the native CPU kernels for torch {version}, once, in about half a minute, into {cache.path}")
    started = time.monotonic()
    library = build(sources, cache.directory)
    say(f"built in {time.monotonic() - started:.0f} s")
    return library
