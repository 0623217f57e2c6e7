"""Kills a multistage run at every write, resumes it, and compares the features; run by test_stages.py.

One process imports everything and forks a child per attempt: `python -m tests.killed_run DIRECTORY`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from mcl_kernels import ConcatEncoder, MultistageRunner

INPUTS = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def encoder(state: dict[str, Tensor] | None = None) -> nn.Linear:
    module = nn.Linear(8, 4)
    if state is not None:
        module.load_state_dict(state)
    return module


def run(directory: Path) -> Tensor:
    """A run of two stages; the "training" of a stage depends on its labels, so a wrong resume shows."""
    runner = MultistageRunner(len(INPUTS), n_stages=2, n_clusters=3, directory=directory)
    for stage in runner:
        generator = torch.Generator().manual_seed(int((stage.labels * torch.arange(60)).sum()) + stage.index)
        model = encoder({"weight": torch.randn(4, 8, generator=generator), "bias": torch.zeros(4)})
        with torch.no_grad():
            stage.finish(model(INPUTS), state=model.state_dict())
    with torch.no_grad():
        return ConcatEncoder([encoder(done.state) for done in runner.finished])(INPUTS)


def kill_at(number: int, directory: Path) -> None:
    """Ends this process with SIGKILL just before its number-th write below `directory`."""
    writes = 0

    def written() -> None:
        nonlocal writes
        if writes == number:
            os.kill(os.getpid(), signal.SIGKILL)
        writes += 1

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in WRITES and str(arguments[0]).startswith(str(directory)):
            written()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        written()  # the content is in the page cache, not yet synced
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(hook)


def in_child(function: Callable[[], object]) -> int:
    """The wait status of a forked child that calls `function`."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitpid(child, 0)[1]


def main(root: Path) -> None:
    expected = root / "expected.pt"
    assert in_child(lambda: torch.save(run(root / "whole"), expected)) == 0
    features = torch.load(expected, weights_only=True)

    def resume(directory: Path) -> None:
        assert torch.equal(run(directory), features), "the resumed run has other features"
        left = [path.name for path in directory.iterdir() if not path.name.startswith("stage-")]
        assert not left, f"left behind: {left}"

    for number in count():
        directory = root / f"killed-{number}"

        def killed(directory: Path = directory, number: int = number) -> None:
            kill_at(number, directory)
            run(directory)

        status = in_child(killed)
        if status == 0:
            break
        assert os.WIFSIGNALED(status), f"attempt {number} failed by itself"
        assert in_child(lambda directory=directory: resume(directory)) == 0, f"killed at write {number}: not resumed"
    print(number)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
