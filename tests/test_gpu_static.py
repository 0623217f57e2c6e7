"""Resources of the kernels in Triton and CUDA C++, compiled for GPUs that need not be available."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "triton", minversion="3.9", reason="of the gpu extra; the table is for this compiler or a newer one"
)

from benchmarks.gpu import compiled, kernels, own, peers, static
from benchmarks.measure import read_rows
from mcl_kernels.backends import cuda as _cuda

# With all 255 registers in use what a stretch of tiles keeps is spilled before its loop and read after it. Slots, which
# count spills within a loop, are bounded below.
STACK_BYTES = 1024
# Bounds of the inner loops on sm_90: kernel, precision, D, column, the largest value allowed.
LIMITS = (
    ("forward", "bf16", 64, "slots", 7.5), ("forward", "bf16", 128, "slots", 7.5),
    ("forward", "bf16", 128, "slots_masked", 14), ("forward", "bf16", 128, "l2_bytes", 4),
    ("forward", "bf16", 128, "synchronous_loads", 0), ("forward", "bf16", 200, "spills", 0),
    ("forward", "bf16", 512, "slots", 23), ("forward", "bf16", 512, "l2_bytes", 8),
    ("backward", "bf16", 64, "slots", 9), ("backward", "bf16", 128, "slots", 9),
    ("backward", "bf16", 128, "slots_masked", 15), ("backward", "bf16", 128, "mufu", 1),
    ("backward", "bf16", 128, "synchronous_loads", 0), ("backward", "bf16", 200, "spills", 90),
    ("backward", "bf16", 512, "slots", 30), ("backward", "bf16", 512, "l2_bytes", 16.5),
    ("backward", "bf16", 512, "synchronous_loads", 0),
    ("forward", "fp32", 128, "slots", 22), ("backward", "fp32", 128, "slots", 32),
    ("forward, unaligned", "bf16", 128, "slots", 7.5), ("backward, unaligned", "bf16", 128, "slots", 9),
)  # fmt: skip
MIN_CTAS = {("forward", 64): 2, ("forward", 128): 2, ("backward", 64): 2, ("backward", 128): 2}  # bf16 on sm_90
ODD_WIDTH = 200
CUDA_KERNELS = {
    name
    for path in _cuda.source_directory().glob("*.cuh")
    for name in re.findall(r"__global__[^;{]*?\b(\w+)_kernel\(", path.read_text())
}


def find(rows: list[dict[str, Any]], kernel: str, architecture: str, precision: str, d: int) -> dict[str, Any]:
    """Row of the newest compiler, which stands first."""
    key = (kernel, architecture, precision, str(d))
    return next(row for row in rows if (row["kernel"], row["architecture"], row["precision"], str(row["d"])) == key)


def check_limits(rows: list[dict[str, Any]]) -> None:
    for kernel, precision, d, column, limit in LIMITS:
        value = float(find(rows, kernel, "sm_90", precision, d)[column])
        assert value <= limit, f"{kernel} of {precision}, D {d}: {value} {column}, more than {limit}"
    for (kernel, d), ctas in MIN_CTAS.items():
        assert int(find(rows, kernel, "sm_90", "bf16", d)["ctas"]) >= ctas, f"{kernel}, D {d}"


def test_the_table_is_within_the_limits() -> None:
    check_limits(read_rows(static.HERE / "static.csv"))


@pytest.mark.slow
def test_every_kernel_of_the_table_fits_its_architecture() -> None:
    rows = static.compile_triton()
    assert len(rows) == 9 * (2 * len(static.WIDTHS) + 4 * len(static.SOME_WIDTHS)) + 3 * 2 * len(static.SOME_WIDTHS)
    check_limits(rows)
    for row in rows:
        name = f"{row['kernel']} of {row['precision']}, D {row['d']}, on {row['architecture']}"
        assert row["tensor_core"] > 0, f"{name} does not use the tensor cores' fast path"
        assert row["shared"] <= row["shared_limit"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["tensor_memory"] <= compiled.TENSOR_MEMORY, f"{name}: {row['tensor_memory']} columns of its memory"
        assert row["rows"] >= 64, f"{name}: {row['rows']} rows of a tile"
        assert row["stack"] <= STACK_BYTES, f"{name} spills: {row['stack']} bytes of stack"
        if row["units_self"] is None:
            continue
        # Spills must not be avoided by much more work.
        parts = 4 if row["precision"] == "fp32" else 2
        assert row["units_self"] <= 2 + parts, f"{name}: {row['units_self']} units of the self form"
        assert row["units_one_direction"] <= 3 + 2 * parts, f"{name}: {row['units_one_direction']} of one direction"


@pytest.mark.slow
def test_the_kernels_of_k_means_fit_their_architecture() -> None:
    rows = static.compile_triton(kernels.KMEANS)
    assert len(rows) == 6 * len((*kernels.ASSIGN, *kernels.PARTS)) + 9
    for row in rows:
        name = f"{row['kernel']}, of {row['precision']} on {row['architecture']}"
        assert row["stack"] == row["spills"] == 0, f"{name} spills: {row['stack']} bytes of stack"
        multiplies = row["kernel"] in (*kernels.ASSIGN, kernels.PARTS[0])
        assert (row["tensor_core"] > 0) == multiplies, f"{name}: {row['tensor_core']} instructions of the tensor cores"
        assert row["shared"] <= row["shared_limit"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["tensor_memory"] <= compiled.TENSOR_MEMORY, f"{name}: {row['tensor_memory']} columns of its memory"


def cuda_kernel(row: dict[str, str]) -> str:
    return row["kernel"].removeprefix("cuda: ").split(", ")[0]


@pytest.mark.slow
@pytest.mark.skipif(_cuda.find_nvcc() is None, reason="no nvcc is on the PATH")
def test_the_kernels_of_cuda_fit_their_architecture() -> None:
    rows = compiled.compile_cuda()
    assert {cuda_kernel(row) for row in rows} == CUDA_KERNELS
    on_tensor_cores = {(row["kernel"], row["precision"]) for row in rows if row["tensor_core"]}
    assert {precision for kernel, precision in on_tensor_cores if "masked_lse" in kernel} == {"fp16", "bf16"}
    for row in rows:
        name = f"{row['kernel']} of {row['precision']} on {row['architecture']}"
        assert row["stack"] == row["spills"] == 0, f"{name} spills: {row['stack']} bytes of stack"
        assert row["shared"] <= row["shared_limit"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["ctas"] * row["warps"] >= 8, f"{name}: {row['ctas']} CTAs of a multiprocessor"
        # The tensor cores of sm_75 do not have bf16.
        multiplies = (row["kernel"], row["precision"]) in on_tensor_cores
        multiplies &= (row["precision"], row["architecture"]) != ("bf16", "sm_75")
        assert (row["tensor_core"] > 0) == multiplies, f"{name}: {row['tensor_core']} instructions of the tensor cores"


def test_the_table_has_every_kernel_of_cuda() -> None:
    with (static.HERE / "static.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"].startswith("cuda: ")]
    for architecture in compiled.CUDA_ARCHITECTURES:
        assert {cuda_kernel(row) for row in rows if row["architecture"] == f"sm_{architecture}"} == CUDA_KERNELS
    assert tuple(rows[0]) == static.COLUMNS


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("_ZN3mcl25masked_lse_forward_kernelI6__halfEEvNS_14ForwardProblemIfEE", ("masked_lse_forward", "fp16")),
        ("_ZN3mcl10sum_kernelIdLi3ELb1EEEvNS_7ProblemE", ("sum, 3, true", "fp64")),
        ("_ZN3mcl10sum_kernelILi3EEEvNS_7ProblemE", ("sum, 3", "")),
        ("_ZN3mcl19find_dropped_kernelENS_11DropProblemE", ("find_dropped", "")),
    ],
)
def test_kernels_are_named_by_their_template_arguments(function: str, name: tuple[str, str]) -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt, which is part of g++")
    assert compiled._kernel_name(function) == name


def test_new_rows_of_some_kernels_keep_the_rows_of_others(tmp_path: Path) -> None:
    path = tmp_path / "static.csv"
    first, middle, cuda, last = own.OWN[0], kernels.KMEANS[0], "cuda: assign", peers.MEMEFF[0]
    static.save(path, (last, first), [{"kernel": last, "d": 1}, {"kernel": first, "d": 1}])
    static.save(path, (compiled.CUDA,), [{"kernel": "cuda: of an earlier version"}])
    static.save(path, (compiled.CUDA,), [{"kernel": cuda, "d": ""}])
    static.save(path, (middle, last), [{"kernel": middle, "d": 2}, {"kernel": last, "d": 2}])
    with path.open(newline="") as file:
        rows = [(row["kernel"], row["d"]) for row in csv.DictReader(file)]
    assert rows == [(first, "1"), (middle, "2"), (cuda, ""), (last, "2")]


def test_rows_of_the_older_compiler_stand_last_and_stay(tmp_path: Path) -> None:
    path, kernel = tmp_path / "static.csv", own.OWN[0]
    static.save(path, (kernel,), [{"kernel": kernel, "d": 1, "compiler": "triton 3.6.0"}])
    for version in ("3.9.0", "3.10.0"):
        static.save(path, (kernel,), [{"kernel": kernel, "d": 1, "compiler": f"triton {version}"}])
    assert [row["compiler"] for row in read_rows(path)] == ["triton 3.10.0", "triton 3.6.0"]
