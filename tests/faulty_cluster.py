"""Runs `mcl-kernels cluster` over earlier output, killed or failing at each file system call below its directory.

`python -m tests.faulty_cluster DIRECTORY`, see file_faults.py; prints the outcomes as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from mcl_kernels import KMeans
from mcl_kernels._durable import sha256_of
from mcl_kernels.cli.input_files import open_labels
from mcl_kernels.cli.main import main as run_command
from tests.command_files import N, save_features
from tests.file_faults import ERRORS, fault, killed_at_each_call

LABELS, SUMMARY, CENTERS = "y.npy", "y.npy.json", "c.safetensors"


class Files(NamedTuple):
    """Digests of the files of a run: the labels, the labels that the summary describes, and the centres."""

    labels: str
    summary: str
    centers: str


def read(out: Path) -> Files:
    described = json.loads((out / SUMMARY).read_text())["sha256"]
    return Files(sha256_of(out / LABELS), described, str(KMeans.load(out / CENTERS).cluster_centers_.tolist()))


def cluster(features: str, out: Path) -> tuple[int, str]:
    """Runs the command; returns its exit status and standard error."""
    command = ["cluster", features, "--clusters", "3", "--out", str(out / LABELS), "--centers", str(out / CENTERS)]
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        return run_command(command), errors.getvalue()


def outcome(out: Path, old: Files, new: Files) -> str:
    """Classifies the files as old, new or a mixture, and checks whether a mixture is detected."""
    found = read(out)
    assert all(now in pair for now, *pair in zip(found, old, new, strict=True)), "a damaged file"
    labels_new, summary_new, centers_new = (now == after for now, after in zip(found, new, strict=True))
    if labels_new != summary_new:
        try:
            open_labels(out / LABELS, N)
        except ValueError as error:
            return "refused mixture" if "their SHA-256 differ" in str(error) else str(error)
        return "silent mixture"
    if summary_new != centers_new:
        recorded = json.loads((out / SUMMARY).read_text())["centers_sha256"]
        return "silent mixture" if recorded == sha256_of(out / CENTERS) else "centres other than those of the summary"
    return "new" if labels_new else "old"


def copies(original: Path, name: str) -> Iterator[Path]:
    """Yields new copies of a directory."""
    for number in count():
        directory = original.with_name(f"{name}-{number}")
        shutil.copytree(original, directory)
        yield directory


def kill(old: Path, new: Path) -> str:
    outcomes = Counter(
        outcome(out, read(old), read(new))
        for out in killed_at_each_call(lambda out: cluster("f1.npy", out), copies(old, "killed"))
    )
    return json.dumps({"kind": "killed", "points": outcomes.total(), "outcomes": outcomes})


def fail(old: Path, new: Path, error: int, *, lasting: bool) -> str:
    """Runs the command on a disk that fails at one call, or from that call on."""
    outcomes: Counter[str] = Counter()
    name = errno.errorcode[error] + (" from then on" if lasting else "")
    for number, out in enumerate(copies(old, name)):
        with fault(out, number, error, lasting=lasting) as calls:
            status, errors = cluster("f1.npy", out)
        if calls[0] <= number:
            break
        found = outcome(out, read(old), read(new))
        lines = [line for line in errors.splitlines() if not line.startswith("mcl-kernels: warning: ")]
        assert status == len(lines), (number, status, errors)
        assert status or found == "new", (number, found, errors)
        assert "Traceback" not in errors, errors
        assert (f"{LABELS} was already replaced" in errors) == (status == 1 and found != "old"), (found, errors)
        outcomes[f"{found}, exit status {status}"] += 1
    return json.dumps({"kind": name, "points": outcomes.total(), "outcomes": outcomes})


def main(root: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(root)
    save_features()
    for features in ("f0", "f1"):
        assert cluster(f"{features}.npy", root / features) == (0, "")
    old, new = root / "f0", root / "f1"
    print(kill(old, new))
    for error in ERRORS:
        for lasting in (False, True):
            print(fail(old, new, error, lasting=lasting))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
