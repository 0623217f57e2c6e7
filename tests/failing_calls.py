"""Lets `mcl-kernels cluster` fail at every system call on its output, and reports what it leaves.

Run in a directory of features with the library of failing_calls.c preloaded: `python -m tests.failing_calls`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from mcl_kernels import KMeans, cli
from mcl_kernels._durable import sha256_of
from mcl_kernels.feature_files import open_labels
from tests.killed_run import in_child

FAILURES = {"SIGKILL": 0, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
N = 300


def build(directory: Path) -> Path:
    """The library to preload."""
    library = directory / "failing_calls.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


class Files(NamedTuple):
    """Identifies the files of a run: the labels, those that the summary describes, the centres."""

    labels: str
    summary: str
    centers: str

    @classmethod
    def read(cls, out: Path) -> Files:
        described = json.loads((out / "y.npy.json").read_text())["sha256"]
        return cls(sha256_of(out / "y.npy"), described, str(KMeans.load(out / "c.safetensors").cluster_centers_))


def cluster(features: str, out: Path) -> int:
    files = ("--out", str(out / "y.npy"), "--centers", str(out / "c.safetensors"))
    return cli.main(["cluster", features, "--clusters", "3", *files])


def attempt(number: int, error: int, out: Path) -> tuple[int, list[str]]:
    """The wait status of a run whose call `number` fails, and its lines on standard error."""

    def failing() -> None:
        with open("errors", "w") as errors:
            os.dup2(errors.fileno(), 2)
        library = ctypes.CDLL(None)
        library.arm(os.fsencode(out), ctypes.c_long(number), error)
        status = cluster("f1.npy", out)
        Path("calls").write_text(str(library.calls()))
        os._exit(status)

    status = in_child(failing)
    return status, Path("errors").read_text().splitlines()


def outcome(out: Path, before: Files, after: Files) -> str:
    """Which files are new; whether a mixture of labels and summary is refused, and one with centres is seen."""
    found = Files.read(out)
    changed = [now == new for now, new in zip(found, after, strict=True)]
    assert all(now in pair for now, *pair in zip(found, before, after, strict=True)), "a damaged file"
    if changed[0] != changed[1]:
        try:
            open_labels(out / "y.npy", N)
        except ValueError as error:
            return "refused mixture" if "their SHA-256 differ" in str(error) else str(error)
        return "SILENT mixture"
    if changed[1] != changed[2]:
        recorded = json.loads((out / "y.npy.json").read_text())["centers_sha256"]
        return (
            "SILENT mixture"
            if recorded == sha256_of(out / "c.safetensors")
            else "other centres than those of the summary"
        )
    return "new" if changed[0] else "old"


def main() -> None:
    here = Path.cwd()
    pairs = []
    for features in ("f0.npy", "f1.npy"):
        (here / features[:2]).mkdir()
        assert in_child(lambda features=features: cluster(features, here / features[:2])) == 0
        pairs.append(Files.read(here / features[:2]))
    before, after = pairs
    out = here / "out"
    shutil.copytree(here / "f0", out)
    assert attempt(-1, 0, out) == (0, [])
    calls = int(Path("calls").read_text())
    report: dict[str, object] = {"calls": calls}
    for kind, error in FAILURES.items():
        left: Counter[str] = Counter()
        for number in range(calls):
            shutil.rmtree(out)
            shutil.copytree(here / "f0", out)
            status, errors = attempt(number, error, out)
            found = outcome(out, before, after)
            told = (kind, number, status, errors, found)
            assert (error == 0) == os.WIFSIGNALED(status), told
            if error:
                code = os.waitstatus_to_exitcode(status)
                assert code in (0, 1), told
                assert code == 1 or found == "new", told
                assert code == 0 or (len(errors) == 1 and errors[0].startswith("mcl-kernels: ")), told
                assert not any("Traceback" in line for line in errors), told
                found = f"{found}, exit status {code}"
            left[found] += 1
        report[kind] = left
    print(json.dumps(report))


if __name__ == "__main__":
    main()
