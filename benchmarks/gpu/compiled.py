"""Compiles GPU kernels for any architecture, without a GPU, and reads what the compilers report of them.

Triton's kernels come as a `Launch`, those of csrc/cuda as its sources.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.kernels import LIBRARY, Launch
from benchmarks.gpu.loop import LoopCost, count_loops
from benchmarks.gpu.traffic import feature_bytes
from benchmarks.measure import Row
from mcl_kernels.backends import cuda

CUDA = "cuda"  # all kernels of csrc/cuda
CUDA_ARCHITECTURES = (75, 80, 90, 100)
CUDA_PRECISIONS = {"__half": "fp16", "__nv_bfloat16": "bf16", "float": "fp32", "double": "fp64"}  # by operand type
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of a program
CUDA_SHARED_LIMIT = 49_152  # bytes of a launch without an opt-in for more
# Per multiprocessor: bytes of shared memory, registers, warps, columns of tensor memory.
MULTIPROCESSOR_SHARED = {75: 65_536, 80: 167_936, 90: 233_472, 100: 233_472}
RESERVED_SHARED = {75: 0, 80: 1024, 90: 1024, 100: 1024}  # bytes that the system takes of each block
RESERVED_IN_CUBIN = {75: 0, 80: 0, 90: 1024, 100: 1024}  # part of them that a cubin counts as the kernel's
MULTIPROCESSOR_REGISTERS = 65_536
MULTIPROCESSOR_WARPS = {75: 32, 80: 64, 90: 64, 100: 64}
TENSOR_MEMORY = 512  # columns of a multiprocessor, from sm_100 on
TENSOR_CORES = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\bUTC\w*MMA"}  # the fast path of each
WMMA = r"\bHMMA"


class Code(NamedTuple):
    """Resources of a compiled kernel, and its instructions."""

    registers: int
    stack: int
    shared: int  # bytes of static shared memory
    listing: str

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.listing))


class Compiled(NamedTuple):
    """A kernel of Triton."""

    code: Code
    costs: list[LoopCost]  # of its inner loops, the cheapest first; none without products
    ttgir: str  # the compiler's own listing
    shared: int
    tensor_memory: int


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    compiled = launch.compile()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = disassemble(file.name).values()
    costs = count_loops(code.listing, launch.tile(architecture)) if launch.depth else []
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return Compiled(code, costs, compiled.asm["ttgir"], compiled.metadata.shared, tensor_memory)


def launch_row(launch: Launch, architecture: int) -> Row:
    """What the compiler reports of a kernel, and the costs of its inner loop."""
    import triton

    compiled = compile_launch(launch, architecture)
    code, costs = compiled.code, compiled.costs
    row: Row = {
        **_resources(code, architecture, launch.warps, compiled.shared, compiled.tensor_memory),
        "shared_limit": SHARED_LIMIT[architecture], "tensor_core": code.count(TENSOR_CORES[architecture]),
        "compiler": f"triton {triton.__version__}",
    }  # fmt: skip
    if costs:
        cheapest = costs[0]
        row |= {
            "loops": len(costs), "slots": cheapest.slots, "slots_masked": cheapest.slots_masked,
            "slots_dearest": max(cost.slots_masked for cost in costs), "mufu": cheapest.mufu,
            "tensor": cheapest.tensor, "l2_bytes": feature_bytes(compiled.ttgir, launch.tile(architecture)),
            "synchronous_loads": cheapest.loads,
        }  # fmt: skip
    return row


def compile_cuda() -> list[Row]:
    """Rows of all kernels of csrc/cuda."""
    cases = list(product(sorted(cuda.source_directory().glob("*.cu")), CUDA_ARCHITECTURES))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for rows in pool.map(_compile_source, *zip(*cases, strict=True)) for row in rows]
    return sorted(rows, key=lambda row: row["kernel"])


def _compile_source(source: Path, architecture: int) -> list[Row]:
    nvcc = cuda.find_nvcc()
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as directory:
        cubin = f"{directory}/kernels.cubin"
        options = ["-cubin", f"-arch=sm_{architecture}", "--keep", "--keep-dir", directory]
        _run(nvcc, *cuda.FLAGS, *options, str(source), "-o", cubin)
        codes = disassemble(cubin)
        ptx = Path(f"{directory}/{source.stem}.ptx").read_text()
    rows = []
    for function, text in re.findall(r"\.entry (\w+)\((.*?)(?=\.entry|\Z)", ptx, re.DOTALL):
        code, (name, precision) = codes[function], _kernel_name(function)
        bounds = re.search(r"\.maxntid (\d+)", text)
        assert bounds, f"{name} has no __launch_bounds__, from which its number of threads is read"
        warps = int(bounds[1]) // 32
        dynamic = re.findall(r"dynamic shared memory: (\d+)", text)  # a comment of shared_memory() in tiles.cuh
        shared = code.shared - RESERVED_IN_CUBIN[architecture] + max(map(int, dynamic), default=0)
        rows.append({
            "library": LIBRARY, "kernel": f"{CUDA}: {name}",
            "architecture": f"sm_{architecture}", "precision": precision, "d": "", "warps": warps,
            **_resources(code, architecture, warps, shared, 0), "shared_limit": CUDA_SHARED_LIMIT,
            "tensor_core": code.count(WMMA), "compiler": f"nvcc {cuda.nvcc_release(nvcc)}",
        })  # fmt: skip
    return rows


def _kernel_name(function: str) -> tuple[str, str]:
    """Name and precision of a mangled function: "sum, 3" and "fp16" of mcl::sum_kernel<__half, 3>."""
    name, _, arguments = re.search(r"(\w+)_kernel(<(.*?)>)?\(", _run("c++filt", function)).groups()
    template = arguments.split(", ") if arguments else []
    others = [argument for argument in template if argument not in CUDA_PRECISIONS]
    return ", ".join([name, *others]), ", ".join(CUDA_PRECISIONS[x] for x in template if x in CUDA_PRECISIONS)


def disassemble(cubin: str) -> dict[str, Code]:
    import triton.backends.nvidia

    tool = str(Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump")
    usage, code = (_run(tool, option, cubin) for option in ("-res-usage", "-sass"))
    listings = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", code, re.DOTALL))
    used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    return {function: Code(*map(int, numbers), listings[function]) for function, *numbers in used}


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(code: Code, architecture: int, warps: int, shared: int, tensor_memory: int) -> Row:
    blocks = min(
        MULTIPROCESSOR_REGISTERS // (-(-code.registers // 8) * 8 * 32 * warps),
        MULTIPROCESSOR_SHARED[architecture] // max(shared + RESERVED_SHARED[architecture], 1),
        TENSOR_MEMORY // max(tensor_memory, 1),
        MULTIPROCESSOR_WARPS[architecture] // warps,
    )
    return {
        "registers": code.registers, "stack": code.stack, "spills": code.count(r"\b(?:STL|LDL)"),
        "shared": shared, "tensor_memory": tensor_memory, "loads": code.count(r"\b(?:LDG|LDGSTS)\b"),
        "special_function": code.count(r"\bMUFU"), "ctas": blocks,
    }  # fmt: skip
