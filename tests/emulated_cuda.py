"""The CUDA kernels on the CPU: `csrc/cuda` compiled by g++ with `cuda_on_cpu` in the place of the toolkit.

The same operators as those of the real library, on CPU tensors: the common tests run on them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mcl_kernels.backends import cuda, native_build, native_cache, table

NAMESPACE = "mcl_kernels_cuda_emulated"
HEADERS = Path(__file__).with_name("cuda_on_cpu")
# Fused multiply-adds as nvcc makes them; arrays of one type are read as vectors.
FLAGS = ["-std=gnu++20", "-O2", "-g0", "-fPIC", "-march=native", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]


def unavailable_reason() -> str | None:
    """Returns why the kernels cannot be compiled here, or None."""
    return None if shutil.which("g++") else "no g++ is on the PATH: it compiles the CUDA kernels for the CPU"


class Operators:
    """Operators that run the emulation for CPU tensors, and the compiled library for others."""

    def __init__(self, compiled: Callable[[], Any]) -> None:
        self.compiled = compiled

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            tensors = (x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor))
            library = emulated_ops() if next(tensors).device.type == "cpu" else self.compiled()
            return getattr(library, name)(*arguments)

        return call


def install() -> None:
    """Lets the backend "cuda" compute CPU tensors in this process, by the emulation."""
    reason_of_compiled, operators = cuda.unavailable_reason, Operators(cuda.ops)

    def reason(device: torch.device) -> str | None:
        return None if device.type == "cpu" else reason_of_compiled(device)

    cuda.ops = lambda: operators
    cuda.unavailable_reason = reason
    table.TABLE["cuda"] = table.TABLE["cuda"]._replace(unavailable_reason=reason)


def compile_kernels(output: Path, flags: list[str], more: dict[Path, list[str]], link: list[str]) -> None:
    """The kernels' sources and `more`, each of those with flags of its own, into a program or a library."""
    sources = cuda.source_directory()
    every = {path: ["-x", "c++"] for path in sorted(sources.glob("*.cu"))} | more
    native_build.compile_and_link(every, [*flags, f"-I{HEADERS}", f"-I{sources}"], link, output)


@cache
def emulated_ops() -> Any:
    """Operators of the emulation, which is built first where that is still to be done."""
    with native_cache.opened(native_cache.cache_directory()) as cache, cache.only_builder():
        library = cache.path / f"{NAMESPACE}-{_digest()}.so"
        if not library.exists():
            _build(library)
    torch.ops.load_library(str(library))
    return getattr(torch.ops, NAMESPACE)


def _digest() -> str:
    digest = hashlib.sha256(repr((torch.__version__, FLAGS)).encode())
    for directory in (cuda.source_directory(), HEADERS):
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(library: Path) -> None:
    directory = Path(torch.__file__).parent
    binding = [f"-isystem{directory / 'include' / part}" for part in (".", "torch/csrc/api/include")]
    binding += [f"-DMCL_NAMESPACE={NAMESPACE}", "-DMCL_ARCHITECTURES=emulated"]
    flags = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    libraries = [f"-L{directory / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    compile_kernels(library, flags, {cuda.source_directory() / "operators.cpp": binding}, ["-shared", *libraries])
