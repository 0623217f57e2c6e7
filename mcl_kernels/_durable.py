"""Writes files that are either complete or absent, on file systems with different guarantees.

New content is written to a temporary file, synced, and renamed over the old file. The directory is synced too if
possible: Windows cannot open directories, some file systems cannot sync them, and a parent may not be readable.
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
_SYNC_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_CANNOT_OPEN_DIRECTORY = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL}


@contextlib.contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file for writing, which is on disk when the block ends."""
    with path.open("xb") as file:  # exclusive: follows no link, and no other process writes to the file
        yield file
        file.flush()
        _sync(file.fileno())


@contextlib.contextmanager
def replaced_files(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Yields files that replace `paths` when the block ends: all are on disk before the first is renamed, in order.

    Readers see either the old content of a path or the new one. A path that is a symbolic link stays one: its target is
    replaced. If the block raises, or a file cannot be synced, every path is left unchanged.

    Warns:
        RuntimeWarning: the files are replaced, but a power failure may undo it, since their directory was not synced.
    """
    targets = [_replaceable_target(path) for path in paths]
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
    """Yields a file that replaces `path` when the block ends; see `replaced_files`."""
    with replaced_files(path) as (file,):
        yield file


def replace_file(path: Path, content: bytes) -> None:
    """Replaces the content of a file in one step."""
    with replaced_file(path) as file:
        file.write(content)


def write_array(file: BinaryIO, array: np.ndarray[Any, Any]) -> None:
    """Writes a contiguous array in the format of `np.save`, without a copy; an error of the disk keeps its errno."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; raises an OSError for a device, a pipe or a directory, without reading it."""
    # Non-blocking: opening a pipe would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
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
    """Creates the directory, and raises an OSError if files cannot be written and renamed in it."""
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
    """Makes renames within a directory durable, if the system supports it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _CANNOT_OPEN_DIRECTORY:
            return
        raise
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def sync_renames(directory: Path) -> None:
    """Makes completed renames durable; an error becomes a warning, since the files themselves are complete."""
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
    """Returns a path in the directory that no other process uses; its length does not depend on the final name."""
    return directory / f"{PREFIX}{uuid.uuid4().hex}{SUFFIX}"


def link_target(path: Path) -> Path:
    """Returns the file that a path refers to through symbolic links; a symbolic link only if the links form a loop."""
    return Path(os.path.realpath(path))


def _replaceable_target(path: Path) -> Path:
    """Returns `link_target(path)`; raises an OSError for a loop of links."""
    target = link_target(path)
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _sync(descriptor: int) -> None:
    """Syncs an open file or directory, if the file system supports it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _SYNC_UNSUPPORTED:
            raise


def _clear_abandoned(directory: Path) -> None:
    """Removes temporary files that killed processes have left."""
    with contextlib.suppress(OSError):
        now = directory.stat().st_mtime  # a file was renamed just now, so this is the clock of the file server
        for path in directory.glob(f"{PREFIX}*{SUFFIX}"):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < now - ABANDONED_AFTER:
                    path.unlink()
