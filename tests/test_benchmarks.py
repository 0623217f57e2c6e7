"""The benchmark suite runs: a few cases at a tiny size, into a CSV elsewhere."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory of Linux")
def test_a_row_for_each_contender(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    for names in (("zipf", "bf16-d128-k10"), ("zipf", "batch-size")):
        result = run(*names, "--n", "256", "--csv", str(results))
        assert result.returncode == 0, result.stdout + result.stderr
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["peer"]) for row in rows] == [
        ("bf16-d128-k10", "ours"),
        ("bf16-d128-k10", "own, fp32"),
        ("zipf", "ours"),
        ("zipf", "eager, loop over clusters"),
        ("batch-size", "ours"),
        ("batch-size", "eager, dense mask"),
        ("batch-size", "eager, loop over clusters"),
    ]
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert int(row["peak_bytes"]) >= 0
        assert float(row["fraction_of_limit"]) > 0
        assert (row["ratio"] == "") == (row["peer"] == "ours")
        assert row["processor"]
        assert row["commit"]
    assert (tmp_path / "batch_size.png").stat().st_size > 10_000


def test_every_case_has_a_reason() -> None:
    lines = run("--list").stdout.splitlines()
    assert len(lines) >= 15
    assert all(line.count("[") == 1 and len(line.split()) > 4 for line in lines)


def test_an_unknown_case_is_named() -> None:
    result = run("zipfy")
    assert result.returncode == 2
    assert "no such case: zipfy" in result.stderr
