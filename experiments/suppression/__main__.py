"""Trains, probes and reports: `python -m experiments.suppression DATA METHOD ...`.

    python -m experiments.suppression randbits-8 simclr mcl+simclr        two methods, three seeds each
    python -m experiments.suppression randbits-8 sweep                    K, stages, clusters per batch, layer, start
    python -m experiments.suppression trifeature-64 mcl+ifm --clusters 32 another K
    python -m experiments.suppression                                     everything in the report: a day on 2 cores
    python -m experiments.suppression --report                            only the report, from the JSONs alone

A finished run is not repeated and an interrupted one goes on; what is trained lies in runs/suppression, and to train a
run again its folder there is deleted, and its JSON. Runs that fail are named in the end, and the exit status
is then 1. Raw data are read from runs/data; what is missing is named with the command that gets it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from experiments.suppression.experiments import EXPERIMENTS, SEEDS, settings_of
from experiments.suppression.figures import readme_figure
from experiments.suppression.methods import METHODS
from experiments.suppression.report import group_runs, read_runs, readme_table, write_report
from experiments.suppression.runs import path_of, run, start_process
from experiments.suppression.settings import DEFAULTS, LAYERS, REGIMES, STARTS, Settings

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1: got {options.jobs}")
    changed = (
        "samples", "epochs", "stages", "clusters", "clusters_per_batch", "batch_size", "temperature", "layer", "start",
    )  # fmt: skip
    changes = {name: getattr(options, name) for name in changed if getattr(options, name) is not None}
    try:
        settings = [] if options.report else _settings(options, changes)
    except ValueError as error:
        parser.error(str(error))
    finished = sum(path_of(each, options.results).exists() for each in settings)
    print(f"{len(settings)} runs, {finished} finished already", flush=True)
    failed = _run_all(settings, options)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    try:
        _report(options)
    except (OSError, ValueError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def _report(options: argparse.Namespace) -> None:
    groups = group_runs(read_runs(options.results))
    if not groups:
        raise ValueError(f"{options.results} holds no finished run")
    print(readme_table(groups))
    if options.results == RESULTS:  # of somebody's own runs the page is enough
        readme_figure(groups, HERE / "suppression.png")
    print(f"report: {write_report(groups, options.output)}")


def _settings(options: argparse.Namespace, changes: dict[str, object]) -> list[Settings]:
    chosen = [(options.data, tuple(options.methods))] if options.data else EXPERIMENTS
    seeds = tuple(options.seeds)
    # Each once, however often it was named.
    settings = list(
        dict.fromkeys(each for data, methods in chosen for each in settings_of(data, methods, seeds, **changes))
    )
    for each in settings:
        if each.objective not in METHODS:
            known = f"{', '.join(METHODS)}, alone or after {', '.join(f'{regime}+' for regime in REGIMES)}, or sweep"
            raise ValueError(f"METHOD must be one of {known}: got {each.method!r}")
    return settings


def _run_all(settings: list[Settings], options: argparse.Namespace) -> dict[str, str]:
    """Runs in processes of one thread each; what failed, with the reason."""
    failed = {}
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawning, initializer=start_process) as pool:
        submitted = {pool.submit(run, each, options.results, options.directory): each for each in settings}
        try:
            for future in as_completed(submitted):
                each = submitted[future]
                name = f"{each.data} {each.name} seed {each.seed}"
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
    add("data", nargs="?", metavar="DATA", help=f"{', '.join(DEFAULTS)}; behind randbits a number of bits, behind "
        "trifeature one of pixels")  # fmt: skip
    methods = f"{', '.join(METHODS)}; alone, or after {', '.join(f'{regime}+' for regime in REGIMES)}; or sweep"
    add("methods", nargs="*", metavar="METHOD", default=["simclr", "mcl+simclr"], help=methods)
    add("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED")
    for name in ("samples", "epochs", "stages", "clusters", "clusters-per-batch", "batch-size"):
        add(f"--{name}", type=int, help="instead of the default of the data")
    add("--temperature", type=float)
    add("--layer", choices=LAYERS, help="what is clustered")
    add("--start", choices=STARTS, help="weights that a stage starts from")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at once, each in one thread")
    add("--report", action="store_true", help="only the report")
    add("--results", type=Path, default=RESULTS, help="of the JSONs")
    add("--directory", type=Path, default=Path("runs"), help="of raw data, caches and unfinished runs")
    add("--output", type=Path, default=Path("runs") / "suppression.html", help="the report")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
