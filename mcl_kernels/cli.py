"""The command line: `mcl-kernels demo`, `mcl-kernels cluster` and `mcl-kernels info`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import mcl_kernels
from mcl_kernels import cluster
from mcl_kernels._cuda import no_device
from mcl_kernels.kmeans.api import IMPLS, METRICS

if TYPE_CHECKING:
    from mcl_kernels.demo import Row

DEMO_GOES_ON = "the same command goes on from the last finished stage"
OPTIONAL_PACKAGES = ("triton", "faiss-cpu", "safetensors", "scikit-learn", "matplotlib", "rich", "jinja2", "mlxtend")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "info":
            info()
        elif options.command == "cluster":
            chosen = {field.name: getattr(options, field.name) for field in fields(cluster.Options)}
            cluster.run(cluster.Options(**chosen), partial(print, flush=True))
        else:
            demo(options)
    except ModuleNotFoundError as error:
        print(f"mcl-kernels: {error}; the demo needs: pip install 'mcl-kernels[demo]'", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"mcl-kernels: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        left = f"{options.out} is as it was" if options.command == "cluster" else DEMO_GOES_ON
        print(f"\nmcl-kernels: interrupted; {left}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mcl-kernels", description="Fast, exact contrastive learning with clusters.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what can compute here, versions and devices")
    demo = commands.add_parser(
        "demo",
        help="watch MCL recover digits that SimCLR suppresses (5,000 MNIST images, a few minutes on 2 cores)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--bits", type=int, default=8, help="constant random channels beside each image")
    demo.add_argument("--stages", type=int, default=3, help="stages, the first of which is SimCLR")
    demo.add_argument("--clusters", type=int, default=16, help="clusters of each stage")
    demo.add_argument("--epochs", type=int, default=None, help="epochs of each stage (30; with --quick 2)")
    demo.add_argument("--seed", type=int, default=0, help="of codes, networks, augmentation and clusterings")
    demo.add_argument("--output", type=Path, help="directory of stages and report (runs/demo, runs/demo-quick, ...)")
    demo.add_argument("--quick", action="store_true", help="1,000 images, 2 epochs: the path, not the result")
    _add_cluster(commands)
    return parser


def _add_cluster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = cluster.Options
    command = commands.add_parser(
        "cluster",
        help="k-means of a file of features, of any size, into a file of pseudo labels",
        description="Clusters features, composes the clusters with the labels of the earlier stages into dense pseudo "
        "labels, and writes these with a summary beside them (LABELS.json). One command in the place of the "
        "clustering script of the paper's CLIP code, whose --MCL-label-path reads a .pt file of these; that script "
        "loses all stages but the last when it accumulates them, this keeps every one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("features", type=Path, metavar="FEATURES", help=".npy or .safetensors, read in chunks, or .pt, mapped")
    add("--clusters", type=int, required=True, metavar="K", help="clusters of this stage")
    add("--out", type=Path, required=True, metavar="LABELS", help="pseudo labels to write: .npy (int32), .pt (int64)")
    add("--previous", type=Path, nargs="+", default=(), metavar="LABELS", help="of the earlier stages, in order: the "
        "cluster ids of each, or what this command wrote after the last one")  # fmt: skip
    add("--tensor", metavar="NAME", help="of the features in a file of several tensors")
    add("--metric", choices=METRICS, default=defaults.metric, help="cosine needs no normalised features")
    add("--seed", type=int, default=defaults.seed, help="of the initialisation")
    add("--n-init", type=int, default=defaults.n_init, help="restarts, of which the best is kept")
    add("--max-iter", type=int, default=defaults.max_iter, help="iterations of a restart")
    add("--tol", type=float, default=defaults.tol, help="stop when the centres move less, as in scikit-learn")
    add("--batch-size", type=int, help="rows of a mini-batch; without it, every iteration sees all rows")
    add("--impl", choices=IMPLS, default=defaults.impl, help="what computes")


def info() -> None:
    """Prints capabilities, versions and devices."""
    print(f"mcl_kernels {mcl_kernels.__version__}, python {platform.python_version()}, torch {torch.__version__}")
    print(f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    if missing := no_device():
        print(f"cuda: {missing}")
    for name, entry in mcl_kernels.capabilities().items():
        available = "yes" if entry["available"] else "no"
        print(f"impl {name:<10} {available:<4} {entry['reason']}")
    for package in OPTIONAL_PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<15} {version}")


def demo(options: argparse.Namespace) -> None:
    """Trains, prints the table as it goes and writes the report."""
    from mcl_kernels.demo import Settings, run
    from mcl_kernels.report import write_report

    usual = 2 if options.quick else Settings.epochs
    epochs = usual if options.epochs is None else options.epochs
    settings = Settings(
        bits=options.bits, stages=options.stages, clusters=options.clusters, epochs=epochs, seed=options.seed,
        samples=1000 if options.quick else Settings.samples,
    )  # fmt: skip
    # A directory holds one run: the quick one and other seeds get their own.
    name = "demo" + ("-quick" if options.quick else "") + (f"-seed{options.seed}" if options.seed else "")
    output = options.output or Path("runs") / name
    screen = _Screen()
    try:
        results = run(settings, output, screen)
    finally:
        screen.progress.stop()
    path = write_report(results, output / "report.html")
    if options.quick:
        screen.say("A quick run shows the path, not the result: run again without --quick.")
    screen.say(f"chance is 0.10. Report with pictures: {path}")


class _Screen:
    """A progress bar with loss and remaining time while something is trained; the table, row by row."""

    COLUMNS = "{:<26} {:>6} {:>6} {:>14} {:>7} {:>8}"

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.say(self.COLUMNS.format("", "digit", "bit", "AMI with", "pseudo", ""))
        self.say(self.COLUMNS.format("trained", "probe", "probe", "earlier stages", "labels", "seconds"))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def start(self, name: str, steps: int) -> None:
        self.task = self.progress.add_task(name, total=steps, loss=float("nan"))
        self.progress.start()

    def step(self, loss: float) -> None:
        self.progress.update(self.task, advance=1, loss=loss)
        if self.progress.finished:
            self.progress.stop()
            self.progress.remove_task(self.task)

    def row(self, row: Row) -> None:
        bit = "" if row.bit_probe is None else f"{row.bit_probe:.2f}"
        ami = " ".join(f"{value:.2f}" for value in row.ami)
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        labels = str(len(row.label_sizes) or "")
        self.say(self.COLUMNS.format(row.name, f"{row.digit_probe:.2f}", bit, ami, labels, seconds))


if __name__ == "__main__":
    sys.exit(main())
