"""Damaged stages: the error names the file, and no damaged file is used."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcl_kernels import MultistageRunner
from mcl_kernels.stages import files as stage_files
from tests.stage_runs import N, replace_in_stage, run


def damage(path: Path) -> Iterator[bytes]:
    """Yields the content with one bit of the first, the middle or the last byte flipped."""
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


def test_an_edited_description_is_refused(tmp_path: Path) -> None:
    """The checksum detects an edit that keeps the JSON valid."""
    run(tmp_path)
    path = tmp_path / "stage-0" / "stage.json"
    description = json.loads(path.read_text())
    description["configuration"]["seed"] = 1
    path.write_text(json.dumps(description, indent=2))
    with pytest.raises(RuntimeError, match=r"stage.json is damaged"):
        MultistageRunner(N, n_clusters=4, seed=1, directory=tmp_path)


def plain(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def claiming(shape: str) -> bytes:
    """An array of one element, with another shape in its header, which keeps its length."""
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
def test_an_array_that_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    """Its checksum is correct, as that of a file edited on purpose."""
    run(tmp_path, n_stages=1)
    name, content, message = ARRAYS[case]
    replace_in_stage(tmp_path / "stage-0", name, content)
    with pytest.raises(RuntimeError, match=f"stage-0/{name} is damaged: it.*{message}"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


def remove(*path: str) -> Callable[[dict[str, Any]], object]:
    def change(description: dict[str, Any]) -> None:
        *parents, last = path
        for parent in parents:
            description = description[parent]
        del description[last]

    return change


DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": remove("files"),
    "no centres": remove("files", "centers.npy"),
    "no configuration": remove("configuration"),
    "an empty configuration": lambda d: d["configuration"].clear(),
    "no seed": remove("configuration", "seed"),
    "no statistics": remove("statistics"),
    "no label sizes": remove("statistics", "label_sizes"),
    "files in a list": lambda d: d.update(files=list(d["files"])),
    "another name": lambda d: d["files"].update({"other.npy": d["files"].pop("state.safetensors")}),
    "a file outside": lambda d: d["files"].update({"state./../../x.pt": d["files"].pop("state.safetensors")}),
    "two states": lambda d: d["files"].update({"state.pt": "0"}),
    "a checksum that is none": lambda d: d["files"].update({"labels.npy": 3}),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_an_incomplete_description_is_refused_by_name(tmp_path: Path, case: str) -> None:
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
def test_an_invalid_description_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    run(tmp_path, n_stages=1)
    (tmp_path / "stage-0" / "stage.json").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"stage-0/stage.json is damaged: its content does not match"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)  # the path of a socket has a small maximal length
        listener.bind(path.name)


IRREGULAR_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": make_pipe,
    "socket": make_socket,
    "directory": Path.mkdir,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("name", ["centers.npy", "labels.npy", "state.safetensors", "stage.json"])
@pytest.mark.parametrize("kind", IRREGULAR_FILES)
def test_an_irregular_file_is_refused_without_reading(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a pipe waits for a writer, and reading a device may never end."""
    monkeypatch.chdir(tmp_path)
    run(tmp_path, n_stages=1)
    path = tmp_path / "stage-0" / name
    path.unlink()
    IRREGULAR_FILES[kind](path)
    message = "the file is missing" if kind == "link to nothing" else "it is not a regular file"
    with pytest.raises(RuntimeError, match=f"stage-0/{name} is damaged: {message}"):
        MultistageRunner(N, n_clusters=4, directory=tmp_path)


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    """Tools that store large files elsewhere leave such links."""
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
