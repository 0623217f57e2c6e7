"""Output files of the commands: checked before the clustering, complete or unchanged after any failure."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcl_kernels import KMeans
from mcl_kernels.cli import output_files
from mcl_kernels.cli.main import main
from tests.command_files import N, cluster, features, save_features
from tests.file_faults import run_with_faults


@pytest.fixture(autouse=True)
def _change_to_directory_of_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_features()


def make_read_only(path: str) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write to any directory")
    Path(path).mkdir()
    Path(path).chmod(0o500)


OUTPUTS: dict[str, tuple[Callable[[], object], list[str], str]] = {
    "a long name": (lambda: None, ["--out", f"{'a' * 252}.npy"], "--out cannot be written (File name too long)"),
    "a long name of the summary": (
        lambda: None,
        ["--out", f"{'a' * 247}.npy"],
        "the summary of --out cannot be written (File name too long)",
    ),
    "a long name in a new directory": (
        lambda: None,
        ["--out", f"new/{'a' * 252}.npy"],
        "--out cannot be written (File name too long)",
    ),
    "a loop of links": (
        lambda: (os.symlink("b.npy", "a.npy"), os.symlink("a.npy", "b.npy")),
        ["--out", "a.npy"],
        "--out must be a file: a.npy is a loop of symbolic links",
    ),
    "a link to a directory": (
        lambda: (os.mkdir("d"), os.symlink("d", "a.npy")),
        ["--out", "a.npy"],
        "--out must be a file: a.npy is a directory",
    ),
    "a link into a directory that cannot be written": (
        lambda: (make_read_only("d"), os.symlink("d/x.npy", "a.npy")),
        ["--out", "a.npy"],
        "directory cannot be written",
    ),
    "a directory that cannot be written": (
        lambda: make_read_only("d"),
        ["--out", "d/a.npy"],
        "directory cannot be written",
    ),
    "a pipe": (lambda: os.mkfifo("a.npy"), ["--out", "a.npy"], "--out must be a regular file: got a.npy"),
    "a link to a device": (
        lambda: os.symlink("/dev/null", "a.npy"),
        ["--out", "a.npy"],
        "--out must be a regular file: got a.npy",
    ),
    "a link to the input": (
        lambda: os.symlink("f0.npy", "a.npy"),
        ["--out", "a.npy"],
        "--out must not be one of the files that are read: got a.npy",
    ),
    "a hard link to the input": (
        lambda: os.link("f0.npy", "a.npy"),
        ["--out", "a.npy"],
        "--out must not be one of the files that are read: got a.npy",
    ),
    "a summary that is the input": (
        lambda: os.symlink("f0.npy", "a.npy.json"),
        ["--out", "a.npy"],
        "the summary of --out must not be one of the files that are read: got a.npy.json",
    ),
    "a summary that is a directory": (
        lambda: os.mkdir("a.npy.json"),
        ["--out", "a.npy"],
        "the summary of --out must be a file: a.npy.json is a directory",
    ),
    "a summary that is the labels": (
        lambda: os.symlink("a.npy", "a.npy.json"),
        ["--out", "a.npy"],
        "the summary of --out must not be --out: got a.npy.json",
    ),
    "centres that are the labels": (
        lambda: os.symlink("a.npy", "a.safetensors"),
        ["--out", "a.npy", "--centers", "a.safetensors"],
        "--centers must not be --out: got a.safetensors",
    ),
    "centres that are the input": (
        lambda: os.symlink("f0.npy", "a.safetensors"),
        ["--out", "a.npy", "--centers", "a.safetensors"],
        "--centers must not be one of the files that are read: got a.safetensors",
    ),
    "centres of another suffix": (
        lambda: None,
        ["--out", "a.npy", "--centers", "a.npy"],
        "--centers must be a .safetensors file: got a.npy",
    ),
    "centres in a file": (
        lambda: Path("file").touch(),
        ["--out", "a.npy", "--centers", "file/a.safetensors"],
        "--centers cannot be written (Not a directory)",
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_unwritable_output_is_refused_before_the_clustering(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, arguments, message = OUTPUTS[name]
    prepare()
    monkeypatch.setattr(KMeans, "fit", lambda *_: pytest.fail("the clustering has started"))
    before = {path: path.lstat().st_mtime_ns for path in Path().iterdir()}
    assert cluster("f0.npy", "--clusters", 3, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    after = {path: path.lstat().st_mtime_ns for path in Path().iterdir() if path.name != "new"}
    assert after == before


@pytest.mark.parametrize("name", [name for name in OUTPUTS if "centres" not in name])
def test_assign_checks_its_output_as_cluster_does(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, arguments, message = OUTPUTS[name]
    prepare()
    KMeans(3).fit(features()).save("c.safetensors")
    monkeypatch.setattr(KMeans, "predict", lambda *_: pytest.fail("the assignment has started"))
    assert main(["assign", "f0.npy", "--centers", "c.safetensors", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_file_of_another_user_in_a_shared_directory_is_refused_before_the_clustering(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sticky directory such as /tmp, other users can create files but not replace this one."""
    Path("shared").mkdir()
    Path("shared").chmod(0o1777)
    np.save("shared/y.npy", np.zeros(3))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert cluster("f0.npy", "--clusters", 3, "--out", "shared/y.npy") == 1
    assert "shared/y.npy belongs to another user" in capsys.readouterr().err
    assert cluster("f0.npy", "--clusters", 3, "--out", "shared/z.npy") == 0


def test_a_file_that_is_mounted_by_itself_is_refused_before_the_clustering(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers mount single files; a rename over one fails."""
    Path("y.npy").touch()
    monkeypatch.setattr(output_files, "_mount_points", lambda: ["/", str(Path.cwd() / "y.npy")])
    assert cluster("f0.npy", "--clusters", 3, "--out", "y.npy") == 1
    assert "y.npy is mounted by itself; name another" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs /proc/self/mountinfo")
def test_mount_points_of_this_system() -> None:
    points = output_files._mount_points()
    assert "/" in points
    assert "/proc" in points
    assert str(Path.cwd()) not in points


def test_the_longest_name_is_written() -> None:
    out = f"{'a' * 246}.npy"  # with .json 255 bytes
    assert cluster("f0.npy", "--clusters", 3, "--out", out) == 0
    assert len(np.load(out)) == N
    assert Path(f"{out}.json").exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_the_target_of_a_link_is_replaced_and_the_link_stays(dangling: bool) -> None:
    Path("elsewhere").mkdir()
    for name in ("y.npy", "y.npy.json", "c.safetensors"):
        Path(name).symlink_to(f"elsewhere/{name}")
        if not dangling:
            Path(f"elsewhere/{name}").write_bytes(b"old")
    assert cluster("f0.npy", "--clusters", 3, "--out", "y.npy", "--centers", "c.safetensors") == 0
    for name in ("y.npy", "y.npy.json", "c.safetensors"):
        assert Path(name).is_symlink()
        assert Path(f"elsewhere/{name}").stat().st_size > 100
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["c.safetensors", "y.npy", "y.npy.json"]


def test_a_directory_removed_during_the_clustering_is_created_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = KMeans.fit

    def fit_and_remove(*arguments: Any) -> KMeans:
        fitted = fit(*arguments)
        shutil.rmtree("out")
        return fitted

    monkeypatch.setattr(KMeans, "fit", fit_and_remove)
    assert cluster("f0.npy", "--clusters", 3, "--out", "out/y.npy") == 0
    assert len(np.load("out/y.npy")) == N


@pytest.mark.parametrize(
    "where", ["cluster.KMeans.fit", "cluster.compose_pairs", "output_files.sha256_of", "output_files.json.dumps"]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
def test_any_failure_before_the_renames_leaves_the_output_unchanged(
    where: str, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    Path("y.npy").write_bytes(b"old content")
    before = sorted(Path().iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(f"mcl_kernels.cli.{where}", fail)
        status = cluster("f0.npy", "--clusters", 3, "--out", "y.npy")
    assert status == (130 if error is KeyboardInterrupt else 1)
    assert Path("y.npy").read_bytes() == b"old content"
    assert sorted(Path().iterdir()) == before
    assert cluster("f0.npy", "--clusters", 3, "--out", "y.npy") == 0


def test_an_error_after_the_labels_were_replaced_reports_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def fail_for_the_summary(source: Path, target: Path) -> Path:
        if target.suffix == ".json":
            raise OSError(5, "Input/output error")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", fail_for_the_summary)
    assert cluster("f0.npy", "--clusters", 3, "--out", "y.npy") == 1
    error = capsys.readouterr().err
    assert "Input/output error; y.npy was already replaced" in error
    assert "run the command again" in error


@pytest.mark.parametrize("out", ["y.npy", "y.pt"])
def test_a_full_disk(out: str) -> None:
    Path(out).write_bytes(b"old content")
    np.save("large.npy", np.random.default_rng(0).random((20_000, 2), dtype=np.float32))
    result = subprocess.run(
        [sys.executable, "-m", "mcl_kernels", "cluster", "large.npy", "--clusters", "2", "--out", out],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("mcl-kernels: ")
    assert result.stderr.count("\n") == 1
    assert Path(out).read_bytes() == b"old content"
    assert not [path for path in Path().iterdir() if "partial" in path.name or path.suffix == ".json"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="preloads a library")
def test_a_fault_at_any_system_call_leaves_old_or_new_files_or_a_detected_mixture(tmp_path: Path) -> None:
    """Faults: SIGKILL, full disk and I/O error; at each open, read, write, sync, rename, unlink, mkdir and close."""
    for line in run_with_faults("tests.faulty_cluster", tmp_path).splitlines():
        report = json.loads(line)
        assert report["points"] > 40, report
        assert {outcome.split(",")[0] for outcome in report["outcomes"]} == {
            "old",
            "new",
            "refused mixture",
            "centres other than those of the summary",
        }, report
