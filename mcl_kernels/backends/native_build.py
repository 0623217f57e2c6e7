"""Compiles `csrc/cpu` against the torch that runs it.

setup.py imports this module without the rest of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from mcl_kernels.backends import library

PACKAGE = Path(__file__).parents[1]
COMPILERS = ("g++", "c++", "clang++") if sys.platform == "linux" else ("c++", "clang++", "g++")
FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
# One source is compiled per instruction set; which of them runs is chosen at run time.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
INSTRUCTION_SETS = {
    "kernels_amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "kernels_avx512.cpp": AVX512,
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
}
INSTALL = "install one (apt install g++, dnf install gcc-c++, conda install gxx)"
# Errors in a line of a source or in an option: the same compiler reports them again.
LASTING = re.compile(
    r":\d+: (fatal )?error: |undefined reference|cannot find -l"
    r"|error: .*(unrecognized|unknown|unsupported|bad value|invalid (value|argument))",
    re.I,
)
# Errors that may be gone at the next try, such as a full disk. They may name a line of a source, too.
PASSING = re.compile(
    r"no space left|quota exceeded|input/output error|cannot allocate|out of memory|memory exhausted"
    r"|too many open files|temporarily unavailable|read-only file system|stale file handle|file too large"
    r"|no such file or directory|permission denied|killed",
    re.I,
)


class NativeUnavailableError(RuntimeError):
    """The native kernels are not available, for the reason in the message."""


class RefusedError(NativeUnavailableError):
    """The compiler rejects the sources or the flags, or the loader the library: another try would fail, too."""


class Compiler(NamedTuple):
    """Command of a C++ compiler, with launcher and options if $CXX has them, and the first line of --version."""

    command: list[str]
    version: str


def source_directory() -> Path:
    """`csrc/cpu`, in the package (installed) or next to it (a checkout)."""
    for directory in (PACKAGE / "csrc" / "cpu", PACKAGE.parent / "csrc" / "cpu"):
        if (directory / "operators.cpp").exists():
            return directory
    raise NativeUnavailableError("the sources of the native kernels, csrc/cpu, are missing from this installation")


def library_stem(sources: Path) -> str:
    """Name of the library of these sources, this torch and this system, without the digest of its content."""
    import torch

    system = (platform.machine(), _libc(), FLAGS, INSTRUCTION_SETS)
    digest = hashlib.sha256(repr((torch.__version__, system)).encode())
    for path in sorted([*sources.glob("*.cpp"), *sources.glob("*.h"), *sources.parent.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"mcl_kernels_native-{digest.hexdigest()[:16]}"


def _libc() -> str:
    """Version of the C library: machines with different ones may share a home directory."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # only glibc has it
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    return ""


def find_compiler() -> Compiler:
    """The C++ compiler: $CXX, with launcher and options, or the first known one on the PATH.

    Raises:
        NativeUnavailableError: no compiler can be used; $CXX is never replaced by another.
    """
    if named := os.environ.get("CXX", "").strip():
        try:
            return _checked_compiler([named] if shutil.which(named) else shlex.split(named))
        except (NativeUnavailableError, ValueError) as error:
            raise NativeUnavailableError(
                f"CXX={named!r} cannot be used: {error}; set CXX to a C++ compiler, or unset it"
            ) from error
    reasons = []
    for path in filter(None, map(shutil.which, COMPILERS)):
        try:
            return _checked_compiler([path])
        except NativeUnavailableError as error:
            reasons.append(str(error))
    raise NativeUnavailableError(reasons[0] if reasons else f"no C++ compiler is on the PATH; {INSTALL}")


def _checked_compiler(command: list[str]) -> Compiler:
    program = shutil.which(command[0])
    if program is None:
        raise NativeUnavailableError(f"{command[0]} is not on the PATH")
    command = [program, *command[1:]]
    try:
        result = _start([*command, "--version"])
        output, errors = result.communicate()
    except OSError as error:
        raise NativeUnavailableError(f"{program} does not start: {error.strerror}") from error
    lines = output.splitlines()
    if result.returncode or not lines:
        raise NativeUnavailableError(f"{shlex.join([*command, '--version'])} failed: {_first_error(errors, result)}")
    if sys.platform == "linux" and re.search("clang|oneapi", output, re.I) and not _has_openmp_of_llvm():
        raise NativeUnavailableError(
            f"{program} ({lines[0]}) needs the OpenMP runtime of LLVM, and this torch has loaded that of GCC; "
            "install g++ (apt install g++, dnf install gcc-c++, conda install gxx)"
        )
    return Compiler(command, lines[0])


def _has_openmp_of_llvm() -> bool:
    """Returns whether the OpenMP runtime that torch has loaded has the functions that code compiled by Clang calls."""
    import torch

    return hasattr(ctypes.CDLL(torch._C.__file__), "__kmpc_fork_call")


def build(sources: Path, directory: Path) -> Path:
    """Compiles the sources into a library in `directory`, which appears when it is complete. Returns its path.

    Raises:
        RefusedError: the compiler rejects the sources, or the loader the library; the message holds the first error.
        NativeUnavailableError: there is no compiler, or it failed for another reason, such as a full disk.
        OSError: the directory cannot be written.
    """
    import torch

    compiler = find_compiler()
    torch_directory = Path(torch.__file__).parent
    includes = [f"-isystem{torch_directory / 'include' / part}" for part in (".", "torch/csrc/api/include")]
    # The OpenMP calls resolve to the runtime that torch has loaded: linking another would mean two pools of threads.
    openmp = ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    libraries = [f"-L{torch_directory / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as scratch:
            built = Path(scratch) / "mcl_kernels_native.so"
            operators = {source: [*includes, *openmp] for source in operator_sources(sources)}
            compile_and_link(
                operators | kernel_sources(sources),
                [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"],
                ["-shared", *libraries, *undefined],
                built,
            )
            return library.keep(built, directory, library_stem(sources))
    except library.LibraryError as error:
        kind = NativeUnavailableError if PASSING.search(str(error)) or "signal" in str(error) else RefusedError
        remedy = "; set XDG_CACHE_HOME to a directory that is not mounted noexec" if "map segment" in str(error) else ""
        raise kind(f"the library that {shlex.join(compiler.command)} built does not load: {error}{remedy}") from error


def operator_sources(sources: Path) -> list[Path]:
    """Sources that include torch: schemas, and the operators of each operation."""
    return sorted(sources.glob("*operators.cpp"))


def kernel_sources(sources: Path) -> dict[Path, list[str]]:
    """Sources without torch that this machine compiles, each with the flags of its instruction set."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    names = [path.name for path in sorted({*sources.glob("*.cpp")} - {*operator_sources(sources)})]
    return {sources / name: INSTRUCTION_SETS.get(name, []) for name in names if is_x86 or name not in INSTRUCTION_SETS}


def compile_and_link(sources: dict[Path, list[str]], flags: list[str], link: list[str], output: Path) -> None:
    """Compiles each source with its own flags and all of `flags`, side by side, and links them with those of `link`.

    Raises:
        NativeUnavailableError: as `build`.
    """
    compiler = find_compiler().command
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as directory:
        objects = {source: f"{directory}/{source.name}.o" for source in sources}
        _run([[*compiler, *flags, *own, "-c", str(source), "-o", objects[source]] for source, own in sources.items()])
        linked = Path(directory) / output.name
        _run([[*compiler, *flags, *objects.values(), *link, "-o", str(linked)]])
        linked.replace(output)


def _run(commands: list[list[str]]) -> None:
    """Runs compilers side by side. The first that fails ends the others."""
    running: list[subprocess.Popen[str]] = []

    def run(command: list[str]) -> None:
        process = _start(command)
        running.append(process)
        _, errors = process.communicate()
        if process.returncode:
            lasting = process.returncode > 0 and LASTING.search(errors) and not PASSING.search(errors)
            failed = f"{command[0]} failed: {_first_error(errors, process)}"
            raise RefusedError(failed) if lasting else NativeUnavailableError(f"{failed}; the next process tries again")

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        try:
            for ended in as_completed([pool.submit(run, command) for command in commands]):
                ended.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            raise


def _start(command: list[str]) -> subprocess.Popen[str]:
    """Starts a compiler whose messages are English, in a group of processes that can be ended together."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        errors="replace", env={**os.environ, "LC_ALL": "C"}, start_new_session=True,
    )  # fmt: skip


def _first_error(errors: str, process: subprocess.Popen[str]) -> str:
    # The driver of the linker adds a line of its own, which is left out.
    lines = [line for line in errors.splitlines() if line.strip() and not re.search("ld returned|linker command", line)]
    ended = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    return next((line for line in lines if re.search("error|ld: ", line, re.I)), lines[0] if lines else ended)
