"""The user's directory of built libraries. A library that another user could replace is not used."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcl_kernels.backends.library import find_libraries, is_intact
from mcl_kernels.backends.native_build import Compiler, NativeUnavailableError

PR_GET_DUMPABLE = 3
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
LOCK_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
REMEMBERED_SECONDS = 24 * 3600
ABANDONED_AFTER = 3600  # seconds: a build takes one or two minutes
REMEMBERED_BYTES = 1 << 16
ANOTHER = "set XDG_CACHE_HOME to a directory of your own that can be written"


def cache_directory() -> Path:
    """Directory `mcl_kernels` in $XDG_CACHE_HOME, else in ~/.cache.

    A relative $XDG_CACHE_HOME is ignored, as its specification demands: it would follow the working directory.

    Raises:
        NativeUnavailableError: there is no home directory.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "mcl_kernels"
    try:
        return Path.home().absolute() / ".cache" / "mcl_kernels"
    except RuntimeError as error:
        raise NativeUnavailableError(
            "there is no directory for the built library: HOME is not set and the user has no entry in the system's "
            f"list; {ANOTHER}"
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[Cache]:
    """Opens the cache in a directory, which is created if it does not exist.

    Raises:
        NativeUnavailableError: the directory belongs to another user, others may write to it, or a system call fails
            in the block.
    """
    try:
        descriptor = _open_or_make(path)
    except OSError as error:
        raise NativeUnavailableError(f"{error.filename}: {error.strerror}; {ANOTHER}") from error
    try:
        _check_owner(path, descriptor)
        cache = Cache(path, descriptor)
        try:
            yield cache
        except NativeUnavailableError as error:
            raise type(error)(cache.named(str(error))) from error
        except OSError as error:
            name = cache.named(str(error.filename or path))
            raise NativeUnavailableError(f"{name}: {error.strerror}; {ANOTHER}") from error
    finally:
        os.close(descriptor)


def _open_or_make(path: Path) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was first
            path.mkdir(mode=0o700)
        return os.open(path, flags)


def _check_owner(path: Path, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if status.st_uid == os.geteuid() and status.st_mode & OTHERS_WRITE:
        # Made by an earlier version of this package, with the modes of the umask.
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & ~OTHERS_WRITE)
        status = os.fstat(descriptor)
    if reason := _distrust(status):
        remedy = f"chmod go-w {path}, or " if status.st_mode & OTHERS_WRITE else ""
        raise NativeUnavailableError(
            f"{path} is not used, since others could replace the library in it: {reason}; {remedy}{ANOTHER}"
        )


def _distrust(status: os.stat_result) -> str | None:
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {status.st_uid}, and this process to user {os.geteuid()}"
    if status.st_mode & OTHERS_WRITE:
        return f"its mode is {stat.S_IMODE(status.st_mode):03o}"
    return None


class Cache:
    """An open directory whose owner and mode are checked.

    Its files are reached through the descriptor if the system has /proc: whoever owns the parent directory may rename
    this one and put another in its place, but the files stay those of the checked one.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        through_descriptor = Path(f"/proc/{os.getpid()}/fd/{descriptor}")  # /proc/self would be a compiler's own
        self.directory = through_descriptor if through_descriptor.exists() and _is_open_to_children() else path

    def named(self, text: str) -> str:
        """Returns the text with the directory's path in place of the one through the descriptor."""
        return text.replace(str(self.directory), str(self.path))

    def libraries(self, stem: str) -> Iterator[Path]:
        """Yields the libraries kept under `stem`; removes those that are damaged or that others may have written."""
        for library in find_libraries(self.directory, stem):
            with contextlib.suppress(OSError):  # a library that cannot be read now may be intact
                if self._is_trusted(library) and is_intact(library):
                    yield library
                else:
                    library.unlink()

    def _is_trusted(self, file: Path) -> bool:
        try:
            status = file.lstat()
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and _distrust(status) is None

    @contextmanager
    def only_builder(self) -> Iterator[None]:
        """Holds a lock that the system releases when the process ends, however it ends. Removes files of killed builds.

        Prints a line before it waits for another process.
        """
        import fcntl

        # Not truncated, and no link is followed: in an earlier version others could write here, and plant a link.
        path = self.directory / "build.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise NativeUnavailableError(f"{self.path / path.name} is a symbolic link; delete it") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process, which builds in {self.path}")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._clear_abandoned()
        except OSError as error:
            if error.errno not in LOCK_UNSUPPORTED:
                raise
            # Two processes may then build the same; each keeps a complete library.
        try:
            yield
        finally:
            # A process that was forked meanwhile holds the file open, and with it the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _clear_abandoned(self) -> None:
        """Removes old files of killed builds. New ones may be in use: some locks hold on one machine alone."""
        now = self.directory.stat().st_mtime
        for left in self.directory.glob(".build-*"):
            with contextlib.suppress(OSError):
                if left.lstat().st_mtime < now - ABANDONED_AFTER:
                    shutil.rmtree(left, ignore_errors=True)

    def remembered_failure(self, stem: str, compiler: Compiler) -> str | None:
        """Returns why this compiler failed within the last day, so that no process waits for it again; None if not."""
        path = self.directory / f"{stem}.failed"
        try:
            if not self._is_trusted(path) or path.stat().st_size > REMEMBERED_BYTES:
                return None
            failed = json.loads(path.read_text())
            age = time.time() - failed["time"]
            if failed["compiler"] != [compiler.command, compiler.version] or not 0 <= age < REMEMBERED_SECONDS:
                return None
            return f"{failed['reason']} (delete {self.path / path.name} to try again)"
        except (OSError, ValueError, LookupError, TypeError, RecursionError):  # damaged: nothing is remembered
            return None

    def remember_failure(self, stem: str, compiler: Compiler, reason: str) -> None:
        """Writes the failure completely or not at all."""
        content = {"compiler": list(compiler), "time": time.time(), "reason": self.named(reason)}
        with (
            contextlib.suppress(OSError),
            tempfile.TemporaryDirectory(dir=self.directory, prefix=".build-") as scratch,
            (Path(scratch) / "failed").open("w") as file,
        ):
            os.fchmod(file.fileno(), 0o600)  # whatever the umask
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, self.directory / f"{stem}.failed")


def _is_open_to_children() -> bool:
    """Returns whether other processes of this user can open /proc/PID/fd; after a change of user they cannot."""
    try:
        return bool(ctypes.CDLL(None).prctl(PR_GET_DUMPABLE) == 1)
    except (AttributeError, OSError):  # not Linux
        return False


def say(text: str) -> None:
    """Prints a line on the standard error, if it can be printed."""
    with contextlib.suppress(OSError, ValueError):
        print(f"mcl_kernels: {text}", file=sys.stderr, flush=True)
