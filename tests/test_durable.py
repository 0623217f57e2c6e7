"""Files are replaced in one step, on systems that can sync or not, with other processes writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mcl_kernels._durable import (
    ABANDONED_AFTER,
    open_regular,
    replace_file,
    replaced_file,
    replaced_files,
    sync_directory,
)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_simultaneous_writers_write_separate_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replaced_file(path) as first:
        first.write(b"A" * 100_000)
        with replaced_file(path) as second:
            second.write(b"B" * 1000)
        assert path.read_bytes() == b"B" * 1000
        first.write(b"A" * 100_000)
        first.flush()
        assert path.read_bytes() == b"B" * 1000
    assert path.read_bytes() == b"A" * 200_000
    assert names_in(tmp_path) == ["x"]


def test_a_planted_temporary_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is random; here an attacker has guessed it."""
    victim, guessed = tmp_path / "victim", tmp_path / "guessed"
    victim.write_text("content")
    guessed.symlink_to(victim)
    monkeypatch.setattr("mcl_kernels._durable.temporary_name", lambda directory: guessed)
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "x", b"other")
    assert victim.read_text() == "content"
    assert names_in(tmp_path) == ["guessed", "victim"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data/x")
    for content in (b"one", b"two"):  # first without an existing target
        replace_file(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "data" / "x").read_bytes() == content
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(tmp_path / "loop", b"")


def test_any_name_that_a_file_may_have(tmp_path: Path) -> None:
    for name in ("a" * 255, "\u00e4" * 127, "\udcff"):
        replace_file(tmp_path / name, b"x")
    assert len(names_in(tmp_path)) == 3


def test_all_files_are_on_disk_before_the_first_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append(to.name), replace(self, to)))
    with replaced_files(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write(b"a")
        b.write(b"b")
    assert events == ["sync", "sync", "a", "b", "sync"]


def replace_both(directory: Path) -> None:
    with replaced_files(directory / "a", directory / "b") as files:
        for file in files:
            file.write(b"new")


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_sync_replaces_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        replace_both(tmp_path)
    assert [(tmp_path / name).read_text() for name in names_in(tmp_path)] == ["old", "old"]


def test_a_directory_that_fails_to_sync_after_the_rename_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, synced = os.fsync, []

    def fails_for_directories(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        synced.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_directories)
    with pytest.warns(RuntimeWarning, match="could not be synced .Input/output"):
        replace_file(tmp_path / "x", b"content")
    assert (tmp_path / "x").read_bytes() == b"content"
    assert len(synced) == 1


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync_directory(tmp_path / "gone")


def test_old_temporary_files_are_removed(tmp_path: Path) -> None:
    replace_file(tmp_path / "x", b"old")
    (tmp_path / ".mcl_kernels-old.partial").write_text("left by a killed process")
    (tmp_path / ".mcl_kernels-new.partial").write_text("still being written")
    long_ago = (tmp_path / "x").stat().st_mtime - 2 * ABANDONED_AFTER
    os.utime(tmp_path / ".mcl_kernels-old.partial", (long_ago, long_ago))
    replace_file(tmp_path / "x", b"new")
    assert names_in(tmp_path) == [".mcl_kernels-new.partial", "x"]


def interrupted(path: Path) -> None:
    with replaced_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_an_interrupted_writer_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    replace_file(tmp_path / "x", b"old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "x")
    assert names_in(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "device"):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
        assert len(os.listdir("/proc/self/fd")) == before
