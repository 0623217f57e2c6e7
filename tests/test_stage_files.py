"""Stages on disk: complete or absent at any kill and any error, and damage is named, never used."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcl_kernels import MultistageRunner
from mcl_kernels.stages import files as stage_files
from tests.file_faults import run_with_faults
from tests.stage_runs import N, embeddings, run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs Linux and gcc")
def test_killed_or_failing_at_each_call_of_the_file_system(tmp_path: Path) -> None:
    """No stage is lost or damaged, and a run goes on to the same features."""
    killed, *failed = run_with_faults("tests.faulty_finish", tmp_path).splitlines()
    # Per stage at least: a directory, five files opened, written, synced and closed, two directories, a rename.
    assert int(killed.split()[1]) >= 2 * 40
    assert len(failed) == 4
    assert all(int(outcomes.split(": ")[1].split()[0]) >= 40 for outcomes in failed)


@pytest.mark.filterwarnings("ignore:stage 3 will have few negatives")
def test_labels_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They were int64 in their file."""
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


def damage(path: Path) -> Iterator[bytes]:
    """The content with one bit of the first, the middle and the last byte turned."""
    content = path.read_bytes()
    for position in (0, len(content) // 2, len(content) - 1):
        yield content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize("name", ["centers.npy", "labels.npy", "tuples.npy", "state.safetensors", "stage.json"])
def test_a_flipped_bit_is_refused_by_name(tmp_path: Path, name: str) -> None:
    run(tmp_path)
    path = tmp_path / "stage-1" / name
    for content in damage(path):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=f"stage-1/{name} is damaged"):
            MultistageRunner(N, n_clusters=4, directory=tmp_path)


@pytest.mark.parametrize("name", ["centers.npy", "labels.npy", "tuples.npy", "state.safetensors", "stage.json"])
def test_a_missing_or_truncated_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    run(tmp_path)
    path = tmp_path / "stage-1" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(RuntimeError, match=f"stage-1/{name} is damaged"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)
    path.unlink()
    with pytest.raises(RuntimeError, match=f"stage-1/{name} is damaged: the file is missing"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


def test_a_state_is_checked_again_when_it_is_read(tmp_path: Path) -> None:
    finished = run(tmp_path).finished[1]
    path = tmp_path / "stage-1" / "state.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match=r"stage-1/state.safetensors is damaged"):
        _ = finished.state
    path.unlink()
    with pytest.raises(RuntimeError, match=r"stage-1/state.safetensors is damaged: the file is missing"):
        _ = finished.state


def test_fewer_stages_and_other_names_beside(tmp_path: Path) -> None:
    """A copy that somebody keeps, and opening a longer run with fewer stages, are no gap."""
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


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".stage-0.0123"
    left.mkdir(parents=True)
    (left / "labels.npy").write_bytes(b"half")
    run(tmp_path, n_stages=1)
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]


@pytest.mark.slow
def test_processes_that_finish_the_same_stage_at_once(tmp_path: Path) -> None:
    """One of them saves it, the others raise, and what is saved is complete."""
    code = (
        "import sys, torch; from mcl_kernels import MultistageRunner; torch.set_num_threads(1)\n"
        f"stage = next(iter(MultistageRunner({N}, n_clusters=4, n_stages=1, directory={str(tmp_path)!r})))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"try: stage.finish(torch.randn({N}, 8), state={{'w': torch.zeros(100_000)}}); print('saved')\n"
        "except FileExistsError: print('late')\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 3
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    said = sorted(child.communicate(timeout=120)[0].strip() for child in children)
    assert said == ["late", "late", "saved"]
    assert len(MultistageRunner(N, n_clusters=4, n_stages=1, directory=tmp_path).finished) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]


def test_a_damaged_stage_can_be_run_again(tmp_path: Path) -> None:
    expected = run(tmp_path).labels
    for index in (1, 2):
        shutil.rmtree(tmp_path / f"stage-{index}")
    assert torch.equal(run(tmp_path).labels, expected)


def test_a_gap_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    shutil.rmtree(tmp_path / "stage-1")
    with pytest.raises(RuntimeError, match="stage-1 is missing, and stage-2 builds on it"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


def test_the_checksum_of_the_description_is_no_decoration(tmp_path: Path) -> None:
    """An edit that keeps the JSON well formed is found too."""
    run(tmp_path)
    path = tmp_path / "stage-0" / "stage.json"
    description = json.loads(path.read_text())
    description["configuration"]["seed"] = 1
    path.write_text(json.dumps(description, indent=2))
    with pytest.raises(RuntimeError, match=r"stage.json is damaged"):
        MultistageRunner(N, n_clusters=4, seed=1, directory=tmp_path)


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
    """For a child process: writing beyond `size` bytes fails in the kernel, as on a full disk."""
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
def test_any_failing_write_leaves_the_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
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


def replace_in_stage(directory: Path, name: str, content: bytes) -> None:
    """With a matching checksum."""
    (directory / name).write_bytes(content)
    description = stage_files._read_description(directory / "stage.json")
    description["files"][name] = stage_files._sha256(content)
    (directory / "stage.json").write_bytes(stage_files._description_bytes(description))


def plain(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def claiming(shape: str) -> bytes:
    """An array of one number whose header claims another shape, as long as it was."""
    return plain(np.zeros((1, 1), np.float32)).replace(b"(1, 1), }" + b" " * (len(shape) - 6), shape.encode() + b", }")


LABELS = np.arange(N) % 4
BRACKETS = b"\x93NUMPY\x01\0\x10\x27" + b"[" * 10_000
ARRAYS = {
    "too few labels": ("labels.npy", plain(LABELS[:3]), r"int64 \[3\], not int32 or int64 \[60\]"),
    "too many labels": ("labels.npy", plain(np.zeros(800, np.int64)), r"int64 \[800\], not"),
    "labels in two dimensions": ("labels.npy", plain(LABELS.reshape(2, 30)), r"int64 \[2, 30\], not"),
    "labels that are no integers": ("labels.npy", plain(LABELS.astype(np.float32)), r"float32 \[60\], not"),
    "a label of no tuple": ("labels.npy", plain(LABELS + 1), "labels are from 1 to 4, not from 0 to 3"),
    "a negative label": ("labels.npy", plain(LABELS - 1), "labels are from -1 to 2, not from 0 to 3"),
    "labels that are objects": ("labels.npy", plain(np.array([{}] * N, object)), "not a plain array"),
    "labels of a shape beyond the file": ("labels.npy", claiming("(4398046511104, 4)"), "not a plain array"),
    "labels that are no array": ("labels.npy", b"labels", "not a plain array"),
    "labels that are empty": ("labels.npy", b"", "not a plain array"),
    "labels that are an archive": ("labels.npy", b"PK\3\4" + b"x" * 100, "not a plain array"),
    "a header of labels of brackets": ("labels.npy", BRACKETS, "not a plain array"),
    "labels of a shape beyond any": ("labels.npy", claiming(f"({2**70}, 4)"), "not a plain array"),
    "centres of integers": ("centers.npy", plain(np.zeros((4, 8), np.int64)), r"int64 \[4, 8\], not float"),
    "no centres": ("centers.npy", plain(np.zeros((0, 8), np.float32)), r"float32 \[0, 8\], not float"),
    "one centre without a dimension": ("centers.npy", plain(np.zeros(8, np.float32)), r"float32 \[8\], not float"),
    "centres of a shape beyond the file": ("centers.npy", claiming("(4398046511104, 4)"), "not a plain array"),
    "centres that are objects": ("centers.npy", plain(np.array([[{}]], object)), "not a plain array"),
    "centres that are no array": ("centers.npy", b"", "not a plain array"),
    "a header of brackets": ("centers.npy", BRACKETS, "not a plain array"),
    "tuples of another stage": ("tuples.npy", plain(np.zeros((4, 2), np.int64)), r"int64 \[4, 2\], not int64"),
    "tuples of no centre": ("tuples.npy", plain(np.arange(1, 5)[:, None]), "clusters are not all from 0 to 3"),
    "negative tuples": ("tuples.npy", plain(np.arange(-1, 3)[:, None]), "clusters are not all from 0 to 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_that_no_stage_has_is_refused_by_name(tmp_path: Path, case: str) -> None:
    """With a checksum that is right: whoever changes a file can compute it."""
    run(tmp_path, n_stages=1)
    name, content, message = ARRAYS[case]
    replace_in_stage(tmp_path / "stage-0", name, content)
    with pytest.raises(RuntimeError, match=f"stage-0/{name} is damaged: it.*{message}"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


def drop(*path: str) -> Callable[[dict[str, Any]], object]:
    def change(description: dict[str, Any]) -> None:
        *parents, last = path
        for parent in parents:
            description = description[parent]
        del description[last]

    return change


DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": drop("files"),
    "no centres": drop("files", "centers.npy"),
    "no configuration": drop("configuration"),
    "an empty configuration": lambda d: d["configuration"].clear(),
    "no seed": drop("configuration", "seed"),
    "no statistics": drop("statistics"),
    "no label sizes": drop("statistics", "label_sizes"),
    "files in a list": lambda d: d.update(files=list(d["files"])),
    "another name": lambda d: d["files"].update({"other.npy": d["files"].pop("state.safetensors")}),
    "a file outside": lambda d: d["files"].update({"state./../../x.pt": d["files"].pop("state.safetensors")}),
    "two states": lambda d: d["files"].update({"state.pt": "0"}),
    "a checksum that is none": lambda d: d["files"].update({"labels.npy": 3}),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_description_that_no_stage_has_is_refused_by_name(tmp_path: Path, case: str) -> None:
    run(tmp_path, n_stages=1)
    path = tmp_path / "stage-0" / "stage.json"
    description = stage_files._read_description(path)
    DESCRIPTIONS[case](description)
    path.write_bytes(stage_files._description_bytes(description))
    with pytest.raises(
        RuntimeError, match=r"stage-0/stage.json is damaged: '(files|configuration|statistics)' must hold"
    ):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"[]", b"null", b"1" * 10_000, b"\xff", b'{"sha256": "0"}'])
def test_what_is_no_description_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    run(tmp_path, n_stages=1)
    (tmp_path / "stage-0" / "stage.json").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"stage-0/stage.json is damaged: its content is not what"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)  # the name of a socket is short
        listener.bind(path.name)


NOT_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": as_pipe,
    "socket": as_socket,
    "directory": Path.mkdir,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("name", ["centers.npy", "labels.npy", "state.safetensors", "stage.json"])
@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe would wait for a writer, a device has no end."""
    monkeypatch.chdir(tmp_path)
    run(tmp_path, n_stages=1)
    path = tmp_path / "stage-0" / name
    path.unlink()
    NOT_FILES[kind](path)
    message = "the file is missing" if kind == "link to nothing" else "it is not a regular file"
    with pytest.raises(RuntimeError, match=f"stage-0/{name} is damaged: {message}"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    """As large files are kept by tools that store them elsewhere."""
    expected = run(tmp_path / "run", n_stages=1)
    path = tmp_path / "run" / "stage-0" / "labels.npy"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    runner = MultistageRunner(N, n_clusters=4, directory=tmp_path / "run")
    assert torch.equal(runner.labels, expected.labels)


def test_a_state_with_a_right_checksum_that_cannot_be_loaded_is_refused_by_name(tmp_path: Path) -> None:
    finished = run(tmp_path, n_stages=1).finished[0]
    replace_in_stage(tmp_path / "stage-0", "state.safetensors", b"\xff" * 100)
    with pytest.raises(RuntimeError, match=r"stage-0/state.safetensors is damaged: it cannot be loaded"):
        _ = finished.state


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EMFILE])
def test_an_error_after_the_rename_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """The stage is there, and no other process has written it."""
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
    """Before a stage is finished it is made again; with finished stages in it, nothing can go on."""
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
    """Others may read a run while it goes on."""
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


def test_the_directory_is_that_of_the_constructor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that changes its working directory goes on in one directory."""
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

def taken():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def finished_with(mebibytes, directory):
    runner = runner_in(directory)
    stage = next(iter(runner))
    resource.setrlimit(resource.RLIMIT_AS, (taken() + (mebibytes << 20), resource.RLIM_INFINITY))
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

for stage in MultistageRunner(9, n_clusters=4, n_stages=1):  # loads all libraries
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
    for stage in runner_in(directory):  # of a process that died
        stage.finish(x, state=state)
    (done,) = runner_in(directory).finished
    assert done.state["w"].shape == (8_000_000,) and len(done.labels) == n
print(*outcomes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_memory_that_ends_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    """At each of many limits finish() fails and can be called again, or the stage is saved.

    safetensors ends the process where it can allocate no memory: then the next process goes on.
    """
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr
    outcomes = result.stdout.split()
    assert {"saved", "failed"} <= set(outcomes) <= {"saved", "failed", "died"}, (outcomes, result.stderr)
