"""Compiled libraries under names that hold a digest of their content.

Loading a truncated library ends the process with SIGBUS, so the content is compared with the name first. This module
needs the standard library only: setup.py imports it without the rest of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

TRIAL_SECONDS = 120.0
SUFFIXES = (".so", ".pyd")  # the latter on Windows
DIGITS = 32  # of the digest in a name
# The search path is that of this process, so that its torch is the one that is imported.
TRIAL = """
import ctypes, json, sys
sys.path[:] = json.loads(sys.argv[2])
import torch
print("tried", flush=True)
try:
    ctypes.CDLL(sys.argv[1])
except OSError as error:
    print(error)
else:
    print("loaded")
"""


class LibraryError(RuntimeError):
    """A library that does not load; the message holds the loader's reason."""


def is_intact(library: Path) -> bool:
    """Returns whether the digest in the name is that of the content.

    Raises:
        OSError: the content cannot be read now.
    """
    return library.stem.endswith(f"-{_digest(library)}")


def find_libraries(directory: Path, stem: str) -> list[Path]:
    """Returns the libraries kept under `stem`, damaged ones too."""
    return sorted(path for path in directory.glob(f"{stem}-*") if path.suffix in SUFFIXES)


def keep(built: Path, directory: Path, stem: str) -> Path:
    """Moves a library into a directory of the same file system, after another process has loaded it.

    Returns its path. Content and name are on disk then.

    Raises:
        LibraryError: the library does not load.
    """
    check_loads(built)
    built.chmod(0o755)
    _sync(built)
    kept = directory / f"{stem}-{_digest(built)}{built.suffix}"
    built.replace(kept)
    with contextlib.suppress(OSError):  # if the name is lost, the library is built again
        _sync(directory)
    return kept


def check_loads(library: Path) -> bool:
    """Loads the library in another process. Returns whether it loaded; raises LibraryError if it failed.

    A library that ends the process has failed. Returns False if no such process can be started, as in a program that
    Python is embedded in or frozen into.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        return False
    command = [sys.executable, "-c", TRIAL, str(library), json.dumps([str(path) for path in sys.path])]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", check=False,
            timeout=TRIAL_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:  # sys.executable is another program than Python
        return False
    lines = result.stdout.splitlines()
    if "tried" not in lines:
        return False
    if result.returncode < 0:
        raise LibraryError(f"loading it ended with signal {-result.returncode}")
    if lines[-1] not in ("tried", "loaded"):
        raise LibraryError(lines[-1].removeprefix(f"{library}: "))
    return lines[-1] == "loaded"


def load(library: Path) -> str | None:
    """Loads a library, which adds its operators to `torch.ops`. Returns the loader's reason if that fails, else None.

    `torch.ops.load_library` would resolve the path: one through the descriptor of a directory, as `native_cache` uses,
    would become a path whose directories others can replace.
    """
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error).removeprefix(f"{library}: ")
    return None


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows can sync neither a directory nor a loaded library
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:DIGITS]
