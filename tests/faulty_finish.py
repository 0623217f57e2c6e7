"""Multistage runs that are killed, or fail, at each file system call.

`python -m tests.faulty_finish DIRECTORY`, see file_faults.py; prints the number of calls and the outcomes.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import warnings
from collections import Counter
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from mcl_kernels import ConcatEncoder, MultistageRunner
from mcl_kernels._durable import ABANDONED_AFTER, check_writable
from tests.file_faults import ERRORS, fault, killed_at_each_call

INPUTS = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


def encoder(state: dict[str, Tensor] | None = None) -> nn.Linear:
    module = nn.Linear(8, 4)
    if state is not None:
        module.load_state_dict(state)
    return module


def runner_in(directory: Path) -> MultistageRunner:
    return MultistageRunner(len(INPUTS), n_stages=2, n_clusters=3, directory=directory)


def run(directory: Path, runner: MultistageRunner | None = None) -> Tensor:
    """Runs two stages; the "training" of a stage depends on its labels, so a wrong resume changes the result."""
    runner = runner or runner_in(directory)
    for stage in runner:
        generator = torch.Generator().manual_seed(int((stage.labels * torch.arange(60)).sum()) + stage.index)
        model = encoder({"weight": torch.randn(4, 8, generator=generator), "bias": torch.zeros(4)})
        with torch.no_grad():
            stage.finish(model(INPUTS), state=model.state_dict())
    with torch.no_grad():
        return ConcatEncoder([encoder(done.state) for done in runner.finished])(INPUTS)


def stages_in(directory: Path) -> int:
    """Number of finished stages; checks that each can be read, and that all other files are temporary."""
    for path in directory.iterdir():
        assert path.name.startswith(("stage-", ".stage-", ".mcl_kernels-")) or path.name == ".lock", path
    runner = runner_in(directory)
    assert all(done.state is not None for done in runner.finished)
    return len(runner.finished)


def check_temporary_files_are_removed(directory: Path) -> None:
    for path in directory.glob(".mcl_kernels-*"):
        os.utime(path, (0, path.stat().st_mtime - 2 * ABANDONED_AFTER))
    check_writable(directory)
    remaining = {path.name for path in directory.iterdir()} - {"stage-0", "stage-1", ".lock"}
    assert not remaining, remaining


def kill(root: Path, features: Tensor) -> str:
    directories = [root / f"killed-{number}" for number in range(1000)]
    finished: Counter[int] = Counter()
    for directory in killed_at_each_call(run, iter(directories)):
        finished[stages_in(directory) if directory.exists() else 0] += 1
        assert torch.equal(run(directory), features), directory
        check_temporary_files_are_removed(directory)
    return f"killed: {finished.total()} points, finished stages left {dict(sorted(finished.items()))}"


def fail(root: Path, features: Tensor, error: int, *, lasting: bool) -> str:
    """Runs the second stage on a disk that fails at one call, or from that call on."""
    first = root / "complete" / "stage-0"
    outcomes: Counter[str] = Counter()
    for number in count():
        directory = root / f"failed-{error}-{lasting}-{number}"
        directory.mkdir()
        shutil.copytree(first, directory / "stage-0")
        runner = runner_in(directory)
        raised = None
        with warnings.catch_warnings(), fault(directory, number, error, lasting=lasting) as calls:
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                run(directory, runner)
            except OSError as caught:
                raised = caught
        if calls[0] <= number:
            break
        assert raised is None or raised.errno == error
        finished = len(runner.finished)
        assert stages_in(directory) == finished, (number, finished)
        assert raised or finished == 2
        outcomes[f"{'raised' if raised else 'no error'}, {finished} stages"] += 1
        # The same runner resumes.
        assert torch.equal(run(directory, runner), features), number
        check_temporary_files_are_removed(directory)
    name = errno.errorcode[error] + (" from then on" if lasting else "")
    return f"{name}: {outcomes.total()} points, {dict(sorted(outcomes.items()))}"


def main(root: Path) -> None:
    torch.set_num_threads(1)
    features = run(root / "complete")
    print(kill(root, features))
    for error in ERRORS:
        for lasting in (False, True):
            print(fail(root, features, error, lasting=lasting))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
