"""Builds a sanitized program: `-m tests.build_sanitized SANITIZERS OUTPUT`, or `cuda OUTPUT` for the CUDA kernels."""

from __future__ import annotations

import sys
from pathlib import Path

from mcl_kernels.backends import native_build
from tests import emulated_cuda


def main(sanitizers: str, output: str) -> None:
    if sanitizers == "cuda":
        build_cuda(output)
    else:
        build_native(sanitizers, output)


def build_native(sanitizers: str, output: str) -> None:
    """Builds tests/sanitized_kernels.cpp with the flags of the library."""
    kernels = native_build.source_directory()
    sources = native_build.kernel_sources(kernels)
    sources[Path(__file__).with_name("sanitized_kernels.cpp")] = [f"-I{kernels}"]
    flags = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"]
    native_build.compile_and_link(sources, [*native_build.FLAGS, *flags], [], Path(output))


def build_cuda(output: str) -> None:
    """Builds tests/sanitized_cuda.cpp with ThreadSanitizer: the threads of a block are system threads."""
    build_cuda_program(output, ["-O1", "-g", "-fsanitize=thread", "-pthread", "-DCUDA_ON_CPU_THREADS"])


def build_cuda_program(output: str, flags: list[str]) -> None:
    program = Path(__file__).with_name("sanitized_cuda.cpp")
    emulated_cuda.compile_kernels(Path(output), [*emulated_cuda.FLAGS, *flags], {program: []}, [])


if __name__ == "__main__":
    main(*sys.argv[1:])
