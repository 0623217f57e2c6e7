"""The CUDA kernels on the processor: `csrc/cuda` compiled by g++ with `cuda_on_cpu` in the place of the toolkit.

The same operators as those of the real library, on CPU tensors: the common tests run on them.
"""

from __future__ import annotations

import hashlib
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mcl_kernels.backends import cuda, native_build, native_cache

NAMESPACE = "mcl_kernels_cuda_emulated"
HEADERS = Path(__file__).with_name("cuda_on_cpu")
# Fused multiply-adds as nvcc makes them; arrays of one type are read as vectors.
FLAGS = ["-std=gnu++20", "-O2", "-g0", "-fPIC", "-march=native", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]


def why_not() -> str | None:
    """What is missing to compile them; None: nothing."""
    return None if shutil.which("g++") else "no g++ is on the PATH: it compiles the CUDA kernels for the processor"


def compile_kernels(output: Path, flags: list[str], more: dict[Path, list[str]], link: list[str]) -> None:
    """The kernels' sources and `more`, each of those with flags of its own, into a program or a library."""
    sources = cuda.source_directory()
    every = {path: ["-x", "c++"] for path in sorted(sources.glob("*.cu"))} | more
    native_build.compile_and_link(every, [*flags, f"-I{HEADERS}", f"-I{sources}"], link, output)


@cache
def ops() -> Any:
    """Builds the library where that is still to be done, and loads it."""
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
