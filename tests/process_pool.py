"""A pool of processes that communicate over gloo; since they take seconds to start, all tests share one."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.distributed as dist

ANSWER_TIMEOUT = 120.0  # seconds


class RankPool:
    """Processes, one for each of `world_size` ranks, that run the functions given to `run`."""

    def __init__(self, world_size: int, timeout: float = 60.0) -> None:
        self.world_size, self.timeout = world_size, timeout
        self.started = False

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Returns the result of `function(*arguments)` on each rank. The function must be picklable: no lambda.

        If a rank fails, raises AssertionError with all tracebacks; the next run then starts new processes.
        """
        self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            try:
                failed, result = pipe.recv() if pipe.poll(ANSWER_TIMEOUT) else (True, "no answer")
            except EOFError:
                failed, result = True, "the process ended"
            results.append(result)
            if failed:
                failures.append(f"rank {rank}: {result}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def stop(self) -> None:
        if self.started:
            for process in self.processes:
                process.kill()
                process.join()
            self.directory.cleanup()
            self.started = False

    def _start(self) -> None:
        if self.started:
            return
        context = multiprocessing.get_context("spawn")
        self.directory = tempfile.TemporaryDirectory()
        ends = [context.Pipe() for _ in range(self.world_size)]
        self.pipes = [ours for ours, _ in ends]
        self.processes = [
            context.Process(
                target=_serve,
                args=(theirs, Path(self.directory.name), rank, self.world_size, self.timeout),
                daemon=True,
            )
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process, (_, theirs) in zip(self.processes, ends, strict=True):
            process.start()
            theirs.close()
        for pipe in self.pipes:
            pipe.recv()  # all imports are done: they would count against the timeout of the group
        for pipe in self.pipes:
            pipe.send("begin")
        self.started = True

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _serve(pipe: Connection, directory: Path, rank: int, world_size: int, timeout: float) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    pipe.send("ready")
    pipe.recv()
    store, limit = f"file://{directory / 'store'}", timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*arguments)))
        except (Exception, pytest.fail.Exception):
            pipe.send((True, traceback.format_exc()))
