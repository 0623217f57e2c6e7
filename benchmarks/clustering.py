"""Seconds of a Lloyd iteration, ours and the peers': `python -m benchmarks.clustering`, into clustering.csv.

An iteration is a twentieth of what 21 iterations take more than one, from the same centres; assignment is timed by
itself. Contenders have different OpenMP runtimes, which do not get along in one process: each is measured in its own,
in turns, and the median of the turns counts. faiss samples the data unless told not to: here it may not. With `--device
cuda` 16 times the rows on a GPU, beside what PyTorch alone does there, into gpu_clustering.csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.__main__ import conditions
from benchmarks.measure import in_fresh_process, write_rows
from mcl_kernels.backends import cuda

HERE = Path(__file__).parent
TURNS = 5
ITERATIONS = 20
COLUMNS = (
    "case", "contender", "n", "d", "k", "threads", "p50", "ratio", "target", "versions", "processor", "commit",
)  # fmt: skip


class Case(NamedTuple):
    name: str
    n: int
    d: int
    k: int
    targets: dict[str, float]  # how many times faster ours should be; 0: to compare with


CASES = (
    Case("wide", 100_000, 512, 10, {"faiss": 5, "scikit-learn": 2, "faiss, assignment": 4}),
    Case("hundred", 100_000, 128, 100, {"faiss": 1.2, "scikit-learn": 1.2}),
    Case("thousand", 100_000, 128, 1000, {"faiss": 1.0, "scikit-learn": 1.0}),
    Case("long", 1_000_000, 128, 10, {"x.sum()": 0.4}),
)


# The kernels against PyTorch by tiles, and against reading the rows once.
GPU_ROWS = 16
GPU_TARGETS = {"own, CUDA C++": 0.0, "reference": 1.0, "x.sum()": 0.0}
GPU_CASES = tuple(case._replace(n=GPU_ROWS * case.n, targets=GPU_TARGETS) for case in CASES)


def data(case: Case, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that no number of iterations clusters well, so that none converges early; and the first centres."""
    x = torch.randn(case.n, case.d, generator=torch.Generator().manual_seed(0)).to(device)
    return x, x[: case.k].clone()


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _of_an_iteration(fit: Callable[[int], object]) -> float:
    fit(1)
    one = min(_seconds(lambda: fit(1)) for _ in range(2))
    return (_seconds(lambda: fit(1 + ITERATIONS)) - one) / ITERATIONS


def _repeated(function: Callable[[], object]) -> float:
    function()
    return statistics.median(_seconds(function) for _ in range(10))


def ours(case: Case, device: str, impl: str = "auto") -> float:
    from mcl_kernels import KMeans

    x, centers = data(case, device)
    return _of_an_iteration(lambda n: KMeans(case.k, init=centers, max_iter=n, tol=0.0, impl=impl).fit(x))


def reference(case: Case, device: str) -> float:
    return ours(case, device, "reference")


def own_cuda(case: Case, device: str) -> float:
    return ours(case, device, "cuda")


def ours_assignment(case: Case, device: str) -> float:
    from mcl_kernels import assign_clusters

    x, centers = data(case, device)
    return _repeated(lambda: assign_clusters(x, centers))


def faiss(case: Case, device: str) -> float:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    x, centers = (z.numpy() for z in data(case))

    def fit(iterations: int) -> None:
        faiss.Kmeans(case.d, case.k, niter=iterations, max_points_per_centroid=case.n).train(x, init_centroids=centers)

    return _of_an_iteration(fit)


def faiss_assignment(case: Case, device: str) -> float:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    x, centers = (z.numpy() for z in data(case))
    index = faiss.IndexFlatL2(case.d)
    index.add(centers)
    return _repeated(lambda: index.search(x, 1))


def scikit_learn(case: Case, device: str) -> float:
    from sklearn.cluster import KMeans

    x, centers = (z.numpy() for z in data(case))

    def fit(iterations: int) -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            KMeans(case.k, init=np.asarray(centers), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(x)

    return _of_an_iteration(fit)


def read_once(case: Case, device: str) -> float:
    x, _ = data(case, device)
    return _repeated(lambda: float(x.sum()))  # waits for it


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
    rows = []
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
        medians = {name: statistics.median(of) for name, of in seconds.items()}
        for name, median in medians.items():
            own = "ours, assignment" if "assignment" in name else "ours"
            ratio = "" if name == own else median / medians[own]
            print(
                f"{case.name:<9} {name:<18} {1e3 * median:>8.1f} ms"
                + (f"  {ratio:.2f}x ours" if ratio else "")
                + (f", at least {case.targets[name]}" if case.targets.get(name) else ""),
                flush=True,
            )
            rows.append(
                {
                    "case": case.name, "contender": name, "n": case.n, "d": case.d, "k": case.k,
                    "threads": torch.get_num_threads(), "p50": median,
                    "ratio": ratio, "target": case.targets.get(name) or "", **recorded,
                }
            )  # fmt: skip
    write_rows(results, COLUMNS, rows)


if __name__ == "__main__":
    main()
