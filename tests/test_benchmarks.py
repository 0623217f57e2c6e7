"""The benchmark suite at tiny sizes, and the model of many ranks."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import build_time, large_file, measure, scale, scale_model, tables
from benchmarks.__main__ import COLUMNS
from benchmarks.cases import CASES, Case
from benchmarks.gpu import schedule
from mcl_kernels import nt_xent
from mcl_kernels.logsumexp.pairs import Pairs, make_plan
from tests import emulated_cuda

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


def test_each_step_is_the_first_of_some_turns() -> None:
    """The step before leaves the caches full, which no contender may suffer alone."""
    called: list[str] = []
    seconds = measure._in_turns({name: partial(called.append, name) for name in "abc"}, measure.CPU)
    turns = [called[begin : begin + 3] for begin in range(3, len(called), 3)]  # after the warm-up
    assert {turn[0] for turn in turns} == set("abc")
    assert all(sorted(turn) == list("abc") for turn in turns)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", measure.MAX_PASSES)


def test_the_schedule_counts_the_units_that_kernels_visit() -> None:
    """Compared with the plan of the kernels, for clusters smaller than, as large as and larger than a tile."""
    sizes = np.array([3, 60, 1, 64, 200, 7])
    labels = torch.arange(len(sizes)).repeat_interleave(torch.from_numpy(sizes))
    plan = make_plan(labels.unsqueeze(1), None, Pairs(labels, None, torch.arange(len(labels)), None, "same"))
    tiles = zip(plan.key_begin.split(64), plan.key_end.split(64), strict=True)
    expected = [-(-int(end.max() - begin.min()) // 32) for begin, end in tiles]
    n = int(sizes.sum())
    workload = schedule.Workload("", "self", 128, n, n, sizes)
    assert schedule.units_of_rows(workload, rows=64, columns=32).tolist() == expected


def test_the_model_is_drawn_and_printed_as_a_model(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "benchmarks.gpu.model", "--figure", str(tmp_path / "model.png")]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("A model, not a measurement")
    assert (tmp_path / "model.png").stat().st_size > 10_000


def costs_by_world(contender: str, labels: str, samples_per_rank: int, clusters: int) -> dict[int, scale_model.Cost]:
    """Costs by number of ranks, at a fixed batch per rank."""
    sizes = {world: scale_model.LABELS[labels](samples_per_rank * world, clusters) for world in (2, 8, 32)}
    return {world: scale_model.CONTENDERS[contender](n, world, torch.bfloat16) for world, n in sizes.items()}


def test_a_rank_moves_its_own_batch_by_cluster_and_the_global_one_by_gather() -> None:
    samples_per_rank = 20_000  # many, so that the exchanged labels are negligible
    rows = scale_model.VIEWS * samples_per_rank * scale_model.D * 2
    for cost in costs_by_world("ours, cluster", "balanced", samples_per_rank, clusters=320).values():
        for moved in (cost.sent, cost.received, cost.grad_sent, cost.grad_received):
            assert moved.max() < 1.1 * rows
    for contender in ("ours, gather", "dense, gather", "ring"):
        for world, cost in costs_by_world(contender, "balanced", samples_per_rank, clusters=320).items():
            assert cost.received.min() >= (world - 1) * rows
            assert cost.grad_sent.min() >= (world - 1) * rows


def test_operations_of_all_ranks_add_up_to_the_work() -> None:
    """Two products of each pair of rows in a cluster by cluster, if none is split; four by gather."""
    for world in (2, 8, 32):
        kept = sum((scale_model.VIEWS * n) ** 2 for n in scale_model.balanced(1000 * world, 64))
        every = (scale_model.VIEWS * 1000 * world) ** 2
        for contender, labels, products, pairs in (
            ("ours, cluster", "balanced", 2, kept),
            ("ours, gather", "balanced", 4, kept),
            ("dense, gather", "zipf", 3, every),
            ("ring", "zipf", 5, every),
        ):
            operations = costs_by_world(contender, labels, 1000, clusters=64)[world].operations
            assert operations.sum() == products * 2 * scale_model.D * pairs


@pytest.mark.parametrize("labels", list(scale_model.LABELS))
def test_work_is_balanced_over_ranks_by_cluster(labels: str) -> None:
    for cost in costs_by_world("ours, cluster", labels, 2000, clusters=200).values():
        assert cost.operations.max() <= 1.3 * cost.operations.mean()


@pytest.mark.slow
def test_processes_send_the_planned_bytes() -> None:
    for row in scale.measured_rows((2,), n=300, clusters=7, steps=1, turns=1):  # raises if the bytes differ
        assert row["seconds"] > 0
        assert row["bytes"] > 0


def test_the_figure_of_many_ranks_is_drawn_from_its_csv(tmp_path: Path) -> None:
    with (scale.HERE / "scale.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == scale.COLUMNS
    drawn = [
        row
        for row in rows
        if row["kind"] == "model" and int(row["batch"]) == scale_model.SAMPLES_PER_RANK * int(row["world"])
    ]
    assert len(drawn) == len(scale_model.WORLDS) * len(scale_model.LABELS) * len(scale_model.CONTENDERS)
    measured = [row for row in rows if row["kind"] == "measured"]
    assert {int(row["world"]) for row in measured} == set(scale.MEASURED_WORLDS)
    assert all(row["processor"] and row["commit"] and float(row["seconds"]) > 0 for row in measured)
    scale.draw(scale.HERE / "scale.csv", tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000


@pytest.mark.skipif(emulated_cuda.unavailable_reason() is not None, reason=str(emulated_cuda.unavailable_reason()))
@pytest.mark.parametrize("name", ["plain-nt-xent", "zipf", "queue", "clip", "clip-bf16"])
def test_on_a_gpu_the_kernels_in_cuda_are_a_contender(name: str) -> None:
    """Its loss and gradients are the same, here in the emulation."""
    case = measure.find(name)
    ours, cuda, *peers = case.contenders_on(torch.device("cuda"))
    assert (ours, *peers) == case.contenders_on(measure.CPU)
    assert (cuda.impl, cuda.own) == ("cuda", True)
    measure.check_agreement(case, cuda, 4 if name == "queue" else 64)


def test_every_case_has_a_reason() -> None:
    lines = run("--list").stdout.splitlines()
    assert len(lines) >= 15
    assert all(line.count("[") == 1 and len(line.split()) > 4 for line in lines)


def test_an_unknown_case_is_named() -> None:
    result = run("zipfy")
    assert result.returncode == 2
    assert "no such case: zipfy" in result.stderr


def threads_after_a_loss() -> int:
    nt_xent(torch.randn(4, 8), torch.randn(4, 8))
    return torch.get_num_threads()


def test_a_fresh_process_computes_with_all_threads() -> None:
    """Although mcl_kernels limits a process to one thread that is forked from a process with mcl_kernels."""
    code = (
        "from benchmarks.measure import in_fresh_process; from tests.test_benchmarks import threads_after_a_loss;"
        "print(in_fresh_process(threads_after_a_loss))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "2\n", result.stderr


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.startswith("small-batches")], ids=lambda case: case.name
)
def test_contenders_of_small_batches_agree(case: Case) -> None:
    for contender in case.contenders_on(measure.CPU)[1:]:
        measure.check_agreement(case, contender, case.sizes[0])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_a_fit_of_a_file_reads_it_in_each_pass(tmp_path: Path) -> None:
    path = tmp_path / "features.npy"
    large_file.write_file(path, 1000)
    timed = large_file.time_fit(path, "dropped") | large_file.time_dd(path, "dropped")
    assert list(timed) == ["k-means", "k-means, an iteration", "dd"]
    size = path.stat().st_size
    passes = 1 + large_file.ITERATIONS + 1  # the survey, and the labels of the last centres
    assert passes * size < timed["k-means"][1] + 4096 < (passes + 2) * size  # 2: rows of the initialisation
    assert timed["dd"][1] == size
    assert all(seconds > 0 for seconds, _ in timed.values())


@pytest.mark.slow
def test_the_first_loss_compiles_the_kernels(tmp_path: Path) -> None:
    compiling = build_time.seconds_of_first_loss(str(tmp_path))
    assert build_time.seconds_of_first_loss(str(tmp_path)) < compiling
    assert list(tmp_path.glob("mcl_kernels/*"))


def test_tables_of_the_pages_are_those_of_the_csv_files() -> None:
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.with_tables(text) == text, f"{page.name}: run `python -m benchmarks.tables`"


def test_a_table_is_replaced_between_its_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.TABLES, "demo", lambda: "new\n")
    text = "before\n<!-- table: demo -->\nold\n<!-- end -->\nafter\n"
    assert tables.with_tables(text) == text.replace("old", "new")
    assert tables.with_tables("no table") == "no table"
    with pytest.raises(KeyError, match="unknown"):
        tables.with_tables(text.replace("demo", "unknown"))


KMEANS = ("kmeans", "kmeans-iterations", "kmeans-quality")


def test_a_table_without_measurements_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(tables, "EXPERIMENTS", tmp_path)
    for name in ("six-results", "losses", "batch-size", "whole-step", *KMEANS, "kmeans-files", "build-time", "demo"):
        assert tables.TABLES[name]() == "Not measured yet.\n"


def test_a_table_has_the_spread_and_the_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = {"d": 128, "clusters": 10, "peak_bytes": 3 << 20, "threads": 2, "versions": "python 3.11.7; torch 2.6; x 1"}
    times = {"ours": (0.009, 0.010, 0.0123), tables.DENSE: (1.49, 1.5, 1.61)}
    rows = [
        {"case": "batch-size", "peer": peer, "n": 4096, "p20": p20, "p50": p50, "p80": p80, "ratio": p50 / 0.01}
        | fixed
        | {"processor": "A CPU", "commit": "abc"}
        for peer, (p20, p50, p80) in times.items()
    ]
    measure.write_rows(tmp_path / "results.csv", COLUMNS, rows)
    monkeypatch.setattr(tables, "BENCHMARKS", tmp_path)
    lines = tables.batch_size().splitlines()
    assert lines[2].startswith(
        "| 4,096 | 10.0 ms (9.00 to 12.3), 3.00 MiB | 1.50 s (1.49 to 1.61), 3.00 MiB: 150 times |"
    )
    assert lines[-1].endswith("A CPU, 2 threads, python 3.11.7, torch 2.6, commit abc.")
