"""Measures the named cases and draws the figure of batch sizes: `python -m benchmarks [CASE ...]`.

Rows are written to results.csv, where those of other cases stay. p20, p50 and p80 are seconds of forward and backward.
ratio is a peer's p50 over ours, fraction_of_limit is (minimal operations / rate of a large product) / p50; all are from
one process in which the contenders took turns. peak_bytes is memory above the inputs, measured in a process for each
contender. With `--device cuda` rows are written to gpu_results.csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.cases import CASES, Case
from benchmarks.conditions import IMAGES, conditions
from benchmarks.figure import draw
from benchmarks.measure import Row, in_fresh_process, measure_once, measure_peak, read_rows, time_case, write_rows
from mcl_kernels.backends.table import resolve

HERE = Path(__file__).parent
COLUMNS = (
    "case", "peer", "impl", "n", "d", "clusters", "dtype", "threads", "p20", "p50", "p80", "peak_bytes",
    "fraction_of_limit", "ratio", "versions", "processor", "commit",
)  # fmt: skip


def run(case: Case, sizes: tuple[int, ...], device: torch.device) -> list[Row]:
    """Returns the rows of a case at these sizes; without sizes at the largest that fits the memory of its peer."""
    rows: list[Row] = []
    for n in sizes or (_largest(case, device),):
        if case.once:
            measured = [in_fresh_process(measure_once, case.name, n, device)]
        else:
            measured, skipped = in_fresh_process(time_case, case.name, n, device)
            for peer, reason in skipped.items():
                print(f"{case.name:<22} {peer} skipped: {reason}", flush=True)
        for row in measured:
            if not case.once:
                row["peak_bytes"] = in_fresh_process(measure_peak, case.name, n, device, row["peer"])
            print(_line(row), flush=True)
        rows += measured
    return rows


def _largest(case: Case, device: torch.device) -> int:
    """Largest power of two that fits the memory cap of the case."""
    n, peer = 64, case.peers[0]
    while not peer.missing() and in_fresh_process(measure_peak, case.name, 2 * n, device, peer.name, case.cap_bytes):
        n *= 2
    return n


def _line(row: Row) -> str:
    fraction, ratio = row["fraction_of_limit"], row.get("ratio")
    return (
        f"{row['case']:<22} {row['peer']:<26} N {row['n']:>9,}  {1e3 * row['p50']:>10.2f} ms"
        f"  {row['peak_bytes'] / 2**20:>8.1f} MiB"
        + (f"  {fraction:>6.1%} of the limit" if fraction else " " * 21)
        + (f"  {ratio:.2f}x ours" if ratio else "")
    )


def save(results: Path, case: Case, rows: list[Row]) -> None:
    """Replaces the rows of one case, in the order of the cases."""
    order = [known.name for known in CASES]
    kept = [row for row in read_rows(results) if row["case"] != case.name and row["case"] in order]
    rows = sorted(kept + rows, key=lambda row: order.index(row["case"]))
    write_rows(results, COLUMNS, rows)


def main() -> int:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only these (default: all)")
    parser.add_argument("--list", action="store_true", help="print each case with its reason and target")
    parser.add_argument("--draw", action="store_true", help="only draw the figure from the CSV")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--csv", type=Path, help="another CSV; the figure is written next to it")
    parser.add_argument("--n", type=int, help="every case at this N, to try the suite with another --csv")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if options.list:
        for case in CASES:
            print(f"{case.name:<22} {case.reason} [{case.target}]")
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    gpu = "gpu_" if device.type == "cuda" else ""
    results = options.csv or HERE / f"{gpu}results.csv"
    failed: list[str] = []
    chosen = [c for c in CASES if c.name in (options.cases or names) and c.runs_on(device) and not options.draw]
    if without := set(options.cases) - {case.name for case in chosen} if not options.draw else set():
        parser.error(f"not on {device}: {', '.join(sorted(without))}")
    recorded = conditions(device)
    if chosen:
        impl = resolve("logsumexp", "auto", device)  # builds the library before processes start
        print(f"impl='auto' is {impl!r}", flush=True)
    for case in chosen:
        try:
            rows = run(case, (options.n,) if options.n else case.sizes_on(device), device)
        except RuntimeError as error:  # the other cases are still measured
            print(f"{case.name:<22} FAILED: {error}", flush=True)
            failed.append(case.name)
            continue
        save(results, case, [{**row, **recorded} for row in rows])
    if options.draw or "batch-size" in {case.name for case in chosen} - set(failed):
        draw(results, (options.csv.parent if options.csv else IMAGES) / f"{gpu}batch_size.png")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
