"""Promises of the CUDA C++ implementation alone; its numbers are in the tests that every implementation runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mcl_kernels.backends import cuda as _cuda
from mcl_kernels.backends import library as _library
from tests import emulated_cuda
from tests.build_sanitized import build_cuda, build_cuda_program

SOURCES = _cuda.source_directory()
BARRIERS = [
    f"{path.name}:{number}"
    for path in sorted(SOURCES.glob("*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads()" in line or ".sync()" in line
]
needs_emulation = pytest.mark.skipif(
    emulated_cuda.unavailable_reason() is not None, reason=str(emulated_cuda.unavailable_reason())
)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("sanitized") / "cuda"
    build_cuda(str(program))
    return program


def run_sanitized(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The program ends at its first race: without a barrier there are thousands.
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, check=False, timeout=600, env=environment
    )


@pytest.mark.slow
@needs_emulation
def test_no_access_is_unordered(sanitized: Path) -> None:
    result = run_sanitized(sanitized)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@needs_emulation
@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_barrier_that_is_left_out_is_detected(sanitized: Path, barrier: str) -> None:
    """Every barrier is necessary, and the emulation detects a missing one."""
    result = run_sanitized(sanitized, barrier)
    # Most are reported as a race; without some of them a row is read at an invalid index.
    assert result.returncode != 0
    assert "ThreadSanitizer" in result.stderr or "WRONG" in result.stdout, result.stderr


@pytest.mark.slow
@needs_emulation
def test_bfloat16_before_its_tensor_cores(tmp_path: Path) -> None:
    """On sm_75 it is multiplied by fused multiply-adds, which the emulated library does not choose."""
    build_cuda_program(str(tmp_path / "cuda"), ["-DMCL_NO_BF16_TENSOR_CORES"])
    result = subprocess.run([tmp_path / "cuda"], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bfloat16" in result.stdout


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 5), ["7.5"], True),
        ((8, 9), ["8.0"], True),  # built for an older minor version
        ((8, 0), ["8.6"], False),
        ((9, 0), ["8.0"], False),
        ((9, 0), ["8.0+PTX"], True),
        ((12, 0), ["7.5", "9.0a+PTX", "10.0"], False),
        ((9, 0), ["9.0a"], True),
        ((10, 3), ["10.0a"], False),
    ],
)
def test_gpus_that_run_the_built_architectures(
    capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    assert _cuda.runs_on(capability, architectures) == runs


def test_architectures_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;9.0+PTX")
    assert _cuda.target_architectures() == ["7.5", "9.0+PTX"]
    assert _cuda._code_flags(["9.0+PTX"]) == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    with pytest.raises(_cuda.CudaUnavailableError, match=r"from 7\.5 on.*got 7\.0"):
        _cuda.target_architectures()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(_cuda.CudaUnavailableError, match="TORCH_CUDA_ARCH_LIST="):
        _cuda.target_architectures()


def test_a_torch_without_cuda_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(_cuda.CudaUnavailableError, match="is built without CUDA; install one that is"):
        _cuda.check_toolkit()


@pytest.mark.parametrize(
    ("printed", "message"), [("release 12.4, V12.4.1", r"got 12\.4 from"), ("what?", "got no version from")]
)
def test_an_nvcc_of_another_major_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: str, message: str
) -> None:
    from torch.utils import cpp_extension

    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text(f"#!/bin/sh\necho '{printed}'\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(_cuda.CudaUnavailableError, match=message):
        _cuda.check_toolkit()
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    if "12.4" in printed:
        _cuda.check_toolkit()


@pytest.mark.parametrize("line", ['a.cu(3): error: expected a ";"', "a.o : error LNK2001: unresolved external symbol"])
def test_the_first_error_of_a_build_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str) -> None:
    """The error comes after the command, which torch repeats."""
    from torch.utils import cpp_extension

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError(f"Error building extension: nvcc -c a.cu\n{line}\nninja: stopped")

    monkeypatch.setattr(_cuda, "check_toolkit", lambda: None)
    monkeypatch.setattr(cpp_extension, "load", fail)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    with pytest.raises(_cuda.CudaUnavailableError, match=rf"not built: {re.escape(line)}.*CUDA_HOME=/usr/local/cuda"):
        _cuda.build(SOURCES, tmp_path / "lib")
    assert not list((tmp_path / "lib").iterdir())


def test_a_library_that_does_not_load_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    def compile_nothing(stem: str, *arguments: object, build_directory: str, **options: object) -> None:
        (Path(build_directory) / f"{stem}.so").write_bytes(b"\x7fELF")

    monkeypatch.setattr(_cuda, "check_toolkit", lambda: None)
    monkeypatch.setattr(_cuda, "PACKAGE", tmp_path)
    monkeypatch.setattr(_cuda, "source_directory", lambda: SOURCES)
    monkeypatch.setattr(cpp_extension, "load", compile_nothing)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    with pytest.raises(_cuda.CudaUnavailableError, match=r"the built library does not load: .*file too short"):
        _cuda.build(SOURCES, tmp_path / "lib")
    assert not list((tmp_path / "lib").iterdir())
    assert "is not built for this torch" in str(_cuda._loaded.__wrapped__())

    monkeypatch.setattr(_library, "check_loads", lambda library: None)
    library = _cuda.build(SOURCES, tmp_path / "lib")
    assert "does not load: file too short" in str(_cuda._loaded.__wrapped__())
    library.write_bytes(b"")
    assert str(_cuda._loaded.__wrapped__()).startswith(f"{library} is damaged; build it again: MCL_KERNELS_CUDA=1 pip")


def test_a_gpu_newer_than_the_built_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(_cuda, "_loaded", lambda: None)
    monkeypatch.setattr(_cuda, "_architectures", lambda: ["7.5", "9.0"])
    message = (
        "is built for compute capability 7.5, 9.0: got 12.0; TORCH_CUDA_ARCH_LIST=12.0 MCL_KERNELS_CUDA=1 pip install"
    )
    assert str(_cuda.unavailable_reason(torch.device("cuda"))).startswith(message)
    monkeypatch.setattr(_cuda, "_architectures", lambda: ["7.5", "9.0+PTX"])
    assert _cuda.unavailable_reason(torch.device("cuda")) is None
    assert _cuda.describe()[1] == "CUDA C++ kernels (csrc/cuda), built for 7.5, 9.0+PTX"


def test_a_call_without_built_kernels_is_an_error() -> None:
    code = (
        "import torch, mcl_kernels\n"
        "print(mcl_kernels.capabilities()['cuda'])\n"
        "mcl_kernels.masked_logsumexp(torch.eye(3), impl='cuda')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert "impl='cuda': computes on CUDA tensors: got device cpu" in result.stderr
    if _cuda._loaded():
        assert "'available': False" in result.stdout
    if torch.cuda.is_available():
        assert re.search("is not built for this torch.*MCL_KERNELS_CUDA=1 pip install", result.stdout)
    else:
        assert "'reason': 'torch sees no CUDA device" in result.stdout
