"""Builds tests/sanitized_kernels.cpp with the library's own flags: `python -m tests.build_sanitized SANITIZERS OUTPUT`."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Without the package, which would import torch.
specification = importlib.util.spec_from_file_location("_native", ROOT / "mcl_kernels" / "_native.py")
native = importlib.util.module_from_spec(specification)
specification.loader.exec_module(native)

sanitizers, output = sys.argv[1:]
compiler = native.find_compiler()
flags = [*native.FLAGS, "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"]
sources = [path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if path.name != "operators.cpp"]
if platform.machine() not in ("x86_64", "AMD64"):
    sources = [path for path in sources if path.name not in native.INSTRUCTION_SETS]
sources.append(ROOT / "tests" / "sanitized_kernels.cpp")

with tempfile.TemporaryDirectory() as directory:

    def compile_source(source: Path) -> str:
        target = f"{directory}/{source.name}.o"
        special = native.INSTRUCTION_SETS.get(source.name, [f"-I{ROOT / 'csrc' / 'cpu'}"])
        subprocess.run([compiler, *flags, *special, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_source, sources))
    subprocess.run([compiler, *flags, *objects, "-o", output], check=True)
