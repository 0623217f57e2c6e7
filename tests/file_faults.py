"""Injects a fault at any file system call: the process is killed before the call, or the call fails with an error.

`file_faults.c` is preloaded into a Python process, which arms the fault. The file system itself is the real one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
KILL = 0
ERRORS = (errno.ENOSPC, errno.EIO)


def run_with_faults(module: str, directory: Path) -> str:
    """Runs `python -m module directory` with the preloaded library; returns its output."""
    library = directory / "faults.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, SOURCE, "-ldl"], check=True)
    (directory / "runs").mkdir()
    result = subprocess.run(
        [sys.executable, "-m", module, str(directory / "runs")],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "LD_PRELOAD": str(library)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@contextmanager
def fault(directory: Path, at: int, error: int, *, lasting: bool = False) -> Iterator[list[int]]:
    """Makes call number `at` (from 0) below the directory fail in the block; with `lasting` all later calls too.

    Yields a list that receives the number of calls when the block ends.
    """
    library, calls = ctypes.CDLL(None), [0]
    library.fault_arm(os.fsencode(directory), ctypes.c_long(at), error, lasting)
    try:
        yield calls
    finally:
        calls[0] = library.fault_disarm()


def killed_at_each_call(work: Callable[[Path], object], directories: Iterator[Path]) -> Iterator[Path]:
    """Kills forked processes at their first, second, ... call, and yields their directories, until one survives."""
    import torch

    for number in count():
        directory = next(directories)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            status = 1
            try:
                with fault(directory, number, KILL):
                    work(directory)
                status = 0
            finally:
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        assert os.WIFSIGNALED(status), f"attempt {number} failed by itself"
        yield directory
