"""The demo from the command line: its table, its report, resuming after a kill, and the effect it shows."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mlxtend", reason="the demo extra is not installed")

import mcl_kernels
from benchmarks.measure import read_rows
from experiments.demo import run_seed, save
from mcl_kernels.cli.demo import run
from mcl_kernels.cli.demo_results import Row, Settings
from mcl_kernels.cli.main import main

COMMAND = [sys.executable, "-m", "mcl_kernels", "demo", "--quick"]


class Recorder:
    """A display that records its calls."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.trained: list[str] = []
        self.losses: list[float] = []

    def start(self, name: str, steps: int) -> None:
        self.trained.append(name)

    def step(self, loss: float) -> None:
        self.losses.append(loss)

    def add_row(self, row: Row) -> None:
        self.rows.append(row)


ROWS = [
    "ceiling: SimCLR, no bits",
    "stage 0: SimCLR",
    "stage 1: MCL",
    "stage 2: MCL",
    "all stages, concatenated",
]


@pytest.mark.slow
def test_a_killed_demo_resumes(tmp_path: Path) -> None:
    """Killed after the first stage, resumed by the command, printed again, and resumed after stages are deleted."""
    with subprocess.Popen([*COMMAND, "--output", str(tmp_path)], stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "stages" / "stage-0").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    result = subprocess.run([*COMMAND, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in ROWS:
        assert re.search(rf"^{name}\s+[01]\.\d\d", result.stdout, re.MULTILINE), name

    html = (tmp_path / "report.html").read_text()
    pictures = [base64.b64decode(uri) for uri in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert len(pictures) == 4
    for picture in pictures:
        width, height = struct.unpack(">II", picture[16:24])
        assert picture.startswith(b"\x89PNG")
        assert min(width, height) > 200
    assert "http" not in re.sub(r"base64,[^\"]+", "", html), "self-contained"

    again = subprocess.run([*COMMAND, "--output", str(tmp_path)], capture_output=True, text=True, check=True)
    assert again.stdout == result.stdout, "a finished run is printed again without training"
    other = subprocess.run(
        [*COMMAND, "--bits", "4", "--output", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "holds another run: bits is 8 there and 4 here" in other.stderr

    # Stages deleted on the advice of the error about a damaged file are trained and printed again, once.
    for index in (1, 2):
        shutil.rmtree(tmp_path / "stages" / f"stage-{index}")
    settings = Settings(**json.loads((tmp_path / "results.json").read_text())["settings"])
    results = run(settings, tmp_path, display := Recorder())
    assert display.trained == ["stage 1: MCL", "stage 2: MCL"]
    assert [row.name for row in display.rows] == ROWS
    assert results.neighbours.shape == (len(results.anchors), 3, 3)
    assert [row.name for row in results.stages] == ROWS[1:4]
    assert [len(row.ami) for row in results.stages] == [0, 1, 2]
    assert [sum(row.label_sizes) for row in results.stages] == [settings.samples] * 3


def test_seeds_of_the_demo_are_rows(tmp_path: Path) -> None:
    """A finished seed is read again, and keeps the rows of the others."""
    csv = tmp_path / "demo.csv"
    for seed in (1, 0, 1):
        settings = Settings(samples=256, epochs=1, stages=1, clusters=2, bits=1, seed=seed)
        save(csv, seed, run_seed(settings, tmp_path))
    rows = read_rows(csv)
    names = ["ceiling: SimCLR, no bits", "stage 0: SimCLR", "all stages, concatenated"]
    assert [(row["seed"], row["name"]) for row in rows] == [(seed, name) for seed in "01" for name in names]
    assert all(0 <= float(row["digit_probe"]) <= 1 and row["commit"] for row in rows)
    assert [row["pseudo_labels"] for row in rows[:3]] == ["", "1", ""]
    assert (tmp_path / "demo-seed1").is_dir()


@pytest.mark.slow
def test_mcl_recovers_the_digits_that_simclr_suppresses(tmp_path: Path) -> None:
    """Uses fewer images and epochs than the demo. A broken mask would remove the effect."""
    results = run(Settings(stages=2, epochs=12, samples=2500), tmp_path, Recorder())
    simclr, mcl = results.stages
    assert results.ceiling.digit_probe > 0.85
    assert simclr.digit_probe < 0.2
    assert simclr.bit_probe is not None
    assert simclr.bit_probe > 0.98
    assert mcl.digit_probe > simclr.digit_probe + 0.2
    assert results.concatenated.digit_probe > simclr.digit_probe + 0.2


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in (f"mcl_kernels {mcl_kernels.__version__}", "torch", "blockwise", "reference", "cuda", "scikit-learn"):
        assert word in printed


def test_bad_settings_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--bits", "0", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "mcl-kernels: bits must be at least 1: got 0\n"
    (tmp_path / "file").touch()
    assert main(["demo", "--quick", "--output", str(tmp_path / "file")]) == 1
    assert "File exists" in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo", "--quick"]) == 1
    assert "pip install 'mcl-kernels[demo]'" in capsys.readouterr().err
