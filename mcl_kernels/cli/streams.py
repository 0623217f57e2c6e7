"""Standard streams of the commands. A line that cannot be printed is dropped, and the command continues."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class SafeStream(io.TextIOBase):
    """A standard stream that never raises: characters outside its encoding are escaped.

    Attributes:
        error: the first failure to write, after which all text is dropped; None before.
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
            with self._recording_error():
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            with self._recording_error():
                self._stream.flush()

    @contextlib.contextmanager
    def _recording_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            # The interpreter flushes the stream again at exit, and would report the failure a second time.
            with contextlib.suppress(OSError):  # for a stream without a descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def safe_streams() -> Iterator[SafeStream]:
    """Makes standard output and standard error safe for a block; yields standard output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell: the next file opened would take its descriptor
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    out, err = SafeStream(sys.stdout), SafeStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield out
        finally:
            out.flush()
            err.flush()


def one_line(text: object) -> str:
    """Returns the text with line breaks and control characters escaped: names of files may contain them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
