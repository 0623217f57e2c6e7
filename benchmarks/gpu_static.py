"""What the compiler makes of the Triton kernels for every row of their table: `python -m benchmarks.gpu_static`.

Needs no GPU: Triton's own compiler and disassembler build for any architecture. A row of gpu_static.csv is one kernel
for one architecture, precision and D, specialised as the launcher does it (contiguous rows, D divisible by 16):
registers of a thread, bytes of its stack, local stores and loads (what does not fit the registers), shared memory,
instructions of the tensor cores by name, special-function instructions, warps that fit a multiprocessor at a time, and
the units of products of the whole loss (DESIGN: kept pairs x D, forward and backward of the self form).
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mcl_kernels.logsumexp.triton import Tiles, choose_tiles, tile_constants

HERE = Path(__file__).parent
ARCHITECTURES = (80, 90, 100)
PRECISIONS = ("bf16", "tf32", "tf32x3")
WIDTHS = (64, 128, 256, 512, 768, 1024)
KERNELS = ("forward", "backward")
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that a program may have
SHARED_OF_PROCESSOR = {80: 167_936, 90: 233_472, 100: 233_472}
REGISTERS_OF_PROCESSOR, WARPS_OF_PROCESSOR = 65_536, 64
TENSOR_CORES = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\bUTC\w*MMA"}  # the fast path of each

Row = dict[str, Any]


def compile_kernel(kernel: str, architecture: int, precision: str, width: int) -> Row:
    """One row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tiles = _tiles(kernel, precision, width, architecture)
    function, constants = _function(kernel), _constants(kernel, precision, width, tiles)
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _type(name, precision)
        if signature[name].startswith("*") or name in ("x_stride", "y_stride", "width"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    positions = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=positions, attrs=attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return {
        "kernel": kernel, "architecture": f"sm_{architecture}", "precision": precision, "d": width,
        **tiles._asdict(), "units": units(precision, width, architecture), **_resources(compiled, architecture, tiles),
        "triton": triton.__version__,
    }  # fmt: skip


def _tiles(kernel: str, precision: str, width: int, architecture: int) -> Tiles:
    return choose_tiles(kernel, _of_launcher(precision), width, (architecture // 10, 0))


def units(precision: str, width: int, architecture: int) -> int:
    """Products of the self form's loss: forward 1; backward 1 for the logits of each part of the features, and 1."""
    return 2 + -(-width // _tiles("backward", precision, width, architecture).gradients)


def _function(kernel: str) -> Any:
    from mcl_kernels.logsumexp.triton_backward import backward_kernel
    from mcl_kernels.logsumexp.triton_forward import forward_kernel

    return {"forward": forward_kernel, "backward": backward_kernel}[kernel]


def _constants(kernel: str, precision: str, width: int, tiles: Tiles) -> Row:
    """As the launcher gives them for the self form of contiguous rows with ids and one scale."""
    tile = tile_constants(kernel, _of_launcher(precision), torch.bfloat16, width, tiles)
    same = {"HAS_DROPPED": True, "COMPARES_IDS": False, "SKIPS_TILES": False}  # cluster
    common = {**tile, **same, "x_step": 1, "y_step": 1, "scale_stride": 0}
    if kernel == "forward":
        return {**common, "COUNT": False}
    return {
        **common, "ROW_TERM": True, "COLUMN_TERM": True, "ROW_SCALE_TERM": False, "COLUMN_SCALE_TERM": False,
        "SCALE_OF_COLUMNS": False, "NEEDS_X": True,
    }  # fmt: skip


def _of_launcher(precision: str) -> str:
    return "half" if precision == "bf16" else precision


def _type(name: str, precision: str) -> str:
    if name in ("x", "y", "grad_x"):
        return "*bf16" if precision == "bf16" else "*fp32"
    if name in ("drop_begin", "drop_end"):
        return "*i32"
    if name in ("row_order", "row_begin", "row_end", "row_ids", "column_order", "column_ids"):
        return "*i64"
    return "i32" if name in ("x_stride", "y_stride", "n", "width") else "*fp32"


def _resources(compiled: Any, architecture: int, tiles: Tiles) -> Row:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))
    shared = compiled.metadata.shared
    fit = min(
        REGISTERS_OF_PROCESSOR // (registers * 32 * tiles.warps),
        SHARED_OF_PROCESSOR[architecture] // (shared + 1024),
        WARPS_OF_PROCESSOR // tiles.warps,
    )
    return {
        "registers": registers, "stack": stack, "spills": len(re.findall(r"\b(?:STL|LDL)", code)),
        "shared": shared, "shared_limit": SHARED_LIMIT[architecture],
        "tensor_core": len(re.findall(TENSOR_CORES[architecture], code)),
        "special_function": len(re.findall(r"\bMUFU", code)), "warps": fit * tiles.warps,
    }  # fmt: skip


def compile_all() -> list[Row]:
    """Every row of the table, compiled side by side. In ours the interpreter may be on: not in these processes."""
    cases = list(product(KERNELS, ARCHITECTURES, PRECISIONS, WIDTHS))
    context = multiprocessing.get_context("spawn")
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            return list(pool.map(compile_kernel, *zip(*cases, strict=True)))
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=HERE / "gpu_static.csv")
    options = parser.parse_args()
    rows = compile_all()
    for row in rows:
        print(
            f"{row['kernel']:<8} {row['architecture']:<6} {row['precision']:<6} D {row['d']:>4}  {row['units']} units"
            f"  {row['registers']:>3} registers  {row['stack']:>3} B stack  {row['spills']:>2} spills"
            f"  {row['shared']:>6} B shared  {row['tensor_core']:>3} tensor core  {row['warps']:>2} warps"
        )
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
