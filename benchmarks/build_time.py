"""Seconds to compile the kernels for the CPU: `python -m benchmarks.build_time` writes build_time.csv.

Each turn is the first loss of a new process, which compiles the kernels into an empty cache. The import of PyTorch and
of the package is not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.conditions import ROOT, conditions
from benchmarks.measure import quantiles, write_rows
from mcl_kernels.backends.native_build import find_compiler

RESULTS = Path(__file__).with_name("build_time.csv")
TURNS = 3
COLUMNS = ("cores", "compiler", "turns", "p20", "p50", "p80", "versions", "processor", "commit")
FIRST_LOSS = """
import time, torch
from mcl_kernels import nt_xent
views = torch.randn(2, 64, 16)
started = time.perf_counter()
nt_xent(*views, impl="native")
print(time.perf_counter() - started)
"""


def seconds_of_first_loss(cache: str) -> float:
    """Seconds of the first loss in a new process, with the compiled kernels in this directory."""
    command, environment = [sys.executable, "-c", FIRST_LOSS], {**os.environ, "XDG_CACHE_HOME": cache}
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(result.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS, help="another CSV")
    options = parser.parse_args()
    seconds = []
    for _ in range(TURNS):
        with tempfile.TemporaryDirectory() as cache:
            seconds.append(seconds_of_first_loss(cache))
        print(f"{seconds[-1]:.1f} s", flush=True)
    row = {"cores": os.cpu_count(), "compiler": find_compiler().version, "turns": TURNS, **quantiles(seconds)}
    write_rows(options.csv, COLUMNS, [{**row, **conditions(torch.device("cpu"))}])


if __name__ == "__main__":
    main()
