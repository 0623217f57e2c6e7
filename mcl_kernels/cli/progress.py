"""Lines of progress on standard error, for runs without a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

PROGRESS_SECONDS = 30.0


class ProgressLines(logging.Handler):
    """Prints log records as lines of progress on standard error, at most one every 30 s."""

    def __init__(self) -> None:
        super().__init__()
        self.started = self.last_printed = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.print_if_due(record.getMessage())

    def print_if_due(self, text: str) -> None:
        """Prints a line if the last one was printed at least 30 s ago."""
        now = time.monotonic()
        if now - self.last_printed >= PROGRESS_SECONDS:
            self.last_printed = now
            print(f"{text}, {now - self.started:.0f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def logged_progress() -> Iterator[None]:
    """Prints the progress that the library logs, unless standard error is a terminal, where a bar shows it."""
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
