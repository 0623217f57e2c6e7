"""What pyproject.toml cannot say: the kernels' sources travel in the package, and are compiled now where torch is.

With `pip install --no-build-isolation .` the torch that will run them is importable here and the library is built
into the package; otherwise `mcl_kernels._native` builds it on first use.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cpu"


def load_native():
    """`mcl_kernels._native`, without importing the package."""
    specification = importlib.util.spec_from_file_location("_native", ROOT / "mcl_kernels" / "_native.py")
    native = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(native)
    return native


NATIVE = load_native() if importlib.util.find_spec("torch") else None


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # a checkout is used as it is
            return
        package = Path(self.build_lib) / "mcl_kernels"
        for directory in ("csrc", "lib"):  # an earlier build may have left other sources, of another library
            shutil.rmtree(package / directory, ignore_errors=True)
        shutil.copytree(SOURCES, package / "csrc" / "cpu")
        if NATIVE:
            try:
                NATIVE.build(SOURCES, package / "lib" / NATIVE.library_name(SOURCES))
            except NATIVE.NativeUnavailableError as error:
                print(f"mcl_kernels: the native CPU kernels are left to their first use: {error}", file=sys.stderr)


class MayHoldLibrary(Distribution):
    def has_ext_modules(self):
        return NATIVE is not None


setup(cmdclass={"build_py": BuildWithKernels}, distclass=MayHoldLibrary)
