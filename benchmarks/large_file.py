"""k-means of a file of features: `python -m benchmarks.large_file` writes large_file.csv.

A file of features is written to a directory, clustered through a memory map, and deleted. Seconds are those of a fit
and of one of its iterations, with the file in the page cache, and dropped from it before each pass over the rows; next
to them are those of `dd`, which reads the file once. They take turns; p20, p50 and p80 are those of the turns. `bytes`
are all that a fit reads in its passes, as the system counts them. Peak memory is above the start of the fit, in a
process for each metric.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.conditions import conditions
from benchmarks.measure import Row, in_fresh_process, peak_of, quantiles, write_rows
from mcl_kernels import KMeans
from mcl_kernels.kmeans.rows import FileRows

RESULTS = Path(__file__).with_name("large_file.csv")
D, CLUSTERS, ITERATIONS = 512, 10, 5
BLOCK = 1 << 16  # rows that are written at a time
METRICS = ("euclidean", "cosine")
COLUMNS = (
    "contender", "state", "metric", "n", "d", "k", "iterations", "threads", "bytes", "p20", "p50", "p80", "peak_bytes",
    "versions", "processor", "commit",
)  # fmt: skip


def write_file(path: Path, n: int) -> None:
    """Writes rows without clusters, so that a fit takes all its iterations."""
    generator = np.random.default_rng(0)
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, D))
    for begin in range(0, n, BLOCK):
        block = features[begin : begin + BLOCK]
        block[:] = generator.standard_normal(block.shape, dtype=np.float32)
    features.flush()


def drop(path: Path) -> None:
    """Removes a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())  # only pages that are on disk can be removed
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


Timed = dict[str, tuple[float, int]]  # seconds, and bytes that are read in them, by contender


def fit(path: Path, metric: str) -> KMeans:
    return KMeans(CLUSTERS, metric=metric, max_iter=ITERATIONS, tol=0.0).fit(np.load(path, mmap_mode="r"))


def time_fit(path: Path, state: str) -> Timed:
    """Time of a fit, and of the median of its iterations, each of which reads the file once."""
    KMeans(2, max_iter=1).fit(torch.randn(64, D))  # loads the kernels
    read_chunks = FileRows.chunks

    def chunks(rows: FileRows) -> Iterator[Tensor]:
        if state == "dropped":
            drop(path)
        return read_chunks(rows)

    with patch.object(FileRows, "chunks", chunks):
        before, started = _bytes_read(), time.perf_counter()
        kmeans = fit(path, "euclidean")
        whole = time.perf_counter() - started, _bytes_read() - before
    iteration = statistics.median(entry["seconds"] for entry in kmeans.history_)
    return {"k-means": whole, "k-means, an iteration": (iteration, path.stat().st_size)}


def _bytes_read() -> int:
    """Bytes that system calls of this process have read, from the page cache or from disk."""
    return int(Path("/proc/self/io").read_text().split()[1])


def time_dd(path: Path, state: str) -> Timed:
    if state == "dropped":
        drop(path)
    started = time.perf_counter()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M", "status=none"], check=True)
    return {"dd": (time.perf_counter() - started, path.stat().st_size)}


def peak_of_fit(path: Path, metric: str) -> int:
    KMeans(2, max_iter=1, metric=metric).fit(torch.randn(64, D))  # loads the kernels
    return peak_of(lambda: fit(path, metric))


def measure(path: Path, turns: int) -> list[Row]:
    """Rows of each contender in both states, and of the two peaks, without the conditions."""
    results: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for _ in range(turns):
        time_dd(path, "cached")  # into the page cache
        for state in ("cached", "dropped"):
            for measured in (time_fit, time_dd):
                for name, value in in_fresh_process(measured, path, state).items():
                    results.setdefault((name, state), []).append(value)
    rows: list[Row] = []
    for (name, state), values in results.items():
        spread = quantiles(seconds for seconds, _ in values)
        rows.append({"contender": name, "state": state, "bytes": values[0][1], **spread})
        rate = values[0][1] / spread["p50"] / 1e9
        print(f"{name:<22} {state:<8} {spread['p50']:>7.2f} s  {rate:>6.2f} GB/s", flush=True)
    for metric in METRICS:
        peak = in_fresh_process(peak_of_fit, path, metric)
        rows.append({"contender": "k-means", "metric": metric, "peak_bytes": peak})
        print(f"k-means, {metric}: {peak / 2**20:.0f} MiB above the start", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the file (default: 4)")
    parser.add_argument("--turns", type=int, default=5, help="turns of the contenders (default: 5)")
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="of the file (default: runs)")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="another CSV")
    options = parser.parse_args()
    n = int(options.gigabytes * 1e9) // (4 * D)
    fixed = {
        "n": n, "d": D, "k": CLUSTERS, "iterations": ITERATIONS, "threads": torch.get_num_threads(),
        **conditions(torch.device("cpu")),
    }  # fmt: skip
    options.directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.directory) as directory:  # removed after an error, too
        path = Path(directory) / "features.npy"
        write_file(path, n)
        rows = measure(path, options.turns)
    write_rows(options.csv, COLUMNS, [{"metric": "euclidean", **row, **fixed} for row in rows])


if __name__ == "__main__":
    main()
