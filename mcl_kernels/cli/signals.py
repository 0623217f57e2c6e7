"""Termination signals as exceptions, so that a command cleans up before it ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """Raised when SIGTERM or SIGHUP is received."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def raising_terminated() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP in a block into an exception, so that temporary files are removed."""

    def raise_terminated(number: int, _: FrameType | None) -> None:
        raise Terminated(number)

    caught = []
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        caught = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in caught:
        signal.signal(number, raise_terminated)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
