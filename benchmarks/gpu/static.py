"""Counts of the compiled GPU kernels, ours and the peers': `python -m benchmarks.gpu.static` writes static.csv.

No GPU is needed: Triton's compiler and disassembler, and nvcc, build for any architecture. A row is one kernel for one
architecture, precision and D, specialised as by its launcher. Columns, by what they are of:

- a loss: units by its form, forward and backward; a unit is a product of D elements for every visited pair;
- a kernel: registers of a thread, bytes of its stack, local stores and loads (spilled registers), shared memory and its
  limit, columns of tensor memory; instructions of the tensor cores, loads, special-function instructions; the CTAs
  that fit a multiprocessor;
- its inner loop, for each pair of rows that it compares (see loop.py): the number of such loops; issue slots where no
  mask is needed, where one is, and on the dearest path of all loops; special-function operations; 1/16 clocks of the
  tensor cores; bytes of features from L2; loads of a tile that the warp waits for.

Kernels of k-means have no units and one D: they are the same for every D from 64 on. Rows "cuda: ..." are all kernels
in csrc/cuda, each for every D; columns of Triton's launchers are empty. Their tensor core instructions are those of
nvcuda::wmma, which sm_90 and sm_100 have in addition to their fast path.

The most frequent kernels have a row for every D, the others for two. Triton 3.6, that of torch 2.11, compiles the most
frequent ones for sm_90, next to the rows of the newest.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

from benchmarks.gpu.compiled import CUDA, compile_cuda, compile_launch, launch_row
from benchmarks.gpu.kernels import KMEANS, Launch, Units, kmeans_kernel
from benchmarks.gpu.own import OWN, UNALIGNED, own_kernel, own_units
from benchmarks.gpu.peers import INF_CL, MEMEFF, peer_kernel, peer_units
from benchmarks.measure import Row, read_rows, write_rows
from mcl_kernels.backends import cuda
from mcl_kernels.backends.triton import triton_version

HERE = Path(__file__).parent
ARCHITECTURES = (80, 90, 100)
PRECISIONS = ("bf16", "tf32", "fp32")
WIDTHS = (64, 128, 200, 256, 512, 768, 1024)
SOME_WIDTHS = (128, 1024)
PEER_WIDTHS = (64, 128, 256, 512, 768, 1024)
KMEANS_WIDTH = 512
EVERY_WIDTH = ("forward", "backward")
OLDER = (3, 6)  # version of Triton whose rows stand next to those of the newest
OLDER_PRECISIONS = ("bf16", "fp32")
COLUMNS = (
    "library", "kernel", "architecture", "precision", "d", "rows", "columns", "features", "gradients", "chunk", "warps",
    "stages", "units_self", "units_one_direction", "units_both_directions", "pairs", "registers", "stack", "spills",
    "shared", "shared_limit", "tensor_memory", "tensor_core", "loads", "special_function", "ctas", "loops", "slots",
    "slots_masked", "slots_dearest", "mufu", "tensor", "l2_bytes", "synchronous_loads", "compiler",
)  # fmt: skip


def find_launch(kernel: str, architecture: int, precision: str, width: int) -> Launch | None:
    """Returns None for a kernel that does not exist in this precision."""
    find = kmeans_kernel if kernel in KMEANS else own_kernel if kernel in OWN else peer_kernel
    return find(kernel, architecture, precision, width)


def compile_kernel(kernel: str, architecture: int, precision: str, width: int) -> Row | None:
    """Row of a kernel; None if it does not exist in this precision."""
    launch = find_launch(kernel, architecture, precision, width)
    if launch is None:
        return None
    if kernel in KMEANS:
        units = Units(None, None, None, "")
    else:
        units = own_units(launch, width) if kernel in OWN else peer_units(kernel, architecture, width)
    return {
        "library": launch.library, "kernel": kernel, "architecture": f"sm_{architecture}", "precision": precision,
        "d": width, **launch.tiles, "warps": launch.warps, "stages": launch.stages,
        "units_self": units.self_form, "units_one_direction": units.one_direction,
        "units_both_directions": units.both_directions, "pairs": units.pairs, **launch_row(launch, architecture),
    }  # fmt: skip


def compile_triton(kernels: tuple[str, ...] = OWN) -> list[Row]:
    """Rows of these kernels, compiled in parallel.

    Triton's interpreter may be on in this process. It is off in the processes that compile.
    """
    older = triton_version() == OLDER
    cases = product(kernels, (90,) if older else ARCHITECTURES, OLDER_PRECISIONS if older else PRECISIONS)
    cases = [(*case, width) for case in cases for width in _widths(case[0])]
    context = multiprocessing.get_context("spawn")
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            rows = pool.map(compile_kernel, *zip(*cases, strict=True))
            return [row for row in rows if row is not None]
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


def _widths(kernel: str) -> tuple[int, ...]:
    if kernel in KMEANS:
        return (KMEANS_WIDTH,)
    if kernel in OWN:
        return WIDTHS if kernel in EVERY_WIDTH else SOME_WIDTHS
    return PEER_WIDTHS


def save(path: Path, kernels: tuple[str, ...], rows: list[Row]) -> None:
    """Replaces the rows of these kernels, in the order of all kernels; those of the older compiler apart."""
    order = (*OWN, *KMEANS, CUDA, *INF_CL, *MEMEFF)

    def part(row: Row) -> tuple[bool, str]:
        older = row.get("compiler", "").startswith("triton {}.{}.".format(*OLDER))
        return older, CUDA if row["kernel"].startswith(f"{CUDA}: ") else row["kernel"]

    replaced = {(older, kernel) for older in {part(row)[0] for row in rows} for kernel in kernels}
    kept = [row for row in read_rows(path) if part(row) not in replaced and part(row)[1] in order]
    write_rows(path, COLUMNS, sorted(kept + rows, key=lambda row: (part(row)[0], order.index(part(row)[1]))))


def show(kernel: str, architecture: int, precision: str, width: int) -> None:
    """Prints what each inner loop of a kernel issues for a pair, on its cheapest and on its dearest path."""
    launch = find_launch(kernel, architecture, precision, width)
    if launch is None:
        raise SystemExit(f"{kernel} does not exist in {precision}")
    pairs = launch.tiles["rows"] * launch.tiles["columns"]
    for cost in compile_launch(launch, architecture).costs:
        print(f"{cost.slots:.4g} slots, {cost.slots_masked:.4g} masked; {launch.tiles}, {launch.warps} warps")
        paths = [Counter[str](), Counter[str]()]
        for path, opcodes in zip(paths, (cost.least, cost.most), strict=True):
            for opcode, count in opcodes.items():
                path[opcode.split(".")[0]] += count
        for name, _ in paths[1].most_common():
            print(f"{name:>20}" + "".join(f"{32 * launch.warps * path[name] / pairs:>9.2f}" for path in paths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=HERE / "static.csv")
    parser.add_argument(
        "--show", nargs=4, metavar=("KERNEL", "ARCHITECTURE", "PRECISION", "D"),
        help="print the instructions of a kernel's inner loops, as: forward 90 bf16 128",
    )  # fmt: skip
    parser.add_argument(
        "kernels", nargs="*", metavar="KERNEL", help="prefix of the kernels to compile; other rows stay"
    )
    options = parser.parse_args()
    if options.show:
        kernel, architecture, precision, width = options.show
        show(kernel, int(architecture), precision, int(width))
        return
    kernels = _available()
    if options.kernels:
        kernels = tuple(name for name in kernels if name.startswith(tuple(options.kernels)))
    rows = compile_triton(tuple(name for name in kernels if name != CUDA))
    rows += compile_cuda() if CUDA in kernels else []
    for row in rows:
        print(
            f"{row['kernel']:<43} {row['architecture']:<6} {row['precision']:<6} D {row['d'] or 'any':>4}"
            f"  {row['registers']:>3} registers  {row['stack']:>4} B stack  {row['shared']:>6} B shared"
            f"  {row['ctas']} CTAs"
            + (f"  {row['slots']:.4g} slots, {row['slots_masked']:.4g} masked" if "slots" in row else "")
        )
    save(options.csv, kernels, rows)


def _available() -> tuple[str, ...]:
    """Kernels that can be compiled here."""
    if triton_version() == OLDER:
        return (*EVERY_WIDTH, *UNALIGNED)
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
    return kernels


if __name__ == "__main__":
    main()
