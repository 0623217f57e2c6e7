"""Seconds of a Lloyd iteration, ours and the peers': `python -m benchmarks.clustering` writes clustering.csv.

The time of an iteration is (time of 21 iterations - time of one) / 20, from the same centres. Assignment is timed
separately. The contenders' OpenMP runtimes conflict within one process: each contender has its own process, they take
turns, and p20, p50 and p80 are those of the turns. faiss samples the data by default: here it reads all rows. With
`--device cuda` a GPU clusters 16 times as many rows, with plain PyTorch as a contender, into gpu_clustering.csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.conditions import conditions
from benchmarks.measure import Row, in_fresh_process, quantiles, read_rows, write_rows
from mcl_kernels import KMeans, assign_clusters
from mcl_kernels.backends import cuda

HERE = Path(__file__).parent
TURNS = 5
ITERATIONS = 20
COLUMNS = (
    "case", "contender", "n", "d", "k", "threads", "p20", "p50", "p80", "ratio", "target", "versions",
    "processor", "commit",
)  # fmt: skip


class Case(NamedTuple):
    name: str
    n: int
    d: int
    k: int
    targets: dict[str, float]  # factor by which ours should be faster; 0: no target


CASES = (
    Case("wide", 100_000, 512, 10, {"faiss": 5, "scikit-learn": 2, "faiss, assignment": 4}),
    Case("hundred", 100_000, 128, 100, {"faiss": 1.2, "scikit-learn": 1.2}),
    Case("thousand", 100_000, 128, 1000, {"faiss": 1.0, "scikit-learn": 1.0}),
    Case("long", 1_000_000, 128, 10, {"x.sum()": 0.4}),
)

# On a GPU the contenders are PyTorch by tiles, and reading the rows once.
GPU_ROWS = 16
GPU_TARGETS = {"own, CUDA C++": 0.0, "reference": 1.0, "x.sum()": 0.0}
GPU_CASES = tuple(case._replace(n=GPU_ROWS * case.n, targets=GPU_TARGETS) for case in CASES)


def data(case: Case, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows without clusters, so that no contender converges early, and the initial centres."""
    x = torch.randn(case.n, case.d, generator=torch.Generator().manual_seed(0)).to(device)
    return x, x[: case.k].clone()


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _iteration_seconds(fit: Callable[[int], object]) -> float:
    fit(1)  # warm-up
    one = min(_seconds(lambda: fit(1)) for _ in range(2))
    return (_seconds(lambda: fit(1 + ITERATIONS)) - one) / ITERATIONS


def _median_seconds(function: Callable[[], object]) -> float:
    function()  # warm-up
    return statistics.median(_seconds(function) for _ in range(10))


def ours(case: Case, device: str, impl: str = "auto") -> float:
    x, centers = data(case, device)
    return _iteration_seconds(lambda n: KMeans(case.k, init=centers, max_iter=n, tol=0.0, impl=impl).fit(x))


def reference(case: Case, device: str) -> float:
    return ours(case, device, "reference")


def own_cuda(case: Case, device: str) -> float:
    return ours(case, device, "cuda")


def ours_assignment(case: Case, device: str) -> float:
    x, centers = data(case, device)
    return _median_seconds(lambda: assign_clusters(x, centers))


def faiss(case: Case, device: str) -> float:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    x, centers = (z.numpy() for z in data(case))

    def fit(iterations: int) -> None:
        faiss.Kmeans(case.d, case.k, niter=iterations, max_points_per_centroid=case.n).train(x, init_centroids=centers)

    return _iteration_seconds(fit)


def faiss_assignment(case: Case, device: str) -> float:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    x, centers = (z.numpy() for z in data(case))
    index = faiss.IndexFlatL2(case.d)
    index.add(centers)
    return _median_seconds(lambda: index.search(x, 1))


def scikit_learn(case: Case, device: str) -> float:
    from sklearn import cluster

    x, centers = (z.numpy() for z in data(case))

    def fit(iterations: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ConvergenceWarning
            cluster.KMeans(case.k, init=centers, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(x)

    return _iteration_seconds(fit)


def read_once(case: Case, device: str) -> float:
    x, _ = data(case, device)
    return _median_seconds(lambda: float(x.sum()))  # float waits for the result


CONTENDERS: dict[str, Any] = {
    "ours": ours,
    "own, CUDA C++": own_cuda,
    "reference": reference,
    "ours, assignment": ours_assignment,
    "faiss": faiss,
    "faiss, assignment": faiss_assignment,
    "scikit-learn": scikit_learn,
    "x.sum()": read_once,
}


def measure(contender: str, case: Case, device: str) -> float:
    return CONTENDERS[contender](case, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *(case.name for case in CASES)], metavar="CASE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--csv", type=Path, help="another CSV")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    results = options.csv or HERE / f"{'gpu_' if gpu else ''}clustering.csv"
    recorded = conditions(torch.device(options.device))
    if not gpu:
        recorded["versions"] += "".join(f"; {name} {version(name)}" for name in ("faiss-cpu", "scikit-learn"))
    for case in GPU_CASES if gpu else CASES:
        if options.cases and case.name not in options.cases:
            continue
        names = ["ours", *case.targets]
        if any("assignment" in name for name in names):
            names.insert(1, "ours, assignment")
        if gpu and (reason := cuda.unavailable_reason(torch.device("cuda"))):
            names.remove("own, CUDA C++")
            print(f"own, CUDA C++: {reason}", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(TURNS):
            for name in names:
                seconds[name].append(in_fresh_process(measure, name, case, options.device))
        rows: list[Row] = []
        spreads = {name: quantiles(times) for name, times in seconds.items()}
        for name, spread in spreads.items():
            own = "ours, assignment" if "assignment" in name else "ours"
            ratio = "" if name == own else spread["p50"] / spreads[own]["p50"]
            print(
                f"{case.name:<9} {name:<18} {1e3 * spread['p50']:>8.1f} ms"
                + (f"  {ratio:.2f}x ours" if ratio else "")
                + (f", at least {case.targets[name]}" if case.targets.get(name) else ""),
                flush=True,
            )
            rows.append(
                {
                    "case": case.name, "contender": name, "n": case.n, "d": case.d, "k": case.k,
                    "threads": torch.get_num_threads(), **spread,
                    "ratio": ratio, "target": case.targets.get(name) or "", **recorded,
                }
            )  # fmt: skip
        save(results, case.name, rows)


def save(results: Path, case: str, rows: list[Row]) -> None:
    """Replaces the rows of one case, in the order of the cases."""
    order = [known.name for known in CASES]
    kept = [row for row in read_rows(results) if row["case"] != case]
    write_rows(results, COLUMNS, sorted(kept + rows, key=lambda row: order.index(row["case"])))


if __name__ == "__main__":
    main()
