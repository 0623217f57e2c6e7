"""Resources of the compiled GPU kernels, ours and the peers': `python -m benchmarks.gpu_static` writes gpu_static.csv.

No GPU is needed: Triton's compiler and disassembler, and nvcc, build for any architecture. A row is one kernel for one
architecture, precision and D, specialised as by its launcher. Columns: registers of a thread, bytes of its
stack, local stores and loads (spilled registers), shared memory and its limit, columns of tensor memory, instructions
of the tensor cores, loads, special-function instructions, warps that are resident on a multiprocessor, and the units of
a loss by its form, forward and backward. A unit is a product of D elements for every visited pair. Kernels of k-means
have no units, and one D: they are the same for every D from 64 on.

Rows "cuda: ..." are all kernels in csrc/cuda, each for every D; columns of Triton's launchers are empty. Their tensor
core instructions are those of nvcuda::wmma, which sm_90 and sm_100 have in addition to their fast path.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_kernels import (
    INF_CL,
    KMEANS,
    MEMEFF,
    OWN,
    Launch,
    Units,
    kmeans_kernel,
    own_kernel,
    own_units,
    peer_kernel,
    peer_units,
)
from benchmarks.measure import Row, read_rows, write_rows
from mcl_kernels.backends import cuda

HERE = Path(__file__).parent
ARCHITECTURES = (80, 90, 100)
PRECISIONS = ("bf16", "tf32", "tf32x3")
WIDTHS = (64, 128, 256, 512, 768, 1024)
KMEANS_WIDTH = 512
CUDA = "cuda"  # all kernels of csrc/cuda
CUDA_ARCHITECTURES = (75, *ARCHITECTURES)
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
COLUMNS = (
    "library", "kernel", "architecture", "precision", "d", "rows", "columns", "features", "gradients", "chunk", "warps",
    "stages", "units_self", "units_one_direction", "units_both_directions", "pairs", "registers", "stack", "spills",
    "shared", "shared_limit", "tensor_memory", "tensor_core", "loads", "special_function", "resident_warps",
    "compiler",
)  # fmt: skip


Position = tuple[int, ...]  # of an argument, or of a field of a tuple


class Code(NamedTuple):
    """Resources of a compiled kernel, and its instructions."""

    registers: int
    stack: int
    shared: int  # bytes of static shared memory
    listing: str

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.listing))


def compile_kernel(kernel: str, architecture: int, precision: str, width: int) -> Row | None:
    """Row of a kernel; None if it does not exist for this precision."""
    make = kmeans_kernel if kernel in KMEANS else own_kernel if kernel in OWN else peer_kernel
    launch = make(kernel, architecture, precision, width)
    if launch is None:
        return None
    if kernel in KMEANS:
        units = Units(None, None, None, "")
    else:
        own = kernel in OWN
        units = own_units(architecture, precision, width) if own else peer_units(kernel, architecture, width)
    return {
        "library": launch.library, "kernel": kernel, "architecture": f"sm_{architecture}", "precision": precision,
        "d": width, **launch.tiles, "warps": launch.warps, "stages": launch.stages,
        "units_self": units.self_form, "units_one_direction": units.one_direction,
        "units_both_directions": units.both_directions, "pairs": units.pairs, **_compile(launch, architecture),
    }  # fmt: skip


def _compile(launch: Launch, architecture: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.function.arg_names):
        if name in launch.constants:
            signature[name], constants[index,] = "constexpr", launch.constants[name]
        else:
            given = launch.arguments[name]
            signature[name] = _argument_types(given, (index,), name in launch.undivided, constants, attributes)
    source = ASTSource(fn=launch.function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = _disassemble(file.name).values()
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return {
        **_resources(code, architecture, launch.warps, compiled.metadata.shared, tensor_memory),
        "shared_limit": SHARED_LIMIT[architecture], "tensor_core": code.count(TENSOR_CORES[architecture]),
        "compiler": f"triton {triton.__version__}",
    }  # fmt: skip


def _argument_types(
    argument: Any, position: Position, undivided: bool, constants: dict[Position, Any], attributes: dict[Position, Any]
) -> Any:
    """Returns the type of an argument, for a tuple those of its fields; records constants and divisibility by 16."""
    if isinstance(argument, tuple):
        fields = enumerate(argument)
        types = (_argument_types(field, (*position, i), undivided, constants, attributes) for i, field in fields)
        return type(argument)(*types)
    if not isinstance(argument, str):
        constants[position] = argument
        return "constexpr"
    if argument.startswith("*") or (argument == "i32" and not undivided):
        attributes[position] = [["tt.divisibility", 16]]
    return argument


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
        codes = _disassemble(cubin)
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
            "library": f"mcl_kernels {version('mcl_kernels')}", "kernel": f"{CUDA}: {name}",
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


def _disassemble(cubin: str) -> dict[str, Code]:
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
        "special_function": code.count(r"\bMUFU"), "resident_warps": blocks * warps,
    }  # fmt: skip


def compile_triton(kernels: tuple[str, ...] = OWN, every_width_of: tuple[str, ...] | None = None) -> list[Row]:
    """Rows of these kernels, compiled in parallel; kernels outside of `every_width_of`, if given, for two widths only.

    Triton's interpreter may be on in this process. It is off in the processes that compile.
    """
    cases = [
        (kernel, architecture, precision, width)
        for kernel, architecture, precision, width in product(kernels, ARCHITECTURES, PRECISIONS, WIDTHS)
        if (width == KMEANS_WIDTH if kernel in KMEANS else _is_wanted(kernel, width, every_width_of))
    ]
    context = multiprocessing.get_context("spawn")
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            rows = pool.map(compile_kernel, *zip(*cases, strict=True))
            return [row for row in rows if row is not None]
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


def _is_wanted(kernel: str, width: int, every_width_of: tuple[str, ...] | None) -> bool:
    return every_width_of is None or kernel in every_width_of or width in (128, 1024)


def save(path: Path, kernels: tuple[str, ...], rows: list[Row]) -> None:
    """Replaces the rows of these kernels, in the order of all kernels."""
    order = (*OWN, *KMEANS, CUDA, *INF_CL, *MEMEFF)

    def name_of(row: Row) -> str:
        return CUDA if row["kernel"].startswith(f"{CUDA}: ") else row["kernel"]

    kept = [row for row in read_rows(path) if name_of(row) in set(order) - set(kernels)]
    write_rows(path, COLUMNS, sorted(kept + rows, key=lambda row: order.index(name_of(row))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=HERE / "gpu_static.csv")
    parser.add_argument(
        "kernels", nargs="*", metavar="KERNEL", help="prefix of the kernels to compile; other rows stay"
    )
    options = parser.parse_args()
    kernels = (*OWN, *KMEANS)
    if cuda.find_nvcc():
        kernels += (CUDA,)
    else:
        print("no rows of csrc/cuda: no nvcc is on the PATH")
    for package, peer_kernels in (("inf_cl", INF_CL), ("memeff", MEMEFF)):
        if importlib.util.find_spec(package):
            kernels += peer_kernels
        else:
            print(f"no rows of {package}, which is installed with the bench extra")
    if options.kernels:
        kernels = tuple(name for name in kernels if name.startswith(tuple(options.kernels)))
    rows = compile_triton(tuple(name for name in kernels if name != CUDA))
    rows += compile_cuda() if CUDA in kernels else []
    for row in rows:
        print(
            f"{row['kernel']:<43} {row['architecture']:<6} {row['precision']:<6} D {row['d'] or 'any':>4}"
            f"  {row['registers']:>3} registers  {row['stack']:>4} B stack  {row['spills']:>3} spills"
            f"  {row['shared']:>6} B shared  {row['tensor_core']:>3} tensor core  {row['resident_warps']:>2} warps"
        )
    save(options.csv, kernels, rows)


if __name__ == "__main__":
    main()
