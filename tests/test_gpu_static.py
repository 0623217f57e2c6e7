"""Resources of the kernels in Triton and CUDA C++, compiled for GPUs that need not be available."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip(
    "triton", minversion="3.9", reason="of the gpu extra; the table is for this compiler or a newer one"
)

from benchmarks import gpu_kernels, gpu_static
from mcl_kernels.backends import cuda as _cuda

# A few bytes are allowed: with all 255 registers in use, spills of this size come and go with the order of
# instructions, and fewer columns of a tile or fewer stages cost more than one spilled register.
STACK_BYTES = 16
CUDA_KERNELS = {
    name
    for path in _cuda.source_directory().glob("*.cuh")
    for name in re.findall(r"__global__[^;{]*?\b(\w+)_kernel\(", path.read_text())
}


@pytest.mark.slow
def test_every_kernel_of_the_table_fits_its_architecture() -> None:
    rows = gpu_static.compile_triton(every_width_of=("forward", "backward"))
    assert len(rows) == 180
    for row in rows:
        name = f"{row['kernel']} of {row['precision']}, D {row['d']}, on {row['architecture']}"
        assert row["stack"] <= STACK_BYTES, f"{name} spills: {row['stack']} bytes of stack"
        assert row["tensor_core"] > 0, f"{name} does not use the tensor cores' fast path"
        assert row["shared"] <= row["shared_limit"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["tensor_memory"] <= gpu_static.TENSOR_MEMORY, f"{name}: {row['tensor_memory']} columns of its memory"
        assert row["rows"] >= 64, f"{name}: {row['rows']} rows of a tile"
        # Spills must not be avoided by more work. tf32x3 keeps its sums twice, for accuracy: only sm_80 has room for
        # 64 x 512 of them.
        parts = 4 if row["precision"] == "tf32x3" and row["architecture"] != "sm_80" else 2
        assert row["units_self"] <= 2 + parts, f"{name}: {row['units_self']} units of the self form"
        assert row["units_one_direction"] <= 3 + 2 * parts, f"{name}: {row['units_one_direction']} of one direction"


@pytest.mark.slow
def test_the_kernels_of_k_means_fit_their_architecture() -> None:
    rows = gpu_static.compile_triton(gpu_kernels.KMEANS)
    assert len(rows) == 6 * len(gpu_kernels.ASSIGN) + 9
    for row in rows:
        name = f"{row['kernel']}, of {row['precision']} on {row['architecture']}"
        assert row["stack"] == row["spills"] == 0, f"{name} spills: {row['stack']} bytes of stack"
        multiplies = row["kernel"] in gpu_kernels.ASSIGN
        assert (row["tensor_core"] > 0) == multiplies, f"{name}: {row['tensor_core']} instructions of the tensor cores"
        assert row["shared"] <= row["shared_limit"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["tensor_memory"] <= gpu_static.TENSOR_MEMORY, f"{name}: {row['tensor_memory']} columns of its memory"


def cuda_kernel(row: dict[str, str]) -> str:
    return row["kernel"].removeprefix("cuda: ").split(", ")[0]


@pytest.mark.slow
@pytest.mark.skipif(_cuda.find_nvcc() is None, reason="no nvcc is on the PATH")
def test_the_kernels_of_cuda_fit_their_architecture() -> None:
    rows = gpu_static.compile_cuda()
    assert {cuda_kernel(row) for row in rows} == CUDA_KERNELS
    on_tensor_cores = {(row["kernel"], row["precision"]) for row in rows if row["tensor_core"]}
    assert {precision for kernel, precision in on_tensor_cores if "masked_lse" in kernel} == {"fp16", "bf16"}
    for row in rows:
        name = f"{row['kernel']} of {row['precision']} on {row['architecture']}"
        assert row["stack"] == row["spills"] == 0, f"{name} spills: {row['stack']} bytes of stack"
        assert row["shared"] <= row["shared_limit"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["resident_warps"] >= 8, f"{name}: {row['resident_warps']} warps of a multiprocessor"
        # The tensor cores of sm_75 do not have bf16.
        multiplies = (row["kernel"], row["precision"]) in on_tensor_cores
        multiplies &= (row["precision"], row["architecture"]) != ("bf16", "sm_75")
        assert (row["tensor_core"] > 0) == multiplies, f"{name}: {row['tensor_core']} instructions of the tensor cores"


def test_the_table_has_every_kernel_of_cuda() -> None:
    with (gpu_static.HERE / "gpu_static.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"].startswith("cuda: ")]
    for architecture in gpu_static.CUDA_ARCHITECTURES:
        assert {cuda_kernel(row) for row in rows if row["architecture"] == f"sm_{architecture}"} == CUDA_KERNELS
    assert tuple(rows[0]) == gpu_static.COLUMNS


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
    assert gpu_static._kernel_name(function) == name


def test_new_rows_of_some_kernels_keep_the_rows_of_others(tmp_path: Path) -> None:
    path = tmp_path / "gpu_static.csv"
    first, middle, cuda, last = gpu_kernels.OWN[0], gpu_kernels.KMEANS[0], "cuda: assign", gpu_kernels.MEMEFF[0]
    gpu_static.save(path, (last, first), [{"kernel": last, "d": 1}, {"kernel": first, "d": 1}])
    gpu_static.save(path, (gpu_static.CUDA,), [{"kernel": "cuda: of an earlier version"}])
    gpu_static.save(path, (gpu_static.CUDA,), [{"kernel": cuda, "d": ""}])
    gpu_static.save(path, (middle, last), [{"kernel": middle, "d": 2}, {"kernel": last, "d": 2}])
    with path.open(newline="") as file:
        rows = [(row["kernel"], row["d"]) for row in csv.DictReader(file)]
    assert rows == [(first, "1"), (middle, "2"), (cuda, ""), (last, "2")]
