"""Compiled kernels for a machine with a GPU, made on one without: `python -m benchmarks.gpu.carry` fills a folder.

The folder holds Triton's cache for everything that `benchmarks.gpu.measure` launches, and the library of csrc/cuda
where there is an nvcc. They fit one version of Triton and of torch: run this with the versions of the other machine.
Python may differ. `measure --carry FOLDER` uses what fits and compiles the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mcl_kernels.backends import cuda, library

ROOT = Path(__file__).parents[2]
MANIFEST, CACHE, LIBRARY = "manifest.json", "triton", "lib"
KEPT = (".cubin", ".json")  # what a launch reads; the other files are for people
VARIABLE = "TRITON_CACHE_DIR"


def conditions(device: torch.device) -> dict[str, str]:
    """Returns versions, the device and the commit of a measurement."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy"):
        try:
            found[name] = str(import_module(name).__version__)
        except ImportError:
            found[name] = "none"
    found["commit"] = _commit()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name, "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count), "L2 bytes": str(properties.L2_cache_size),
            "memory bytes": str(properties.total_memory), "CUDA of torch": str(torch.version.cuda),
            "driver and clocks": query_gpu("driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"),
        }  # fmt: skip
    return found


def query_gpu(fields: str) -> str:
    """Returns what nvidia-smi prints, or its error."""
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {type(error).__name__}"


def _commit() -> str:
    """Returns the commit of this checkout, with "+changes"; without git that of the carried folder, if there is one."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return _manifest().get("commit", "unknown")
    if head.returncode:
        return _manifest().get("commit", "unknown")
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _manifest() -> dict[str, str]:
    path = Path(os.environ.get(VARIABLE, "")) / MANIFEST
    content: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def install(folder: Path) -> dict[str, str]:
    """Copies what fits this machine to where it is looked for. Returns the variables of the environment to set."""
    if not (folder / MANIFEST).is_file():
        print(f"nothing is carried: {folder / MANIFEST} is missing", flush=True)
        return {}
    cache = Path(tempfile.mkdtemp(prefix="triton-cache-"))
    shutil.copytree(folder / CACHE, cache, dirs_exist_ok=True)
    shutil.copy(folder / MANIFEST, cache)
    for group in cache.glob("*/__grp__*.json"):  # they hold the paths of the machine that compiled
        content = json.loads(group.read_text())
        content["child_paths"] = {name: str(group.parent / name) for name in content["child_paths"]}
        group.write_text(json.dumps(content))
    stem, target = cuda.library_stem(cuda.source_directory()), cuda.PACKAGE / "lib"
    libraries = library.find_libraries(folder / LIBRARY, stem)
    for path in libraries:
        target.mkdir(exist_ok=True)
        shutil.copy(path, target)
    print(
        f"carried: {len(list(cache.glob('*/*.cubin')))} kernels, "
        f"{len(libraries) or 'no'} library of csrc/cuda for torch {torch.__version__} and these sources",
        flush=True,
    )
    return {VARIABLE: str(cache)}


def use() -> None:
    """Lets this process find the carried kernels, whose keys are those of another build of the same Triton.

    The key of a kernel holds a digest of Triton's own library, which differs for each version of Python.
    """
    carried = _manifest()
    if not carried:
        return
    import triton
    from triton.runtime import cache

    if triton.__version__ == carried["triton"] and hasattr(cache, "triton_key"):
        cache.triton_key = lambda: carried["key"]


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest this module does `use`."""
    use()


def jobs() -> list[tuple[str, int]]:
    """Returns what is compiled: the name of a function of `carried_launches`, and an index."""
    from benchmarks.gpu import carried_launches

    return [(name, index) for name, count in carried_launches.counts().items() for index in range(count)]


def _compile(job: tuple[str, int], architecture: int) -> str | None:
    """Compiles the launches of a job. Returns the error, if there is one."""
    from benchmarks.gpu import carried_launches
    from benchmarks.gpu.stand_in import fill_cache

    name, index = job
    try:
        with fill_cache(architecture):
            getattr(carried_launches, name)(index)
    except Exception as error:
        return f"{name} {index}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def fill(folder: Path, architecture: int, processes: int) -> list[str]:
    """Compiles all launches into the folder. Returns the errors."""
    os.environ[VARIABLE] = str(folder / CACHE)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_compile, job, architecture) for job in jobs()]
        errors = [future.result() for future in as_completed(running)]
    for path in (folder / CACHE).glob("*/*"):
        if path.suffix not in KEPT:
            path.unlink()
    return [error for error in errors if error]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-carry")
    parser.add_argument("--architecture", type=int, default=90, choices=(80, 90, 100))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    import triton
    from triton.runtime import cache

    shutil.rmtree(options.out, ignore_errors=True)
    (options.out / CACHE).mkdir(parents=True)
    manifest = {
        "triton": triton.__version__, "key": cache.triton_key(), "torch": torch.__version__, "commit": _commit(),
        "architecture": options.architecture,
    }  # fmt: skip
    (options.out / MANIFEST).write_text(json.dumps(manifest, indent=2))
    errors = fill(options.out, options.architecture, options.processes)
    if cuda.find_nvcc():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{options.architecture / 10:.1f}")
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
        try:
            cuda.build(cuda.source_directory(), options.out / LIBRARY)
        except cuda.CudaUnavailableError as error:
            errors.append(str(error))
    for error in errors:
        print(error)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {len(list(options.out.rglob('*.cubin')))} kernels, {size / 2**20:.1f} MiB")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
