"""Stages on disk: complete or absent after any kill and any error, and resumed from any of them."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mcl_kernels import MultistageRunner
from mcl_kernels.stages import files as stage_files
from tests.file_faults import run_with_faults
from tests.stage_runs import N, embeddings, replace_in_stage, run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs Linux and gcc")
def test_killed_or_failing_at_each_call_of_the_file_system(tmp_path: Path) -> None:
    """No stage is lost or damaged, and the resumed run ends with the same features."""
    killed, *failed = run_with_faults("tests.faulty_finish", tmp_path).splitlines()
    # Per stage at least: a directory, five files opened, written, synced and closed, two directories, a rename.
    assert int(killed.split()[1]) >= 2 * 40
    assert len(failed) == 4
    assert all(int(outcomes.split(": ")[1].split()[0]) >= 40 for outcomes in failed)


@pytest.mark.filterwarnings("ignore:stage 3 will have few negatives")
def test_int64_labels_of_earlier_versions_are_read(tmp_path: Path) -> None:
    expected = run(tmp_path).labels.clone()
    for index in range(3):
        path = tmp_path / f"stage-{index}" / "labels.npy"
        buffer = io.BytesIO()
        np.save(buffer, np.load(path).astype(np.int64))
        replace_in_stage(path.parent, path.name, buffer.getvalue())
    runner = MultistageRunner(N, n_clusters=4, directory=tmp_path, n_stages=4)
    assert torch.equal(runner.labels, expected)
    for stage in runner:
        assert stage.labels[[3, 1]].tolist() == expected[[3, 1]].tolist()
        stage.finish(embeddings(3))
    assert torch.equal(runner.labels, run(n_stages=4).labels)


def test_other_directories_and_more_stages_are_no_gap(tmp_path: Path) -> None:
    """The directory holds a copy of a stage, or more stages than the runner reads."""
    expected = run(tmp_path)
    shutil.copytree(tmp_path / "stage-0", tmp_path / "stage-0.bak")
    assert len(MultistageRunner(N, n_clusters=4, directory=tmp_path).finished) == 3
    short = MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path)
    assert list(short) == []
    assert torch.equal(short.labels, expected.finished[0].labels)


def test_files_are_synced_before_the_rename_and_directories_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"rename to {to}"), rename(self, to)))
    stage = next(iter(MultistageRunner(N, n_clusters=4, directory=tmp_path)))
    events.clear()
    stage.finish(embeddings(), state={"w": torch.zeros(1)})
    names = [Path(event).name for event in events]
    assert set(names[:5]) == {"centers.npy", "labels.npy", "tuples.npy", "state.safetensors", "stage.json"}
    assert names[5].startswith(".stage-0.")
    assert events[6:] == [f"rename to {tmp_path / 'stage-0'}", str(tmp_path)]


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".stage-0.0123"
    stale.mkdir(parents=True)
    (stale / "labels.npy").write_bytes(b"half")
    run(tmp_path, n_stages=1)
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]


@pytest.mark.slow
def test_processes_that_finish_the_same_stage_at_once(tmp_path: Path) -> None:
    """One of them saves it, the others raise, and the saved stage is complete."""
    code = (
        "import sys, torch; from mcl_kernels import MultistageRunner; torch.set_num_threads(1)\n"
        f"stage = next(iter(MultistageRunner({N}, n_clusters=4, n_stages=1, directory={str(tmp_path)!r})))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"try: stage.finish(torch.randn({N}, 8), state={{'w': torch.zeros(100_000)}}); print('saved')\n"
        "except FileExistsError: print('late')\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = []
    for _ in range(3):  # one after the other: a run that begins has the directory to itself
        children.append(subprocess.Popen([sys.executable, "-c", code], **pipes))
        assert children[-1].stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    outcomes = sorted(child.communicate(timeout=120)[0].strip() for child in children)
    assert outcomes == ["late", "late", "saved"]
    assert len(MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path).finished) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"n_clusters": 5}, "n_clusters is 4 there and 5 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"metric": "euclidean"}, "metric is 'cosine' there and 'euclidean' here"),
        ({"keys": [str(i) for i in range(N)]}, "keys is None there and '"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, options: dict[str, object], difference: str) -> None:
    run(tmp_path, n_stages=1)
    with pytest.raises(ValueError, match=difference):
        run(tmp_path, **options)
    with pytest.raises(ValueError, match="n_samples is 60 there and 61 here"):
        MultistageRunner(N + 1, n_clusters=4, directory=tmp_path)


def limited_file_size(size: int) -> Callable[[], None]:
    """Returns a function that limits the files of a child process: writing beyond `size` bytes fails."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_leaves_the_earlier_stages_intact(tmp_path: Path) -> None:
    run(tmp_path, n_stages=1)
    code = (
        "import sys, torch; from mcl_kernels import MultistageRunner\n"
        f"runner = MultistageRunner({N}, n_clusters=4, n_stages=2, directory={str(tmp_path)!r})\n"
        f"stage = next(iter(runner)); assert stage.index == 1\n"
        f"try: stage.finish(torch.randn({N}, 8), state={{'w': torch.zeros(100_000)}})\n"
        "except OSError as error: print(error)\n"
        "assert len(runner.finished) == 1\n"
        f"stage.finish(torch.randn({N}, 8), state={{'w': torch.zeros(1)}})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, preexec_fn=limited_file_size(50_000)
    )
    assert result.returncode == 0, result.stderr
    assert "stage 1 could not be saved (File too large); earlier stages are intact" in result.stdout
    assert [done.index for done in MultistageRunner(N, n_clusters=4, directory=tmp_path).finished] == [0, 1]


@pytest.mark.parametrize("call", ["mkdir", "rename", "open"])
def test_a_failing_write_leaves_the_run_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    runner = run(tmp_path, n_stages=1)
    runner.n_stages = 2
    stage = next(iter(runner))

    def fail(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, fail)
        with pytest.raises(OSError, match="No space left on device"):
            stage.finish(embeddings(1))
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]
    stage.finish(embeddings(1))
    assert torch.equal(runner.labels, run(None, n_stages=2).labels)


def test_a_directory_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    runner = MultistageRunner(N, n_clusters=4, directory=tmp_path / "file" / "run")
    with pytest.raises(OSError, match="directory cannot be written"):
        next(iter(runner))


def test_a_finished_run_needs_no_writable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    for call in ("mkdir", "open", "rename"):
        monkeypatch.setattr(Path, call, refuse)
    assert list(MultistageRunner(N, n_clusters=4, directory=tmp_path)) == []


def test_two_processes_cannot_finish_the_same_stage(tmp_path: Path) -> None:
    first, second = (MultistageRunner(N, n_clusters=4, directory=tmp_path) for _ in range(2))
    late = next(iter(second))
    next(iter(first)).finish(embeddings())
    with pytest.raises(FileExistsError, match="another process finished this stage"):
        late.finish(embeddings())


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EMFILE])
def test_an_error_after_the_rename_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """The stage is complete, and was written by this process."""
    runner = MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path)
    stage = next(iter(runner))
    fsync = os.fsync

    def fails_for_the_run(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_the_run)
    with pytest.warns(RuntimeWarning, match=f"could not be synced .{os.strerror(error)}"):
        stage.finish(embeddings())
    assert len(runner.finished) == 1
    assert torch.equal(MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path).labels, runner.labels)


def test_a_directory_that_was_removed(tmp_path: Path) -> None:
    """It is created again if it held no stage; otherwise the run cannot continue."""
    runner = MultistageRunner(N, n_clusters=4, n_stages=2, directory=tmp_path / "run")
    stages = iter(runner)
    stage = next(stages)
    shutil.rmtree(tmp_path / "run")
    stage.finish(embeddings())
    stage = next(stages)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="run is gone, and with it the stages before stage 1"):
        stage.finish(embeddings(1))


def test_a_stage_that_is_finished_while_the_run_is_read_is_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes may read a run during training."""
    run(tmp_path / "other", n_stages=1)
    (tmp_path / "run").mkdir()
    exists = Path.exists

    def finished_meanwhile(path: Path) -> bool:
        there = exists(path)
        if not there and path.name == "stage-0":
            (tmp_path / "other" / "stage-0").rename(path)
        return there

    monkeypatch.setattr(Path, "exists", finished_meanwhile)
    assert MultistageRunner(N, n_clusters=4, directory=tmp_path / "run").finished == []
    assert len(MultistageRunner(N, n_clusters=4, directory=tmp_path / "run").finished) == 1


def test_labels_that_cannot_be_mapped_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = next(iter(MultistageRunner(N, n_clusters=4, directory=tmp_path)))

    def fails(path: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(stage_files, "map_labels", fails)
    labels = stage.finish(embeddings()).labels
    monkeypatch.undo()
    assert torch.equal(labels, MultistageRunner(N, n_clusters=4, directory=tmp_path).labels)


def test_a_relative_directory_is_resolved_in_the_constructor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory changes during the run."""
    expected = run(tmp_path / "expected").labels
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job").mkdir()
    runner = MultistageRunner(N, n_clusters=4, directory="run")
    for stage in runner:
        stage.finish(embeddings(stage.index), state={"stage": torch.tensor(stage.index)})
        os.chdir(tmp_path / "job")
    assert [int(done.state["stage"]) for done in runner.finished] == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["stage-0", "stage-1", "stage-2"]
    assert list((tmp_path / "job").iterdir()) == []
    assert torch.equal(runner.labels, expected)


MEMORY = """
import os, resource, sys
import torch
from mcl_kernels import MultistageRunner
torch.set_num_threads(1)
n = 50_000
x, state = torch.randn(n, 4), {"w": torch.zeros(8_000_000), "epoch": 3}

def runner_in(directory):
    return MultistageRunner(n, n_clusters=4, n_stages=1, directory=directory)

def used_bytes():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def finished_with(mebibytes, directory):
    runner = runner_in(directory)
    stage = next(iter(runner))
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes() + (mebibytes << 20), resource.RLIM_INFINITY))
    try:
        stage.finish(x, state=state)
        return True
    except (MemoryError, OSError, RuntimeError):
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert os.listdir(directory) == ["stage-0"] * len(runner.finished)
        if not runner.finished:
            stage.finish(x, state=state)

for stage in MultistageRunner(9, n_clusters=4, n_stages=1):  # loads all libraries before the limit
    stage.finish(x[:9], state={"epoch": 3})
outcomes = []
for mebibytes in range(0, 120, 6):
    directory = f"{sys.argv[1]}/{mebibytes}"
    child = os.fork()
    if child == 0:
        outcome = "wrong"
        try:
            outcome = "saved" if finished_with(mebibytes, directory) else "failed"
        except BaseException:
            outcome = "wrong"
        finally:
            os._exit(["saved", "failed", "wrong"].index(outcome))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcomes.append(["saved", "failed", "wrong"][status] if status >= 0 else "died")
    for stage in runner_in(directory):  # if the process died before it saved the stage
        stage.finish(x, state=state)
    (done,) = runner_in(directory).finished
    assert done.state["w"].shape == (8_000_000,) and len(done.labels) == n
print(*outcomes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as on Linux")
def test_running_out_of_memory_leaves_the_run_unchanged(tmp_path: Path) -> None:
    """At each of many limits finish() fails and can be called again, or the stage is saved.

    safetensors aborts the process if it cannot allocate memory: then the next process resumes.
    """
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr
    outcomes = result.stdout.split()
    assert {"saved", "failed"} <= set(outcomes) <= {"saved", "failed", "died"}, (outcomes, result.stderr)
