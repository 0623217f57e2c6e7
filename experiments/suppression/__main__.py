"""Trains, probes and reports: `python -m experiments.suppression DATA METHOD ...`.

    python -m experiments.suppression randbits-8 simclr mcl+simclr        two methods, three seeds each
    python -m experiments.suppression randbits-8 sweep                    K, stages, clusters per batch, layer, start
    python -m experiments.suppression trifeature-64 mcl+ifm --clusters 32 another K
    python -m experiments.suppression                                     all runs of the report: 13 hours on one thread
    python -m experiments.suppression --report                            only the report, from results.csv

A run that has a row in results.csv is not repeated. With --details a run is repeated unless its loss curves, sizes of
clusters and nearest neighbours are in runs/suppression too; it replaces its row. To train a run again, delete its
folder in runs/suppression and use --details.

The same command resumes an interrupted run. Runs that failed are listed at the end, and the exit status is then 1. Raw
data are read from runs/data; for missing data the message has the command that gets them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.conditions import IMAGES
from experiments.suppression.groups import group_results
from experiments.suppression.methods import METHODS
from experiments.suppression.page import write_page
from experiments.suppression.plots import probe_figure
from experiments.suppression.results import read_results
from experiments.suppression.runs import run, start_process, unfinished
from experiments.suppression.settings import DEFAULTS, LAYERS, REGIMES, STARTS, RunSettings
from experiments.suppression.suite import SEEDS, SUITE, runs_of
from experiments.suppression.tables import probe_table

RESULTS = Path(__file__).with_name("results.csv")
METHOD_FORMS = f"{', '.join(METHODS)}, alone or after {', '.join(f'{regime}+' for regime in REGIMES)}, or sweep"
CHANGEABLE = (
    "samples", "epochs", "stages", "clusters", "clusters_per_batch", "batch_size", "temperature", "layer", "start",
)  # fmt: skip


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1: got {options.jobs}")
    try:
        wanted = [] if options.report else _wanted(options)
    except ValueError as error:
        parser.error(str(error))
    try:
        remaining = unfinished(wanted, options.results, options.directory, details=options.details)
        print(f"{len(wanted)} runs, {len(wanted) - len(remaining)} finished already", flush=True)
        failed = _run_all(remaining, options)
        for name, reason in failed.items():
            print(f"failed: {name}: {reason}", file=sys.stderr)
        _report(options)
    except (OSError, ValueError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def _report(options: argparse.Namespace) -> None:
    groups = group_results(read_results(options.results))
    if not groups:
        raise ValueError(f"{options.results} holds no finished run")
    print(probe_table(groups), end="")
    if options.results == RESULTS:
        probe_figure(groups, IMAGES / "suppression.png")
    print(f"report: {write_page(groups, options.output, options.directory)}")


def _wanted(options: argparse.Namespace) -> list[RunSettings]:
    """Settings of the runs that the options name, each once."""
    changes = {name: getattr(options, name) for name in CHANGEABLE if getattr(options, name) is not None}
    chosen = [(options.data, tuple(options.methods))] if options.data else SUITE
    seeds = tuple(options.seeds)
    wanted = [settings for data, methods in chosen for settings in runs_of(data, methods, seeds, **changes)]
    for settings in wanted:
        if settings.objective not in METHODS:
            raise ValueError(f"METHOD must be one of {METHOD_FORMS}: got {settings.method!r}")
    return list(dict.fromkeys(wanted))


def _run_all(remaining: Sequence[RunSettings], options: argparse.Namespace) -> dict[str, str]:
    """Runs in processes of one thread each; returns the reason of each failure."""
    failed = {}
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawning, initializer=start_process) as pool:
        submitted = {pool.submit(run, settings, options.results, options.directory): settings for settings in remaining}
        try:
            for future in as_completed(submitted):
                settings = submitted[future]
                name = f"{settings.data} {settings.name} seed {settings.seed}"
                if error := future.exception():
                    failed[name] = f"{type(error).__name__}: {error}"
                print(f"{name}: {'failed' if error else 'done'}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.suppression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    data = f"{', '.join(DEFAULTS)}; append the number of bits to randbits and the width in pixels to trifeature"
    add("data", nargs="?", metavar="DATA", help=data)
    add("methods", nargs="*", metavar="METHOD", default=["simclr", "mcl+simclr"], help=METHOD_FORMS)
    add("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED", help="one run for each (default: 0 1 2)")
    for name in ("samples", "epochs", "stages", "clusters", "clusters-per-batch", "batch-size"):
        add(f"--{name}", type=int, help="instead of the default of the data")
    add("--temperature", type=float, help="instead of the default of 0.2")
    add("--layer", choices=LAYERS, help="features that are clustered")
    add("--start", choices=STARTS, help="initial weights of a stage")
    add("--details", action="store_true", help="also train finished runs whose details are not in the directory")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each in one thread")
    add("--report", action="store_true", help="only the report")
    add("--results", type=Path, default=RESULTS, help="CSV of all finished runs")
    add("--directory", type=Path, default=Path("runs"), help="raw data, caches, trained stages and details")
    add("--output", type=Path, default=Path("runs") / "suppression.html", help="the report")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
