"""Files that are complete or absent, on file systems that differ in what they can promise.

New content goes to a temporary file of its own, is synced, and is renamed over the old one. The rename is synced too,
where that is possible: Windows opens no directory, some file systems sync none, and a parent may be closed to us.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PREFIX, SUFFIX = ".mcl_kernels-", ".partial"
ABANDONED_AFTER = 3600.0  # seconds without a write
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_CLOSED_DIRECTORY = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL}


@contextlib.contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which is on disk when the block ends."""
    with path.open("xb") as file:  # exclusive: follows no link and shares the file with no other process
        yield file
        file.flush()
        _sync(file.fileno())


@contextlib.contextmanager
def replaced_files(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Files to write in place of `paths`: all are on disk before the first is renamed, in the order given.

    Readers see the old content of a path or the new one. A path that is a symbolic link stays one: its target is
    replaced. What ends the block early, or keeps a file from being synced, leaves every path as it was.

    Warns:
        RuntimeWarning: the files are replaced, but a power failure may undo it, since their directory was not synced.
    """
    targets = [_target(path) for path in paths]
    partials: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            files = []
            for target in targets:
                partial = temporary_name(target.parent)
                files.append(stack.enter_context(synced_file(partial)))
                partials.append(partial)
            yield files
        for partial, target in zip(partials, targets, strict=True):
            partial.replace(target)
    except BaseException:
        for partial in partials:
            with contextlib.suppress(OSError):
                partial.unlink()
        raise
    for directory in dict.fromkeys(target.parent for target in targets):
        sync_renames(directory)
        _clear_abandoned(directory)


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Replaces one file, as `replaced_files` does."""
    with replaced_files(path) as (file,):
        yield file


def replace_file(path: Path, content: bytes) -> None:
    """Replaces the content of a file in one step."""
    with replaced_file(path) as file:
        file.write(content)


def write_array(file: BinaryIO, array: np.ndarray[Any, Any]) -> None:
    """Writes what `np.save` writes of a contiguous array, without a copy; a full disk keeps its errno."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to read; raises at once for a device, a pipe or a directory, from which reading may never end."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe would wait for a writer
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file of any size."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_writable(directory: Path) -> None:
    """Makes the directory, and raises now what would otherwise be raised after hours of work."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sync_directory(directory.parent)
        probe, renamed = temporary_name(directory), temporary_name(directory)
        try:
            probe.write_bytes(b"writable")
            probe.rename(renamed)
        finally:
            probe.unlink(missing_ok=True)
            renamed.unlink(missing_ok=True)
        _clear_abandoned(directory)
    except OSError as error:
        raise OSError(error.errno, f"directory cannot be written ({error.strerror})", str(directory)) from error


def sync_directory(path: Path) -> None:
    """Makes renames within a directory durable, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _CLOSED_DIRECTORY:
            return
        raise
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def sync_renames(directory: Path) -> None:
    """Makes a rename durable that has taken place; an error becomes a warning, since the content is complete."""
    try:
        sync_directory(directory)
    except OSError as error:
        warnings.warn(
            f"mcl_kernels: the files in {directory} are complete, but a power failure may undo their renaming: "
            f"the directory could not be synced ({error.strerror})",
            RuntimeWarning,
            stacklevel=2,
        )


def temporary_name(directory: Path) -> Path:
    """A path in the directory that no other process uses; its length does not depend on the file to write."""
    return directory / f"{PREFIX}{uuid.uuid4().hex}{SUFFIX}"


def _target(path: Path) -> Path:
    """The file that a path leads to through symbolic links."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _clear_abandoned(directory: Path) -> None:
    """Removes what killed processes left of files they were writing."""
    with contextlib.suppress(OSError):
        now = directory.stat().st_mtime  # by the clock of the file server: a file was renamed just now
        for path in directory.glob(f"{PREFIX}*{SUFFIX}"):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < now - ABANDONED_AFTER:
                    path.unlink()
