"""Standard streams of the commands: a line that cannot be printed is lost, and no work with it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

PROGRESS_SECONDS = 30.0


class SafeStream(io.TextIOBase):
    """A standard stream that raises nothing: characters outside its encoding are escaped, text it cannot take is lost.

    `error` is the first failure, after which everything is discarded.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        return self.error is None and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.error is None:
            with self._noting_error():
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            with self._noting_error():
                self._stream.flush()

    @contextlib.contextmanager
    def _noting_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            # The interpreter flushes the stream once more when it ends, and would report the failure again.
            with contextlib.suppress(OSError):  # a stream without a descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def safe_streams() -> Iterator[SafeStream]:
    """Makes standard output, which is returned, and standard error safe for a block."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell: otherwise the next file opened takes its descriptor
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    out, err = SafeStream(sys.stdout), SafeStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield out
        finally:
            out.flush()
            err.flush()


def one_line(text: object) -> str:
    """Text with line breaks and control characters escaped, which names of files may hold."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class Terminated(KeyboardInterrupt):
    """Raised by a signal that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def raising_terminated() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a block by an exception, so that temporary files are removed."""

    def end(number: int, _: FrameType | None) -> None:
        raise Terminated(number)

    caught = []
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        caught = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


class ProgressLines(logging.Handler):
    """Prints a line of progress at most every 30 s, on standard error."""

    def __init__(self) -> None:
        super().__init__()
        self.started = self.printed = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())

    def say(self, text: str) -> None:
        now = time.monotonic()
        if now - self.printed >= PROGRESS_SECONDS:
            self.printed = now
            print(f"{text}, {now - self.started:.0f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def logged_progress() -> Iterator[None]:
    """Prints what the library logs of its progress where no bar shows it: standard error is no terminal."""
    logger, lines = logging.getLogger("mcl_kernels"), ProgressLines()
    if sys.stderr.isatty():
        yield
        return
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
