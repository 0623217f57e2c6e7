"""The benchmark suite at tiny sizes, and the model of many ranks."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import clustering, gpu_model, measure, scale, scale_model
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


@pytest.mark.parametrize("contender", ["ours", "reference", "ours, assignment", "scikit-learn", "x.sum()"])
def test_contenders_of_the_clustering_benchmark(contender: str) -> None:
    case = clustering.Case("small", 3000, 8, 5, {})
    assert math.isfinite(clustering.measure(contender, case, "cpu"))  # a difference: below 0 at times in a small case


def test_each_target_has_a_contender() -> None:
    for case in (*clustering.CASES, *clustering.GPU_CASES):
        assert set(case.targets) < set(clustering.CONTENDERS)


def test_the_model_counts_the_pairs_that_kernels_visit() -> None:
    """Compared with the plan of the kernels, for clusters smaller than, as large as and larger than a tile."""
    sizes = np.array([3, 60, 1, 64, 200, 7])
    labels = torch.arange(len(sizes)).repeat_interleave(torch.from_numpy(sizes))
    plan = make_plan(labels.unsqueeze(1), None, Pairs(labels, None, torch.arange(len(labels)), None, "same"))
    expected = 0
    for begin, end in zip(plan.key_begin.split(64), plan.key_end.split(64), strict=True):
        expected += 64 * 32 * -(-int(end.max() - begin.min()) // 32)
    assert gpu_model.visited_pairs(sizes, rows=64, columns=32) == expected


def test_the_model_is_drawn_and_printed_as_a_model(tmp_path: Path) -> None:
    pytest.importorskip("memeff", reason="the model has its tiles; of the bench extra")
    arguments = [sys.executable, "-m", "benchmarks.gpu_model", "--figure", str(tmp_path / "model.png")]
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
