"""A lock that lets one process at a time train in the directory of a run."""

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
    holders: int = 1


_locks: dict[Path, _Lock] = {}
# Reentrant: the garbage collector may release the lock of an abandoned iterator while this thread holds the guard.
_guard = threading.RLock()


def _forget_locks() -> None:
    """Closes the locks that a forked process has inherited; otherwise they would outlive its parent."""
    global _guard
    _guard = threading.RLock()
    for lock in _locks.values():
        os.close(lock.descriptor)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextlib.contextmanager
def only_process(directory: Path) -> Iterator[None]:
    """Locks a directory against other processes until the block or this process ends, however it ends.

    Blocks of one process do not exclude one another. On systems without file locks this does nothing.

    Raises:
        RuntimeError: another process holds the lock.
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
    if held is not None:
        held.holders += 1
        return held
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError:  # for example a file of another user
            return None
        try:
            # flock belongs to the open file, so closing another descriptor of the file (of a copy, say) keeps the lock.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                with contextlib.suppress(OSError):
                    path.unlink()
                return None
            raise RuntimeError(
                f"directory {path.parent} is in use by {holder or 'another process'}: give each run a directory of its "
                "own; the ranks of one run share one with group=torch.distributed.group.WORLD"
            ) from None
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # the previous holder removed the file after it was opened here
    with contextlib.suppress(OSError):  # the content is only for error messages of other processes
        if os.fstat(descriptor).st_nlink == 1:  # else a hard link to a file of somebody else
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    _locks[path] = lock = _Lock(descriptor)
    return lock


def _release(path: Path, lock: _Lock) -> None:
    lock.holders -= 1
    if lock.holders == 0 and _locks.get(path) is lock:  # else a forked process has dropped it already
        del _locks[path]
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(lock.descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Returns whether an open file is still the one at a path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
