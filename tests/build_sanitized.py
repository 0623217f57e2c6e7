"""Builds tests/sanitized_kernels.cpp with the flags of the library: `-m tests.build_sanitized SANITIZERS OUTPUT`."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc" / "cpu"


def load_native() -> ModuleType:
    """`mcl_kernels._native` without the package, which would import torch."""
    specification = importlib.util.spec_from_file_location("_native", ROOT / "mcl_kernels" / "_native.py")
    native = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(native)
    return native


def main(sanitizers: str, output: str) -> None:
    native = load_native()
    compiler = native.find_compiler()
    flags = [*native.FLAGS, "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"]
    sources = [path for path in KERNELS.glob("*.cpp") if path.name != "operators.cpp"]
    if platform.machine() not in ("x86_64", "AMD64"):
        sources = [path for path in sources if path.name not in native.INSTRUCTION_SETS]
    sources.append(ROOT / "tests" / "sanitized_kernels.cpp")
    with tempfile.TemporaryDirectory() as directory:

        def compile_source(source: Path) -> str:
            target = f"{directory}/{source.name}.o"
            special = native.INSTRUCTION_SETS.get(source.name, [])
            subprocess.run([compiler, *flags, *special, f"-I{KERNELS}", "-c", str(source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_source, sources))
        subprocess.run([compiler, *flags, *objects, "-o", output], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
