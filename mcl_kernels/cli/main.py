"""The command line: `mcl-kernels cluster`, `assign`, `demo` and `info`, also as `python -m mcl_kernels`."""

from __future__ import annotations

import argparse
import errno
import platform
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

import mcl_kernels
from mcl_kernels.backends.cuda import no_device
from mcl_kernels.backends.table import impls
from mcl_kernels.cli import assign, cluster
from mcl_kernels.cli.console import Terminated, logged_progress, one_line, raising_terminated, safe_streams
from mcl_kernels.cli.label_files import identity
from mcl_kernels.kmeans.api import METRICS

DEMO_GOES_ON = "the same command goes on from the last finished stage"
OPTIONAL_PACKAGES = ("triton", "faiss-cpu", "safetensors", "scikit-learn", "matplotlib", "rich", "jinja2", "mlxtend")
SIGPIPE = 13  # Windows has no such signal


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 1 after an error, 128 + the signal where one ended it."""
    with safe_streams() as out:
        options = None
        try:
            options = _parser().parse_args(arguments)
            status = _run(options)
        except SystemExit as ended:  # by argparse: 0 after --help and --version, 2 where the arguments are no command
            status = int(ended.code or 0)
        out.flush()
        if out.error is None or status or (options is not None and options.command != "info"):
            return status  # the work of the other commands is in files
        if out.error.errno == errno.EPIPE:
            return 128 + SIGPIPE
        return _fail(f"standard output cannot be written: {out.error.strerror}")


def _run(options: argparse.Namespace) -> int:
    out: Path | None = getattr(options, "out", None)
    before = out and identity(out)
    try:
        with raising_terminated(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if options.command == "info":
                info()
            elif options.command == "demo":
                demo(options)
            else:
                _run_on_files(options)
    except ModuleNotFoundError as error:
        needed = "; the demo needs: pip install 'mcl-kernels[demo]'" if options.command == "demo" else ""
        return _fail(f"{error}{needed}")
    except MemoryError as error:
        return _fail(f"out of memory: {error}" if str(error) else "out of memory")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        # PyTorch appends a stack to its own.
        why = str(error).partition("\n")[0] if isinstance(error, RuntimeError) else str(error)
        return _fail(why if out is None or identity(out) == before else f"{why}; {_replaced(out)}")
    except KeyboardInterrupt as error:
        left = DEMO_GOES_ON
        if out is not None:
            left = f"{out} is as it was" if identity(out) == before else _replaced(out)
        _fail(f"interrupted; {left}")
        return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)
    return 0


def _run_on_files(options: argparse.Namespace) -> None:
    """Runs a command whose settings are all in its options."""
    module = {"cluster": cluster, "assign": assign}[options.command]
    chosen = {field.name: getattr(options, field.name) for field in fields(module.Options)}
    with logged_progress():
        module.run(module.Options(**chosen), partial(print, flush=True))


def _replaced(out: Path) -> str:
    return f"{out} was replaced before that, and what lies next to it may not be: run the command again"


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"mcl-kernels: warning: {one_line(message)}", file=sys.stderr)


def _fail(why: str) -> int:
    print(f"mcl-kernels: {one_line(why)}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mcl-kernels", description="Fast, exact contrastive learning with clusters.")
    parser.add_argument("--version", action="version", version=f"mcl-kernels {mcl_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what can compute here, versions and devices")
    demo = commands.add_parser(
        "demo",
        help="watch MCL recover digits that SimCLR suppresses (5,000 MNIST images, a few minutes on 2 cores)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--bits", type=int, default=8, help="constant random channels next to each image")
    demo.add_argument("--stages", type=int, default=3, help="stages, the first of which is SimCLR")
    demo.add_argument("--clusters", type=int, default=16, help="clusters of each stage")
    demo.add_argument("--epochs", type=int, default=None, help="epochs of each stage (30; with --quick 2)")
    demo.add_argument("--seed", type=int, default=0, help="of codes, networks, augmentation and clusterings")
    demo.add_argument("--output", type=Path, help="directory of stages and report (runs/demo, runs/demo-quick, ...)")
    demo.add_argument("--quick", action="store_true", help="1,000 images, 2 epochs: the path, not the result")
    _add_cluster(commands)
    _add_assign(commands)
    return parser


def _add_cluster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = cluster.Options
    command = commands.add_parser(
        "cluster",
        help="k-means of a file of features, of any size, into a file of pseudo labels",
        description="Clusters features, composes the clusters with the labels of the earlier stages into dense pseudo "
        "labels, and writes these with a summary next to them (LABELS.json). One command in the place of the "
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
    add("--impl", choices=impls("kmeans"), default=defaults.impl, help="what computes")
    add("--centers", type=Path, metavar="CENTERS", help="file of the centres to write, .safetensors, for `assign`")


def _add_assign(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "assign",
        help="the nearest centres, which `cluster` saved, of a file of new features",
        description="Finds the nearest centre of each row, and writes the cluster ids with a summary next to them "
        "(LABELS.json). The features that were clustered get the labels that `cluster` wrote without --previous.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("features", type=Path, metavar="FEATURES", help=".npy or .safetensors, read in chunks, or .pt, mapped")
    add("--centers", type=Path, required=True, metavar="CENTERS", help="written by cluster --centers or KMeans.save")
    add("--out", type=Path, required=True, metavar="LABELS", help="cluster ids to write: .npy (int32), .pt (int64)")
    add("--tensor", metavar="NAME", help="of the features in a file of several tensors")
    add("--impl", choices=impls("kmeans"), default=assign.Options.impl, help="what computes")


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
    from mcl_kernels.cli.demo import Settings, run
    from mcl_kernels.cli.report import write_report
    from mcl_kernels.cli.screen import Screen

    usual = 2 if options.quick else Settings.epochs
    epochs = usual if options.epochs is None else options.epochs
    settings = Settings(
        bits=options.bits, stages=options.stages, clusters=options.clusters, epochs=epochs, seed=options.seed,
        samples=1000 if options.quick else Settings.samples,
    )  # fmt: skip
    # A directory holds one run: the quick one and other seeds get their own.
    name = "demo" + ("-quick" if options.quick else "") + (f"-seed{options.seed}" if options.seed else "")
    output = options.output or Path("runs") / name
    screen = Screen()
    try:
        results = run(settings, output, screen)
    finally:
        screen.progress.stop()
    path = write_report(results, output / "report.html")
    if options.quick:
        screen.say("A quick run shows the path, not the result: run again without --quick.")
    screen.say(f"chance is 0.10. Report with pictures: {path}")
