"""results.csv of experiments/suppression: rows are read back in full precision, and damage is named."""

from __future__ import annotations

import csv
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.suppression.__main__ import RESULTS
from experiments.suppression.results import add_result, read_results, write_results
from experiments.suppression.suite import CONTROLS, SEEDS, runs_of
from experiments.suppression.tables import OVERVIEW_DATA
from tests.made_up_results import TRIFEATURE, controls, made_up

RUNS = [
    *controls()[:3],
    made_up("randbits-8", "mcl+simclr", 0, {"digit": 1 / 3, "bits": 0.1 + 0.2}, temperature=0.30000000000000004),
    made_up("trifeature-64", "mcl+simclr", 0, TRIFEATURE),
    made_up("emoji-captions", "mcl+clip", 0, {"category": 0.5}),
    made_up("emoji-captions", "clip", 0, {"category": 0.5}),
]


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "results.csv"
    write_results(path, RUNS)
    results = read_results(path)
    assert {result.settings: result for result in results} == {run.settings: run for run in RUNS}
    assert [list(result.concatenation) for result in results[-3:]] == [["shape", "texture", "color"]] + [
        ["category"]
    ] * 2
    write_results(path.with_name("again.csv"), results[::-1])
    assert path.with_name("again.csv").read_bytes() == path.read_bytes()  # sorted, whatever the order


def test_an_encoder_without_a_recorded_commit(tmp_path):
    run = RUNS[3]
    run = replace(run, encoders=[replace(encoder, commit="") for encoder in run.encoders])
    write_results(tmp_path / "results.csv", [run])
    assert read_results(tmp_path / "results.csv") == [run]


def test_a_result_replaces_that_of_the_same_settings(tmp_path):
    path = tmp_path / "new" / "results.csv"
    assert read_results(path) == []
    for run in RUNS:
        add_result(path, run)
    better = replace(RUNS[0], concatenation={"digit": 0.5, "bits": 1.0})
    add_result(path, better)
    assert len(read_results(path)) == len(RUNS)
    assert better in read_results(path)
    assert [file.name for file in path.parent.iterdir()] == ["results.csv"]


def test_processes_that_add_at_the_same_time_lose_no_row(tmp_path):
    runs = [made_up("randbits-8", "simclr", seed, {"digit": 0.1, "bits": 1.0}) for seed in range(12)]
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(add_result, [tmp_path / "results.csv"] * len(runs), runs))
    assert read_results(tmp_path / "results.csv") == runs


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("epochs", "many", "invalid literal for int.*'many'"),
        ("encoder_probe_digit", "0.1 0.2", "expected 1 values: got '0.1 0.2'"),
        ("layer", "head", "layer must be one of"),
        ("seconds", "", "expected 1 values: got ''"),
    ],
)
def test_a_damaged_row_is_named_by_its_line(tmp_path, column, cell, reason):
    path = tmp_path / "results.csv"
    write_results(path, RUNS)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    rows[1][column] = cell
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match=rf"results.csv, line 3: not the result of a run \(.*{reason}"):
        read_results(path)


def test_a_missing_column_and_a_short_line_are_named(tmp_path):
    path = tmp_path / "results.csv"
    write_results(path, RUNS)
    path.write_text(path.read_text().replace(",dimensions,", ",wide,", 1))
    with pytest.raises(ValueError, match=r"line 2: not the result of a run \(no column 'dimensions'\)"):
        read_results(path)
    write_results(path, RUNS)
    path.write_text(path.read_text() + "randbits-8,simclr,7\n")
    with pytest.raises(ValueError, match=rf"line {len(RUNS) + 2}: not the result of a run"):
        read_results(path)


def test_the_committed_results_are_sorted_and_have_the_controls(tmp_path: Path):
    results = read_results(RESULTS)
    controls = {settings for data in OVERVIEW_DATA for settings in runs_of(data, CONTROLS, SEEDS)}
    assert controls <= {result.settings for result in results}
    assert len({result.settings for result in results}) == len(results)
    write_results(tmp_path / "results.csv", results)
    assert (tmp_path / "results.csv").read_bytes() == RESULTS.read_bytes()
