"""Other systems, emulated by removing the features that they lack: runs, files and commands still work."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mcl_kernels import KMeans, MultistageRunner
from mcl_kernels.kmeans import rows as kmeans_rows
from tests.stage_runs import N, run

ROOT = Path(__file__).parents[1]

# Runs before a script: emulates the differences of Windows that affect this library.
WINDOWS = """
import os, sys
import numpy, safetensors.torch, torch, torch.distributed
from torch.utils.data import DataLoader

def refused(path):
    raise PermissionError(13, "Permission denied", str(path))

def in_use(path):
    # A file that is open or mapped can neither be removed nor replaced, nor a directory above it be renamed.
    path = os.path.abspath(path)
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            opened = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if opened == path or opened.startswith(path + "/"):
            return True
    return any(line.rstrip().endswith(path) for line in open("/proc/self/maps"))

open_, rename, replace, unlink = os.open, os.rename, os.replace, os.unlink

def open_no_directory(path, *rest, **options):
    return refused(path) if os.path.isdir(path) else open_(path, *rest, **options)

def rename_to_a_free_name(path, to):
    if os.path.exists(to):
        raise FileExistsError(17, "File exists", str(to))
    return refused(path) if in_use(path) else rename(path, to)

def replace_what_is_closed(path, to):
    return refused(path) if in_use(path) or in_use(to) else replace(path, to)

def unlink_what_is_closed(path, *, dir_fd=None):
    return refused(path) if in_use(path) else unlink(path, dir_fd=dir_fd)

os.open, os.rename, os.replace, os.unlink = (
    open_no_directory, rename_to_a_free_name, replace_what_is_closed, unlink_what_is_closed
)
os.remove = os.unlink
for name in ("preadv", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC", "fork", "getuid", "geteuid", "pathconf"):
    delattr(os, name)
for name in ("fcntl", "pwd", "grp", "resource", "triton"):
    sys.modules[name] = None
sys.platform = "win32"
"""

RUN = """
import mcl_kernels
from mcl_kernels import KMeans, MultistageRunner, nt_xent
from mcl_kernels.cli.main import main

x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
for n_stages in (1, 3):  # the second run continues the first
    runner = MultistageRunner(60, n_stages=n_stages, n_clusters=4, directory="run")
    for stage in runner:
        stage.finish(x, state={"index": stage.index, "w": x})
assert [done.state["index"] for done in runner.finished] == [0, 1, 2]
assert sorted(os.listdir("run")) == ["stage-0", "stage-1", "stage-2"], os.listdir("run")

numpy.save("x.npy", x.numpy())
labels = KMeans(3).fit(numpy.load("x.npy", mmap_mode="r")).labels_
assert torch.equal(labels, KMeans(3).fit(x).labels_)
for _ in range(2):  # the second run replaces the files of the first
    assert main(["cluster", "x.npy", "--clusters", "3", "--out", "a.npy", "--metric", "euclidean"]) == 0
assert main(["cluster", "x.npy", "--clusters", "3", "--previous", "a.npy", "--out", "b.pt"]) == 0
assert numpy.array_equal(numpy.load("a.npy"), labels.numpy())
assert not [name for name in os.listdir() if name.startswith(".")], os.listdir()

nt_xent(x.requires_grad_(), x.flip(1), labels).backward()
print(mcl_kernels.capabilities()["native"]["available"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="lists open files in /proc")
def test_windows(tmp_path: Path) -> None:
    """Directories cannot be opened, open files cannot be replaced, and many POSIX functions are missing."""
    result = subprocess.run(
        [sys.executable, "-c", WINDOWS + RUN],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize("what", ["directories", "anything"])
def test_a_file_system_that_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: int) -> None:
    """Some network file systems and containers cannot: a run is written without sync and without a warning."""
    fsync = os.fsync

    def refuses(descriptor: int) -> None:
        if what == "anything" or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = run(tmp_path / "new" / "run", n_stages=2).labels
    assert torch.equal(MultistageRunner(N, n_clusters=4, n_stages=2, directory=tmp_path / "new/run").labels, expected)


@pytest.fixture
def closed_parent() -> Iterator[Path]:
    """A directory of another user that can be traversed, but not read or written."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o711)
        yield Path(directory)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become another user")
def test_a_parent_directory_that_can_only_be_traversed(closed_parent: Path) -> None:
    """On many compute clusters, a user's scratch directory is in a directory that cannot be opened."""
    own = closed_parent / "own"
    own.mkdir()
    os.chown(own, 12345, 12345)
    code = (
        "import os, sys, torch\n"
        "from mcl_kernels import MultistageRunner\n"
        "from mcl_kernels._durable import replace_file\n"
        "from pathlib import Path\n"
        "next(iter(MultistageRunner(8, n_clusters=2))).finish(torch.randn(8, 4), state={})  # loads all modules\n"
        "os.setgid(12345), os.setuid(12345)\n"
        "own = Path(sys.argv[1])\n"
        "try: os.open(own.parent, os.O_RDONLY)\n"
        "except PermissionError: pass\n"
        "else: raise SystemExit('the parent can be opened')\n"
        "for stage in MultistageRunner(8, n_stages=1, n_clusters=2, directory=own): stage.finish(torch.randn(8, 4))\n"
        "replace_file(own / 'x', b'content')\n"
        "print(sorted(os.listdir(own)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(own)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout == "['stage-0', 'x']\n", result.stderr


def test_files_are_read_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.preadv` is missing on Windows, and on macOS before 11."""
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.setattr(kmeans_rows, "CHUNK_BYTES", 1 << 16)
    x = torch.randn(9000, 24, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for batch_size in (None, 700):
        file_fit, memory_fit = (KMeans(5, max_iter=5, batch_size=batch_size).fit(rows) for rows in (mapped, x))
        assert torch.equal(file_fit.cluster_centers_, memory_fit.cluster_centers_)
        assert torch.equal(file_fit.labels_, memory_fit.labels_)
