"""Runs the CUDA kernels on the CPU: compiles `csrc/cuda` by g++, with the headers of `cuda_on_cpu` as the toolkit.

Its operators are those of the real library, on CPU tensors, so that the common tests run on them.
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
# Products and sums are fused, as nvcc does; arrays of scalars are read as vectors.
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
    compiled_reason, operators = cuda.unavailable_reason, Operators(cuda.ops)

    def reason(device: torch.device) -> str | None:
        return None if device.type == "cpu" else compiled_reason(device)

    cuda.ops = lambda: operators
    cuda.unavailable_reason = reason
    table.TABLE["cuda"] = table.TABLE["cuda"]._replace(unavailable_reason=reason)


def compile_kernels(output: Path, flags: list[str], more: dict[Path, list[str]], link: list[str]) -> None:
    """Compiles the kernels and the sources `more`, each with its own flags, into a program or a library."""
    sources = cuda.source_directory()
    kernels = {path: ["-x", "c++"] for path in sorted(sources.glob("*.cu"))}
    native_build.compile_and_link(kernels | more, [*flags, f"-I{HEADERS}", f"-I{sources}"], link, output)


@cache
def emulated_ops() -> Any:
    """Operators of the emulation. Builds the library unless it is cached."""
    with native_cache.opened(native_cache.cache_directory()) as cache, cache.only_builder():
        library = cache.path / f"{NAMESPACE}-{_digest()}.so"
        if not library.exists():
            _build(library)
    torch.ops.load_library(str(library))
    return getattr(torch.ops, NAMESPACE)


def _digest() -> str:
    digest = hashlib.sha256(repr((torch.__version__, FLAGS)).encode())
    for directory in (cuda.source_directory(), HEADERS):
        files = [*directory.parent.glob("*.h"), *(path for path in directory.rglob("*") if path.is_file())]
        for path in sorted(files):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(library: Path) -> None:
    directory = Path(torch.__file__).parent
    binding = [f"-isystem{directory / 'include' / part}" for part in (".", "torch/csrc/api/include")]
    binding += [f"-DMCL_NAMESPACE={NAMESPACE}", "-DMCL_ARCHITECTURES=emulated"]
    flags = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    libraries = [f"-L{directory / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    operators = dict.fromkeys(sorted(cuda.source_directory().glob("*.cpp")), binding)
    compile_kernels(library, flags, operators, ["-shared", *libraries])
