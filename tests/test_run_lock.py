"""One process at a time trains in the directory of a run; the others are refused before they train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mcl_kernels import MultistageRunner
from mcl_kernels.run_lock import only_process
from tests.stage_runs import N, embeddings, run

IN_USE = r"directory .* is in use by process \d+ on .*: give each run .*group=torch.distributed.group.WORLD"
TRAINS = """
import sys, torch
from mcl_kernels import MultistageRunner
for stage in MultistageRunner(60, n_clusters=4, n_stages=1, directory=sys.argv[1]):
    print("trains", flush=True)
    sys.stdin.readline()
    stage.finish(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)))
"""


@contextmanager
def another_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the first stage of a run, which it finishes when it reads a line."""
    command = [sys.executable, "-c", TRAINS, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "trains\n"
        yield process
        process.kill()


def runner_in(directory: Path, **options: int) -> MultistageRunner:
    return MultistageRunner(N, n_clusters=4, directory=directory, **options)


def test_a_second_process_is_refused_before_it_trains(tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    with another_process(tmp_path) as process:
        with pytest.raises(RuntimeError, match=IN_USE):
            next(iter(runner))
        assert runner_in(tmp_path).finished == []  # reading is free
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(60) == 0
    # What the other has finished meanwhile is not trained again.
    assert [stage.index for stage in [next(iter(runner))]] == [1]
    assert torch.equal(runner.labels, run(None, n_stages=1).labels)
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]


def test_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert len(run(tmp_path).finished) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-0", "stage-1", "stage-2"]


def test_runners_of_one_process_do_not_exclude_one_another(tmp_path: Path) -> None:
    """As in a notebook, where the run of an interrupted cell is still there."""
    interrupted = iter(runner_in(tmp_path))
    next(interrupted)
    again = iter(runner_in(tmp_path))
    next(again)
    del interrupted
    child = subprocess.run(
        [sys.executable, "-c", TRAINS, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "is in use by process" in child.stderr
    del again
    with another_process(tmp_path):
        pass


def test_a_forked_process_does_not_hold_what_its_parent_holds(tmp_path: Path) -> None:
    with only_process(tmp_path):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with only_process(tmp_path):
                    pass
            except RuntimeError:
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        # That the child has ended takes nothing from the parent.
        result = subprocess.run(
            [sys.executable, "-c", TRAINS, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
        )
        assert "is in use by process" in result.stderr


@pytest.mark.parametrize("planted", ["link", "directory"])
def test_a_planted_file_is_left_alone(tmp_path: Path, planted: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("content")
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / ".lock").symlink_to(victim) if planted == "link" else (directory / ".lock").mkdir()
    next(iter(runner_in(directory))).finish(embeddings())
    assert victim.read_text() == "content"


def test_stages_go_on_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert len(run(tmp_path, n_stages=2).finished) == 2
