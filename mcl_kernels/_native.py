"""Finds the compiled CPU kernels, or builds them once and explains when it cannot.

`csrc/cpu` is compiled against the torch that runs it. The library lies in the package where the installation built
it, else in the user's cache, under a name made of torch's version, the compiler's flags and the content of the
sources: another torch or another source is another file, and a file that is there is complete.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
# One source is compiled per instruction set; which of them runs is chosen at run time.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
INSTRUCTION_SETS = {
    "kernels_amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "kernels_avx512.cpp": AVX512,
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
}


class NativeUnavailableError(RuntimeError):
    """The native kernels cannot be had here, for the reason that the message gives."""


def source_directory() -> Path:
    """`csrc/cpu`, in the package (installed) or beside it (a checkout)."""
    for directory in (PACKAGE / "csrc" / "cpu", PACKAGE.parent / "csrc" / "cpu"):
        if (directory / "operators.cpp").exists():
            return directory
    raise NativeUnavailableError("the sources of the native kernels, csrc/cpu, are missing from this installation")


def library_name(sources: Path) -> str:
    """The file name of the library that these sources and this torch make."""
    import torch

    digest = hashlib.sha256(repr((torch.__version__, platform.machine(), FLAGS, INSTRUCTION_SETS)).encode())
    for path in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"mcl_kernels_native-{digest.hexdigest()[:16]}.so"


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first known one on the PATH."""
    for name in (os.environ.get("CXX"), *COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise NativeUnavailableError(
        "no C++ compiler is on the PATH; install one (apt install g++, dnf install gcc-c++, conda install gxx)"
    )


def build(sources: Path, library: Path) -> None:
    """Compiles the sources into `library`, which appears when it is complete.

    Raises:
        NativeUnavailableError: there is no compiler, or it failed; the message holds its first error.
    """
    import torch

    torch_directory = Path(torch.__file__).parent
    includes = [f"-isystem{torch_directory / 'include' / part}" for part in (".", "torch/csrc/api/include")]
    # The OpenMP calls resolve to the runtime that torch has loaded: linking another would mean two pools of threads.
    openmp = ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    libraries = [f"-L{torch_directory / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    # The one source that includes torch takes longest, so it comes first.
    compile_and_link(
        {sources / "operators.cpp": [*includes, *openmp], **kernel_sources(sources)},
        [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"],
        ["-shared", *libraries, *undefined],
        library,
    )


def kernel_sources(sources: Path) -> dict[Path, list[str]]:
    """The sources without torch that this machine compiles, each with the flags of its instruction set."""
    intel = platform.machine() in ("x86_64", "AMD64")
    names = [path.name for path in sorted(sources.glob("*.cpp")) if path.name != "operators.cpp"]
    return {sources / name: INSTRUCTION_SETS.get(name, []) for name in names if intel or name not in INSTRUCTION_SETS}


def compile_and_link(sources: dict[Path, list[str]], flags: list[str], link: list[str], output: Path) -> None:
    """Compiles each source with its own flags and all of `flags`, side by side, and links them with those of `link`.

    Raises:
        NativeUnavailableError: as `build`.
    """
    compiler = find_compiler()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as directory:
        objects = {source: f"{directory}/{source.name}.o" for source in sources}

        def compile_source(source: Path) -> None:
            _run(compiler, *flags, *sources[source], "-c", str(source), "-o", objects[source])

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(compile_source, sources))
        linked = Path(directory) / output.name
        _run(compiler, *flags, *objects.values(), *link, "-o", str(linked))
        linked.replace(output)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise NativeUnavailableError(
            f"{command[0]} failed: {errors[0] if errors else f'exit code {result.returncode}'}"
        )


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mcl_kernels"


@contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remembered_failure(library: Path, compiler: str) -> str | None:
    """Why this compiler failed before: no process has to wait for it again."""
    path = library.with_suffix(".failed")
    if not path.exists():
        return None
    failed, reason = path.read_text().split("\n", 1)
    return f"{reason} (delete {path} to try again)" if failed == compiler else None


def _places() -> tuple[Path, Path]:
    """Where the library for this torch lies: in the package, or in the cache, into which it is built."""
    name = library_name(source_directory())
    return PACKAGE / "lib" / name, cache_directory() / name


def _find_or_build() -> Path:
    installed, library = _places()
    for place in (installed, library):
        if place.exists():
            return place
    if sys.platform == "win32":
        raise NativeUnavailableError("the native kernels are built with GCC or Clang, not on Windows")
    compiler = find_compiler()
    if reason := _remembered_failure(library, compiler):
        raise NativeUnavailableError(reason)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _only_process(library.with_suffix(".lock")):
            if not library.exists():  # else another process was first
                import torch

                print(
                    f"mcl_kernels: building the native CPU kernels for torch {torch.__version__}, "
                    f"once, less than a minute, into {library.parent}",
                    file=sys.stderr,
                    flush=True,
                )
                started = time.monotonic()
                try:
                    build(source_directory(), library)
                except NativeUnavailableError as error:
                    library.with_suffix(".failed").write_text(f"{compiler}\n{error}")
                    raise
                print(f"mcl_kernels: built in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    except OSError as error:
        raise NativeUnavailableError(f"{library.parent} cannot be written ({error}); set XDG_CACHE_HOME") from error
    return library


@cache
def _loaded() -> str | None:
    """Loads the library once a process; what kept it from being loaded, or None."""
    import torch

    try:
        torch.ops.load_library(str(_find_or_build()))  # type: ignore[no-untyped-call]
    except NativeUnavailableError as error:
        return str(error)
    except OSError as error:
        return f"the built library does not load: {error}"
    return None


def load() -> None:
    """Loads the kernels into `torch.ops.mcl_kernels_native`, after building them where that is still to be done.

    Raises:
        NativeUnavailableError: with the reason.
    """
    if reason := _loaded():
        raise NativeUnavailableError(reason)


@cache
def usable() -> bool:
    """Whether the kernels load here; if they do not, warns once, in one line, what to do about it."""
    if reason := _loaded():
        warnings.warn(f"mcl_kernels: PyTorch operations compute, several times slower: {reason}", RuntimeWarning, 3)
        return False
    return True


def describe() -> tuple[bool, str]:
    """Whether the kernels are or can be built here, and how that stands; builds nothing."""
    try:
        installed, library = _places()
        if installed.exists() or library.exists():
            return True, "C++ kernels by tiles in sorted order (csrc/cpu), built for this torch"
        compiler = find_compiler()
        if reason := _remembered_failure(library, compiler):
            return False, reason
        return True, f"C++ kernels by tiles in sorted order (csrc/cpu), to be built on first use by {compiler}"
    except NativeUnavailableError as error:
        return False, str(error)
