"""Seconds of whole k-means fits, ours and the peers': `python -m benchmarks.clustering` writes clustering.csv.

A fit is that of one library's own call, from the rows in memory to its centres. All start from the same rows of the
data (mode k-means++: each from its own) and run until they converge at a tolerance of 1e-4, or for a number of
iterations with a tolerance of 0. The contenders' OpenMP runtimes conflict within one process: each fit has its own
process, the contenders take turns, and p20, p50 and p80 are those of the turns. A library that does not test
convergence takes as many iterations as ours. ratio is a contender's time over ours and target the least that it should
be; inertia_ratio is the inertia over the best, in fp64; equal_labels is the share of rows whose nearest centre is the
one that ours finds; read is the share of rows that an iteration reads after the fifth one, and the target of our row
the most that it should be.

With `--device cuda` a GPU clusters 16 times as many rows, against plain PyTorch, into gpu_clustering.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.clustering_contenders import ON_CPU, ON_GPU, OURS, Contender, Fitted, Task
from benchmarks.clustering_data import DIRECTORY, load_rows, start_rows
from benchmarks.clustering_figure import FIGURE_CASE, draw
from benchmarks.conditions import IMAGES, conditions
from benchmarks.measure import Row, in_fresh_process, quantiles, read_rows, write_rows
from mcl_kernels.backends import cuda

HERE = Path(__file__).parent
TOLERANCE, MAX_ITERATIONS = 1e-4, 300
PLUS_PLUS = "k-means++"
MODES = ("converged", "1", "5", "10", "25", PLUS_PLUS)
FIXED = ("converged", "1", "5", "25")  # from given centres
BLOCK = 1 << 27  # elements of a block of distances, about 1 GB in fp64
MAX_BOUND_BYTES = 4 << 30  # more memory than that for bounds leaves a contender out
COLUMNS = (
    "case", "mode", "contender", "n", "d", "k", "iterations", "threads", "p20", "p50", "p80", "ratio", "inertia_ratio",
    "equal_labels", "read", "target", "versions", "processor", "commit",
)  # fmt: skip

Targets = dict[str, dict[str, float]]  # by mode and peer, whatever its algorithm; "" is every peer
PEERS = {"scikit-learn": 3.0, "faiss": 5.0, "scikit-learn-intelex": 1.5}
USUAL: Targets = {"converged": PEERS, "1": {"": 1.2}}
MANY: Targets = {"converged": {"": 1.5}, "1": {"": 1.2}}


class Case(NamedTuple):
    name: str
    data: str
    n: int
    d: int
    k: int
    targets: Targets
    modes: tuple[str, ...] = (*FIXED, PLUS_PLUS)
    read: float | None = None  # target of our row

    def target(self, mode: str, contender: str) -> float | None:
        """Factor by which ours should be faster than a peer; for ours the share of rows that it should read."""
        if contender == OURS.name:
            return self.read if mode == "converged" else None
        if contender.startswith("ours"):
            return None
        targets = self.targets.get(mode, {})
        return targets.get("", targets.get(contender.split(",")[0]))


CASES = (
    Case("mnist-10", "mnist", 60_000, 784, 10, USUAL, read=0.35),
    Case("mnist-100", "mnist", 60_000, 784, 100, USUAL, read=0.5),
    Case("mnist-1000", "mnist", 60_000, 784, 1000, MANY, FIXED),
    Case("wordnet-10", "wordnet", 117_659, 384, 10, USUAL),
    Case("wordnet-100", "wordnet", 117_659, 384, 100, USUAL),
    Case("wordnet-1000", "wordnet", 117_659, 384, 1000, MANY, FIXED),
    Case("wide-10", "rank-16", 100_000, 512, 10, USUAL),
    Case("wide-100", "rank-16", 100_000, 512, 100, USUAL),
    Case("long-10", "rank-16", 1_000_000, 128, 10, USUAL, FIXED),
    Case("long-100", "rank-16", 1_000_000, 128, 100, USUAL, FIXED),
    Case("thousand", "gaussian", 100_000, 512, 1000, {"1": {"": 1.2}, "10": {"": 1.0}}, ("1", "10")),
    Case("ten-thousand", "gaussian", 200_000, 512, 10_000, {"1": {"": 1.2}, "5": {"": 1.0}}, ("1", "5")),
)
GPU_ROWS = 16
GPU_TARGETS: Targets = {"25": {"reference": 1.0}}
GPU_CASES = tuple(
    case._replace(n=GPU_ROWS * case.n, targets=GPU_TARGETS, modes=("converged", "1", "25"))
    for case in CASES
    if case.name in ("wide-10", "wide-100", "long-10", "long-100")
)


class Fit(NamedTuple):
    """One timed fit, and what the yardstick finds if it is asked for."""

    seconds: float
    iterations: int
    read: float | None
    inertia: float | None
    labels: np.ndarray | None  # int32 [N]; a tensor would not outlive its process


def time_fit(
    contender: Contender, case: Case, mode: str, iterations: int, directory: Path, device: str, is_judged: bool
) -> Fit:
    """Times one fit in this process, after a small one that loads the library; loading the data is not timed."""
    x = torch.from_numpy(load_rows(case.data, case.n, case.d, directory)).to(device)
    start = None if mode == PLUS_PLUS else x[torch.from_numpy(start_rows(case.n, case.k))]
    tol = 0.0 if mode.isdigit() else TOLERANCE
    contender.fit(x[: 4 * case.k], Task(case.k, x[: case.k].clone(), 1, 0.0))
    started = _time_after(x)
    fitted = contender.fit(x, Task(case.k, start, iterations, tol))
    seconds = _time_after(x) - started
    inertia, labels = judge(x, fitted) if is_judged else (None, None)
    return Fit(seconds, fitted.iterations, fitted.read, inertia, labels)


def _time_after(x: Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def judge(x: Tensor, fitted: Fitted) -> tuple[float, np.ndarray]:
    """Inertia of the centres and the nearest one of each row, int32 [N], in fp64 by blocks of rows."""
    centers = fitted.centers.to(x.device, torch.float64)
    norms = centers.square().sum(1)
    inertia, labels = 0.0, []
    for block in x.split(max(1, BLOCK // max(centers.shape))):
        rows = block.double()
        nearest = torch.addmm(norms, rows, centers.T, alpha=-2).argmin(1)
        inertia += float((rows - centers[nearest]).square().sum())
        labels.append(nearest.int())
    return inertia, torch.cat(labels).cpu().numpy()


def measure(case: Case, mode: str, contenders: list[Contender], turns: int, directory: Path, device: str) -> list[Row]:
    """Rows of one case and mode, without the conditions."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    first: dict[str, Fit] = {}
    for turn in range(turns):
        for contender in contenders:
            iterations = int(mode) if mode.isdigit() else MAX_ITERATIONS
            if not contender.is_converging:
                iterations = first[OURS.name].iterations
            fit = in_fresh_process(time_fit, contender, case, mode, iterations, directory, device, turn == 0)
            seconds[contender.name].append(fit.seconds)
            first.setdefault(contender.name, fit)
    best = min(fit.inertia or 0.0 for fit in first.values())
    spreads = {name: quantiles(times) for name, times in seconds.items()}
    rows: list[Row] = []
    for name, fit in first.items():
        ratio = "" if name == OURS.name else spreads[name]["p50"] / spreads[OURS.name]["p50"]
        equal = np.mean(fit.labels == first[OURS.name].labels)
        target = case.target(mode, name)
        rows.append(
            {
                "case": case.name, "mode": mode, "contender": name, "n": case.n, "d": case.d, "k": case.k,
                "iterations": fit.iterations, "threads": torch.get_num_threads(), **spreads[name], "ratio": ratio,
                "inertia_ratio": f"{(fit.inertia or 0.0) / best:.6f}",
                "equal_labels": "" if mode == PLUS_PLUS else f"{equal:.6f}",
                "read": "" if fit.read is None else fit.read, "target": "" if target is None else target,
            }
        )  # fmt: skip
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: Row) -> str:
    ratio = f"{row['ratio']:>6.2f}x ours" if row["ratio"] else " " * 11
    target = f", at least {row['target']}" if row["target"] and row["ratio"] else ""
    read = f", reads {row['read']:.2f}" if row["read"] else ""
    return (
        f"{row['case']:<13} {row['mode']:<10} {row['contender']:<21} {1e3 * row['p50']:>9.1f} ms"
        f" {row['iterations']:>4} iterations {ratio}{target}, inertia {row['inertia_ratio']}{read}"
    )


def contenders_of(case: Case, mode: str, device: str) -> tuple[list[Contender], dict[str, str]]:
    """Contenders of a case and mode, and the reason for each one that is left out."""
    chosen, skipped = [], {}
    for contender in ON_GPU if device == "cuda" else ON_CPU:
        reason = contender.missing()
        if contender.name == "own, CUDA C++":
            reason = cuda.unavailable_reason(torch.device("cuda"))
        if contender.bound_bytes * case.n * case.k > MAX_BOUND_BYTES:
            reason = f"its bounds need {contender.bound_bytes * case.n * case.k / 2**30:.0f} GiB"
        if mode == PLUS_PLUS and not contender.draws_centers:
            reason = "has no k-means++"
        if reason:
            skipped[contender.name] = reason
        else:
            chosen.append(contender)
    return chosen, skipped


def save(results: Path, case: str, mode: str, rows: list[Row]) -> None:
    """Replaces the rows of one case and mode, in the order of the cases."""
    order = [known.name for known in CASES]
    kept = [row for row in read_rows(results) if row["case"] in order and (row["case"], row["mode"]) != (case, mode)]
    rows = sorted(kept + rows, key=lambda row: (order.index(row["case"]), MODES.index(row["mode"])))
    write_rows(results, COLUMNS, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"only these of {', '.join(names)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--mode", choices=MODES, action="append", help="only this mode; can be repeated")
    parser.add_argument("--turns", type=int, default=3, help="fits of each contender (default: 3)")
    parser.add_argument("--rows", type=float, default=1.0, help="share of the rows, to try it with another --csv")
    parser.add_argument("--data", type=Path, default=DIRECTORY, help="of the data sets (default: runs/data)")
    parser.add_argument("--csv", type=Path, help="another CSV; the figure is written next to it")
    parser.add_argument("--draw", action="store_true", help="only draw the figure from the CSV")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    gpu = options.device == "cuda"
    results = options.csv or HERE / f"{'gpu_' if gpu else ''}clustering.csv"
    figure = (options.csv.parent if options.csv else IMAGES) / "kmeans_fits.png"
    if options.draw:
        draw(results, figure)
        return 0
    recorded = conditions(torch.device(options.device))
    for contender in () if gpu else ON_CPU:
        if contender.package and not contender.missing() and contender.package not in recorded["versions"].split():
            recorded["versions"] += f"; {contender.package} {version(contender.package)}"
    for case in GPU_CASES if gpu else CASES:
        if options.cases and case.name not in options.cases:
            continue
        case = case._replace(n=max(4 * case.k, int(options.rows * case.n)))
        try:
            load_rows(case.data, case.n, case.d, options.data)
        except FileNotFoundError as error:
            print(f"{case.name} skipped: {error}", flush=True)
            continue
        for mode in (mode for mode in case.modes if mode in (options.mode or MODES)):
            contenders, skipped = contenders_of(case, mode, options.device)
            for name, reason in skipped.items():
                print(f"{case.name:<13} {mode:<10} {name} skipped: {reason}", flush=True)
            rows = measure(case, mode, contenders, options.turns, options.data, options.device)
            save(results, case.name, mode, [{**row, **recorded} for row in rows])
        if case.name == FIGURE_CASE and not gpu:
            draw(results, figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
