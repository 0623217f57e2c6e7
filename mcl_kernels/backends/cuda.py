"""Finds the compiled CUDA kernels, or gives the reason why there are none; builds them during an installation.

`csrc/cuda` is compiled against the torch that runs it, only by `MCL_KERNELS_CUDA=1 pip install --no-build-isolation .`.
The library lies in the package, under a name made of torch's version, the compiler's flags, the content of the sources
and its own content.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mcl_kernels.backends import library

PACKAGE = Path(__file__).parents[1]
NAMESPACE = "mcl_kernels_cuda"
MIN_CAPABILITY = (7, 5)
FLAGS = ["-O3", "-std=c++17"]
# The toolkit's cooperative_groups.h includes libraries that ask for MSVC's newer preprocessor.
FLAGS += ["-Xcompiler", "/Zc:preprocessor"] if os.name == "nt" else []
# Error lines of g++, nvcc, MSVC and linkers. Ninja's, which repeat a command, are not among them.
ERROR = re.compile(r"error:|error (C|LNK)\d|fatal|ld: ")


class CudaUnavailableError(RuntimeError):
    """The CUDA kernels are not available, for the reason in the message."""


def install_command(**environment: str) -> str:
    """Command that builds the kernels, in the shell of this system, with these environment variables."""
    variables = {**environment, "MCL_KERNELS_CUDA": "1"}.items()
    if os.name == "nt":
        settings = [f'$env:{name}="{value}";' for name, value in variables]
    else:
        settings = [f"{name}={shlex.quote(value)}" for name, value in variables]
    return " ".join([*settings, "pip install --no-build-isolation ."])


def library_stem(sources: Path) -> str:
    """Name of the library of these sources and this torch, without the digest of its content."""
    digest = hashlib.sha256(repr((torch.__version__, FLAGS)).encode())
    for path in sorted([*sources.iterdir(), *sources.parent.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{NAMESPACE}-{digest.hexdigest()[:16]}"


def source_directory() -> Path:
    """`csrc/cuda`, in the package (installed) or next to it (a checkout)."""
    for directory in (PACKAGE / "csrc" / "cuda", PACKAGE.parent / "csrc" / "cuda"):
        if (directory / "operators.cpp").exists():
            return directory
    raise CudaUnavailableError("the sources of the CUDA kernels, csrc/cuda, are missing from this installation")


def build(sources: Path, directory: Path) -> Path:
    """Compiles the sources into a library in `directory`, which appears when it is complete. Returns its path.

    The architectures are those of $TORCH_CUDA_ARCH_LIST, else those of the GPUs of this machine.

    Raises:
        CudaUnavailableError: with what is missing, or with the compiler's first error.
    """
    check_toolkit()
    from torch.utils import cpp_extension

    architectures = target_architectures()
    stem = library_stem(sources)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as scratch:
        try:
            cpp_extension.load(
                stem,
                [str(path) for path in sorted([*sources.glob("*.cu"), *sources.glob("*.cpp")])],
                extra_cflags=[f"-DMCL_NAMESPACE={NAMESPACE}", f"-DMCL_ARCHITECTURES={','.join(architectures)}"],
                extra_cuda_cflags=[*FLAGS, *_code_flags(architectures)],
                build_directory=scratch,
                with_cuda=True,
                is_python_module=False,
            )
        except (OSError, RuntimeError) as error:
            lines = str(error).splitlines()
            errors = [line for line in lines if ERROR.search(line)] or lines
            raise CudaUnavailableError(
                f"the CUDA kernels were not built: {errors[0]} "
                f"(the toolkit is looked for in CUDA_HOME={cpp_extension.CUDA_HOME})"
            ) from error
        (built,) = [path for path in Path(scratch).iterdir() if path.suffix in library.SUFFIXES]
        try:
            return library.keep(built, directory, stem)
        except library.LibraryError as error:
            raise CudaUnavailableError(f"the built library does not load: {error}") from error


def check_toolkit() -> None:
    """Raises CudaUnavailableError if the installed torch and compiler cannot build the kernels."""
    if torch.version.cuda is None:
        raise CudaUnavailableError(
            f"torch {torch.__version__} is built without CUDA; install one that is built with that of your nvcc, "
            f"and then: {install_command()}"
        )
    nvcc = find_nvcc()
    if nvcc is None:
        raise CudaUnavailableError(
            f"no nvcc is on the PATH or under $CUDA_HOME; install the CUDA toolkit {torch.version.cuda} "
            f"(conda install -c nvidia cuda-toolkit={torch.version.cuda}), and then: {install_command()}"
        )
    release = nvcc_release(nvcc)
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise CudaUnavailableError(
            f"nvcc must be of the major version of torch's CUDA, {torch.version.cuda}: got {release} from {nvcc}; "
            f"name such a toolkit: {install_command(CUDA_HOME=f'/usr/local/cuda-{torch.version.cuda}')}"
        )


def find_nvcc() -> str | None:
    """Path of the compiler: in the CUDA_HOME that torch finds, else on the PATH."""
    from torch.utils.cpp_extension import CUDA_HOME

    return (CUDA_HOME and shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin"))) or shutil.which("nvcc")


def nvcc_release(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", output)
    return release[1] if release else "no version"


def target_architectures() -> list[str]:
    """Architectures to compile for, named as in TORCH_CUDA_ARCH_LIST: "7.5", or "9.0+PTX" for newer ones too."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        listed = [f"{major}.{minor}" for major, minor in sorted(found)]
    if not listed:
        raise CudaUnavailableError(
            "no GPU is detected to compile for; name compute capabilities: "
            + install_command(TORCH_CUDA_ARCH_LIST="7.5;8.0;9.0+PTX")
        )
    for name in listed:
        parsed = re.fullmatch(r"(\d+)\.(\d)a?(\+PTX)?", name)
        if parsed is None or (int(parsed[1]), int(parsed[2])) < MIN_CAPABILITY:
            raise CudaUnavailableError(
                f"TORCH_CUDA_ARCH_LIST must name compute capabilities from {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} on, "
                f"such as 8.0 or 9.0+PTX: got {name}"
            )
    return listed


def _code_flags(architectures: list[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Returns whether code for these architectures runs on a GPU.

    Code runs on its own architecture and on later minor versions of it, PTX on all later ones. Code for an architecture
    with an `a` ("9.0a") runs on that one only.
    """
    for name in architectures:
        number, _, ptx = name.partition("+")
        major, minor = map(int, number.rstrip("a").split("."))
        if (major, minor) == capability:
            return True
        older = (major == capability[0] or ptx) and (major, minor) < capability
        if older and not number.endswith("a"):
            return True
    return False


@cache
def _loaded() -> str | None:
    """Loads the library, once per process. Returns the reason if that fails, else None."""
    try:
        libraries = library.find_libraries(PACKAGE / "lib", library_stem(source_directory()))
    except CudaUnavailableError as error:
        return str(error)
    if not libraries:
        return f"is not built for this torch, {torch.__version__}; {install_command()}"
    try:
        intact = next(filter(library.is_intact, libraries), None)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    if intact is None:
        return f"{libraries[0]} is damaged; build it again: {install_command()}"
    reason = library.load(intact)
    return f"the built library does not load: {reason}" if reason else None


def ops() -> Any:
    """Operators of the kernels.

    Raises:
        CudaUnavailableError: with the reason.
    """
    if reason := _loaded():
        raise CudaUnavailableError(f"impl='cuda': {reason}")
    return getattr(torch.ops, NAMESPACE)


def _architectures() -> list[str]:
    """Architectures that the library is built for."""
    named: str = ops().architectures()
    return named.split(",")


def no_device() -> str | None:
    """Returns why torch has no CUDA device, or None if it has one."""
    if torch.cuda.is_available():
        return None
    built = "" if torch.version.cuda or torch.version.hip else f": torch {torch.__version__} is built without CUDA"
    return f"torch sees no CUDA device{built}"


def unavailable_reason(device: torch.device) -> str | None:
    """Returns why the kernels do not compute on a device, None if they do."""
    if device.type != "cuda":
        missing = no_device()
        return f"computes on CUDA tensors: got device {device}{'; ' + missing if missing else ''}"
    if missing := no_device():
        return missing
    if torch.version.hip:
        return "is for NVIDIA's GPUs: torch is built for ROCm"
    if reason := _loaded():
        return reason
    capability = torch.cuda.get_device_capability(device)
    architectures = _architectures()
    if not runs_on(capability, architectures):
        name = ".".join(map(str, capability))
        return (
            f"is built for compute capability {', '.join(architectures)}: got {name}; "
            f"{install_command(TORCH_CUDA_ARCH_LIST=name)}"
        )
    return None


def describe() -> tuple[list[str], str]:
    """Returns the types of device of this machine that the kernels compute on; their description, or why none."""
    missing = no_device()
    if reason := _loaded():
        return [], missing or reason
    built = f"CUDA C++ kernels (csrc/cuda), built for {', '.join(_architectures())}"
    if missing:
        return [], f"{built}; {missing}"
    reason = unavailable_reason(torch.device("cuda"))
    return ([], reason) if reason else (["cuda"], built)
