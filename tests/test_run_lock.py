"""The lock of a run directory: one process at a time trains in it, and others are refused before they train."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mcl_kernels import MultistageRunner
from mcl_kernels.stages.run_lock import only_process
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
    """Starts a process that trains the first stage of a run, and finishes it when it reads a line."""
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
        assert runner_in(tmp_path).finished == []  # reading needs no lock
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(60) == 0
    # The stage that the other process has finished is not trained again.
    assert [stage.index for stage in [next(iter(runner))]] == [1]
    assert torch.equal(runner.labels, run(None, n_stages=1).labels)
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]


def test_a_killed_process_releases_the_lock(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert len(run(tmp_path).finished) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-0", "stage-1", "stage-2"]


def test_runners_of_one_process_do_not_exclude_one_another(tmp_path: Path) -> None:
    """In a notebook the iterator of an interrupted cell still exists."""
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


def test_a_forked_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
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
        # The parent still holds the lock after the child has ended.
        result = subprocess.run(
            [sys.executable, "-c", TRAINS, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
        )
        assert "is in use by process" in result.stderr


def test_a_removed_lock_file_is_locked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last holder may remove the file after it is opened here, before it is locked: others would lock a new one."""
    import fcntl

    flock, removed = fcntl.flock, []

    def remove_once(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_once)
    with only_process(tmp_path):
        result = subprocess.run(
            [sys.executable, "-c", TRAINS, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
        )
        assert "is in use by process" in result.stderr


@pytest.mark.parametrize("planted", ["link", "directory"])
def test_a_planted_lock_file_is_not_changed(tmp_path: Path, planted: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("content")
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / ".lock").symlink_to(victim) if planted == "link" else (directory / ".lock").mkdir()
    next(iter(runner_in(directory))).finish(embeddings())
    assert victim.read_text() == "content"


def test_stages_run_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert len(run(tmp_path, n_stages=2).finished) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-0", "stage-1"]


def test_copying_the_directory_keeps_the_lock(tmp_path: Path) -> None:
    """Artifact loggers copy the directory during training."""
    (tmp_path / "run").mkdir()
    with only_process(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        result = subprocess.run(
            [sys.executable, "-c", TRAINS, str(tmp_path / "run")], capture_output=True, text=True, check=False
        )
        assert "is in use by process" in result.stderr


def test_a_forked_process_that_outlives_its_parent_holds_no_lock(tmp_path: Path) -> None:
    """Workers of a DataLoader outlive it by some seconds."""
    code = (
        "import os, sys, time; from pathlib import Path; from mcl_kernels.stages.run_lock import only_process\n"
        "with only_process(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: print('worker', flush=True); time.sleep(60)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "worker\n"
        parent.kill()
        parent.stdout.close()
        parent.wait(60)
        with only_process(tmp_path):
            pass
        os.killpg(parent.pid, signal.SIGKILL)


def test_an_iterator_that_is_collected_while_another_takes_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted iterator may be in a reference cycle, and the garbage collector may run at any point."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    cycle: list[Any] = [iter(runner_in(tmp_path / "a"))]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    node = platform.node
    monkeypatch.setattr(platform, "node", lambda: (gc.collect(), node())[1])
    thread = threading.Thread(target=lambda: next(iter(runner_in(tmp_path / "b"))), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
