"""The build steps that pyproject.toml cannot describe: kernel sources in the package, compiled if torch is installed.

With `pip install --no-build-isolation .` the torch that will run them is importable here and the library is built
into the package; otherwise `mcl_kernels.backends.native` builds it on first use. The CUDA kernels are built where
MCL_KERNELS_CUDA=1 asks for them, and an installation that cannot build them then fails with the reason.
"""

import importlib.util
import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc" / "cpu"
CUDA_SOURCES = ROOT / "csrc" / "cuda"
HAS_TORCH = importlib.util.find_spec("torch") is not None


def load(name):
    """Module of `mcl_kernels`, imported without `mcl_kernels/__init__.py`."""
    package = sys.modules.setdefault("mcl_kernels", types.ModuleType("mcl_kernels"))
    package.__path__ = [str(ROOT / "mcl_kernels")]
    return importlib.import_module(f"mcl_kernels.{name}")


NATIVE = load("backends.native_build") if HAS_TORCH else None


def build_cuda(directory):
    wanted = os.environ.get("MCL_KERNELS_CUDA", "0")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MCL_KERNELS_CUDA must be 0 or 1: got {wanted!r}")
    if wanted != "1":
        return
    if not HAS_TORCH:
        raise SystemExit(
            "MCL_KERNELS_CUDA=1 compiles against the installed torch: none is seen here; install it, and "
            "pass --no-build-isolation"
        )
    cuda = load("backends.cuda")
    try:
        cuda.build(CUDA_SOURCES, directory)
    except cuda.CudaUnavailableError as error:
        raise SystemExit(f"MCL_KERNELS_CUDA=1: {error}") from error


class BuildWithKernels(build_py):
    def run(self):
        if self.editable_mode:  # a checkout is used as it is
            super().run()
            build_cuda(ROOT / "mcl_kernels" / "lib")
            return
        package = Path(self.build_lib) / "mcl_kernels"
        if package.resolve() == ROOT / "mcl_kernels":
            raise SystemExit(f"the package cannot be built into its own sources, {ROOT}: name another --build-lib")
        shutil.rmtree(package, ignore_errors=True)  # all that is there goes into the wheel, of an earlier build too
        super().run()
        shutil.copytree(ROOT / "csrc", package / "csrc")
        build_cuda(package / "lib")
        if NATIVE:
            try:
                NATIVE.build(SOURCES, package / "lib")
            except (NATIVE.NativeUnavailableError, OSError) as error:
                print(f"mcl_kernels: the native CPU kernels are left to their first use: {error}", file=sys.stderr)


class MayHoldLibrary(Distribution):
    def has_ext_modules(self):
        return NATIVE is not None


setup(license="Apache-2.0", cmdclass={"build_py": BuildWithKernels}, distclass=MayHoldLibrary)
