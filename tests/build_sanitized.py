"""Builds tests/sanitized_kernels.cpp with the flags of the library: `-m tests.build_sanitized SANITIZERS OUTPUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from mcl_kernels import _native


def main(sanitizers: str, output: str) -> None:
    kernels = _native.source_directory()
    sources = _native.kernel_sources(kernels)
    sources[Path(__file__).with_name("sanitized_kernels.cpp")] = [f"-I{kernels}"]
    flags = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"]
    _native.compile_and_link(sources, [*_native.FLAGS, *flags], [], Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
