"""One process at a time in the directory of a run."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAME = ".lock"


@dataclass
class _Lock:
    """A lock that this process holds."""

    descriptor: int
    process: int
    holders: int = 1


_locks: dict[Path, _Lock] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def only_process(directory: Path) -> Iterator[None]:
    """Keeps other processes out of a directory as long as the block lasts, or until this process ends, however it ends.

    Blocks of one process do not exclude one another. Where the system has no locks of files, nothing is kept out.

    Raises:
        RuntimeError: another process is in such a block.
    """
    path = directory.resolve() / NAME
    with _guard:
        lock = _acquire(path)
    try:
        yield
    finally:
        if lock is not None:
            with _guard:
                _release(path, lock)


def _acquire(path: Path) -> _Lock | None:
    try:
        import fcntl
    except ImportError:  # on Windows
        return None
    held = _locks.get(path)
    # A forked process finds the entries of its parent, whose locks are not its own.
    if held is not None and held.process == os.getpid():
        held.holders += 1
        return held
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError:  # the file of another user, say
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
            raise RuntimeError(
                f"directory {path.parent} is in use by {holder or 'another process'}: give each run a directory of its "
                "own; the ranks of one run share one with group=torch.distributed.group.WORLD"
            ) from None
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # its last holder has removed it since it was opened
    with contextlib.suppress(OSError):  # only for the message of others
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    _locks[path] = lock = _Lock(descriptor, os.getpid())
    return lock


def _release(path: Path, lock: _Lock) -> None:
    lock.holders -= 1
    if lock.holders == 0 and lock.process == os.getpid():
        del _locks[path]
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(lock.descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
