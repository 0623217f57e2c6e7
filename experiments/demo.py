"""Seeds of the demo: `python -m experiments.demo` runs it for seeds 0, 1 and 2 and writes demo.csv.

A row is a trained encoder, or the concatenation of all stages: its probes, the pseudo labels of its training, and the
seconds of its training and evaluation. Each seed has the directory that `mcl-kernels demo --seed` has, so that an
interrupted run resumes, and a finished one is not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.conditions import conditions
from benchmarks.measure import Row, read_rows, write_rows
from mcl_kernels.cli.demo import run
from mcl_kernels.cli.demo_display import TerminalDisplay
from mcl_kernels.cli.demo_results import Settings

RESULTS = Path(__file__).with_name("demo.csv")
COLUMNS = (
    "seed", "name", "digit_probe", "bit_probe", "pseudo_labels", "seconds", "samples", "epochs", "bits", "clusters",
    "threads", "versions", "processor", "commit",
)  # fmt: skip


def run_seed(settings: Settings, directory: Path) -> list[Row]:
    """Trains one seed, or reads what is finished; returns its rows."""
    display = TerminalDisplay()
    try:
        name = f"demo-seed{settings.seed}" if settings.seed else "demo"
        results = run(settings, directory / name, display)
    finally:
        display.stop()
    fixed = {
        "samples": settings.samples, "epochs": settings.epochs, "bits": settings.bits, "clusters": settings.clusters,
        "threads": torch.get_num_threads(), **conditions(torch.device("cpu")),
    }  # fmt: skip
    return [
        {
            "seed": settings.seed, "name": row.name, "digit_probe": row.digit_probe, "bit_probe": row.bit_probe,
            "pseudo_labels": len(row.label_sizes) or "", "seconds": row.seconds, **fixed,
        }
        for row in (results.ceiling, *results.stages, results.concatenated)
    ]  # fmt: skip


def save(path: Path, seed: int, rows: list[Row]) -> None:
    """Replaces the rows of one seed, in the order of the seeds."""
    kept = [row for row in read_rows(path) if int(row["seed"]) != seed]
    write_rows(path, COLUMNS, sorted(kept + rows, key=lambda row: int(row["seed"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="(default: 0 1 2)")
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="of the runs (default: runs)")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="another CSV")
    options = parser.parse_args()
    for seed in options.seeds:
        print(f"seed {seed}", flush=True)
        save(options.csv, seed, run_seed(Settings(seed=seed), options.directory))


if __name__ == "__main__":
    main()
