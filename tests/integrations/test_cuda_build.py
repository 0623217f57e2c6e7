"""Installations that build the CUDA kernels and link them against a torch with CUDA; no GPU is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mcl_kernels.backends import cuda as _cuda

ROOT = Path(__file__).parents[2]
SCRIPT = """
import mcl_kernels, torch
from mcl_kernels.backends import cuda as _cuda
assert "site" in mcl_kernels.__file__, mcl_kernels.__file__
operators = _cuda.ops()
print(operators.architectures())
assert operators.masked_lse_forward and operators.assign_clusters and operators.make_plan
print(mcl_kernels.capabilities()["cuda"]["reason"])
mcl_kernels.masked_logsumexp(torch.eye(3), impl="cuda")
"""


def toolkit() -> str | None:
    """$CUDA_HOME, or the toolkit that the nvcc on the PATH reports: it may be a script that calls another nvcc."""
    if (home := os.environ.get("CUDA_HOME")) or not shutil.which("nvcc"):
        return home
    output = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    tops = [line.split("=", 1)[1] for line in output.splitlines() if line.startswith("#$ TOP=")]
    return str(Path(tops[0]).resolve()) if tops else None


def unavailable_reason() -> str | None:
    """Returns why the kernels cannot be built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    home = toolkit()
    return None if home and (Path(home) / "bin" / "nvcc").exists() else "no nvcc is on the PATH or under $CUDA_HOME"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))]


def install(site: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Installs the library with the CUDA kernels from a copy of the checkout."""
    checkout = site.with_name("checkout")
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "build", "lib", "*.egg-info", "runs"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where ninja is
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", site]
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, checkout],
        env={**os.environ, "PATH": path, "MCL_KERNELS_CUDA": "1", "CUDA_HOME": str(toolkit()), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_installation_links_loads_and_describes_its_kernels(tmp_path: Path) -> None:
    site = tmp_path / "site"
    result = install(site, TORCH_CUDA_ARCH_LIST="7.5;9.0+PTX")
    assert result.returncode == 0, result.stdout + result.stderr
    environment = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=site, env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.splitlines() == [
        "7.5,9.0+PTX",
        "CUDA C++ kernels (csrc/cuda), built for 7.5, 9.0+PTX; torch sees no CUDA device",
    ], result.stderr
    error = "impl='cuda': computes on CUDA tensors: got device cpu; torch sees no CUDA device (or use impl='auto')"
    assert result.stderr.strip().endswith(f"RuntimeError: {error}")

    import triton.backends.nvidia  # comes with a torch that has CUDA

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    (library,) = (site / "mcl_kernels" / "lib").glob(f"{_cuda.NAMESPACE}-*")
    listed = subprocess.run([tool, "-lelf", "-lptx", library], capture_output=True, text=True, check=True).stdout
    sources = len(list(_cuda.source_directory().glob("*.cu")))
    kinds = (".sm_75.cubin", ".sm_90.cubin", ".sm_90.ptx")
    assert [listed.count(kind) for kind in kinds] == [sources] * 3
    assert len(listed.splitlines()) == 3 * sources


def test_an_installation_without_a_gpu_architecture(tmp_path: Path) -> None:
    result = install(tmp_path / "site", TORCH_CUDA_ARCH_LIST="", CUDA_VISIBLE_DEVICES="")
    assert result.returncode != 0
    assert "MCL_KERNELS_CUDA=1: no GPU is detected to compile for; name" in result.stderr


def test_an_installation_with_an_nvcc_of_another_major_version(tmp_path: Path) -> None:
    compiler = tmp_path / "cuda-9.2" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\necho 'release 9.2, V9.2.148'\n")
    compiler.chmod(0o755)
    result = install(tmp_path / "site", CUDA_HOME=str(tmp_path / "cuda-9.2"))
    assert result.returncode != 0
    assert "MCL_KERNELS_CUDA=1: nvcc must be of the major version of torch's CUDA" in result.stderr
    assert f"got 9.2 from {compiler}; name such a toolkit: CUDA_HOME=" in result.stderr
