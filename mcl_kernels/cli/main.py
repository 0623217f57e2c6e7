"""The command `mcl-kernels`: parses the arguments of its subcommands, runs one, and returns the exit status."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import mcl_kernels
from mcl_kernels.backends.table import IMPLS
from mcl_kernels.cli import assign, cluster, info
from mcl_kernels.cli.output_files import identity
from mcl_kernels.cli.progress import logged_progress
from mcl_kernels.cli.signals import Terminated, raising_terminated
from mcl_kernels.cli.streams import one_line, safe_streams
from mcl_kernels.kmeans.assign import METRICS

DEMO_RESUMES = "the same command resumes after the last finished stage"
FEATURES_HELP = "features, [rows, width]: .npy or .safetensors, read in chunks, or .pt, mapped"
SIGPIPE = 13  # not defined by `signal` on Windows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 1 after an error, 128 + the number of a signal that ended it."""
    with safe_streams() as out:
        options = None
        try:
            options = _parser().parse_args(arguments)
            status = _run(options)
        except SystemExit as ended:  # raised by argparse: 0 after --help and --version, 2 for invalid arguments
            status = int(ended.code or 0)
        out.flush()
        writes_files = options is not None and options.command != "info"
        if out.error is None or status or writes_files:  # files are complete even if nothing could be printed
            return status
        if out.error.errno == errno.EPIPE:
            return 128 + SIGPIPE
        return _fail(f"standard output cannot be written: {out.error.strerror}")


def _run(options: argparse.Namespace) -> int:
    """Runs a command; returns its exit status, after errors are printed as one line."""
    out: Path | None = getattr(options, "out", None)
    before = out and identity(out)
    try:
        with raising_terminated(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if options.command == "info":
                info.run()
            elif options.command == "demo":
                _run_demo(options)
            else:
                _run_file_command(options)
    except ModuleNotFoundError as error:
        needed = "; the demo needs: pip install 'mcl-kernels[demo]'" if options.command == "demo" else ""
        return _fail(f"{error}{needed}")
    except MemoryError as error:
        return _fail(f"out of memory: {error}" if str(error) else "out of memory")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        # PyTorch appends the C++ stack to its errors.
        reason = str(error).partition("\n")[0] if isinstance(error, RuntimeError) else str(error)
        return _fail(reason if out is None or identity(out) == before else f"{reason}; {_replaced(out)}")
    except KeyboardInterrupt as error:
        outcome = DEMO_RESUMES
        if out is not None:
            outcome = f"{out} is unchanged" if identity(out) == before else _replaced(out)
        _fail(f"interrupted; {outcome}")
        return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)
    return 0


def _run_file_command(options: argparse.Namespace) -> None:
    """Runs `cluster` or `assign`, which read features from a file and write labels to another."""
    module = {"cluster": cluster, "assign": assign}[options.command]
    settings = {field.name: getattr(options, field.name) for field in fields(module.Options)}
    with logged_progress():
        module.run(module.Options(**settings), partial(print, flush=True))


def _run_demo(options: argparse.Namespace) -> None:
    """Trains, prints the table as it goes and writes the report."""
    from mcl_kernels.cli.demo import run
    from mcl_kernels.cli.demo_display import TerminalDisplay
    from mcl_kernels.cli.demo_results import Settings
    from mcl_kernels.cli.report import write_report

    default_epochs = 2 if options.quick else Settings.epochs
    settings = Settings(
        bits=options.bits,
        stages=options.stages,
        clusters=options.clusters,
        epochs=default_epochs if options.epochs is None else options.epochs,
        seed=options.seed,
        samples=1000 if options.quick else Settings.samples,
    )
    # A directory holds one run, so the quick run and each seed have their own.
    name = "demo" + ("-quick" if options.quick else "") + (f"-seed{options.seed}" if options.seed else "")
    output = options.output or Path("runs") / name
    display = TerminalDisplay()
    try:
        results = run(settings, output, display)
    finally:
        display.stop()
    path = write_report(results, output / "report.html")
    if options.quick:
        display.print_line("A quick run only checks that everything works: for the result, run again without --quick.")
    display.print_line(f"Chance is 0.10. Report with pictures: {path}")


def _replaced(out: Path) -> str:
    return f"{out} was already replaced, but the files next to it may not be: run the command again"


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"mcl-kernels: warning: {one_line(message)}", file=sys.stderr)


def _fail(reason: str) -> int:
    """Prints an error as one line; returns the exit status of a failed command."""
    print(f"mcl-kernels: {one_line(reason)}", file=sys.stderr)
    return 1


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of an option to its help, unless it has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, ()) and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mcl-kernels", description="Fast, exact contrastive learning with clusters.")
    parser.add_argument("--version", action="version", version=f"mcl-kernels {mcl_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show the implementations available here, versions and devices")
    demo = commands.add_parser(
        "demo",
        help="watch MCL recover digits that SimCLR suppresses (5,000 MNIST images, a few minutes on 2 cores)",
        description="Trains SimCLR on digits next to a random code, then stages of MCL; prints a table of linear "
        f"probes and writes a report. If it is interrupted, {DEMO_RESUMES}.",
        formatter_class=_HelpFormatter,
    )
    demo.add_argument("--bits", type=int, default=8, help="constant random channels next to each image")
    demo.add_argument("--stages", type=int, default=3, help="stages, the first of which is SimCLR")
    demo.add_argument("--clusters", type=int, default=16, help="clusters of each stage")
    demo.add_argument("--epochs", type=int, default=None, help="epochs of each stage (default: 30; with --quick 2)")
    demo.add_argument("--seed", type=int, default=0, help="seed of codes, networks, augmentation and clusterings")
    output_help = "directory of stages and report (default: runs/demo, runs/demo-quick, ...)"
    demo.add_argument("--output", type=Path, help=output_help)
    demo.add_argument("--quick", action="store_true", help="only check that everything works: 1,000 images, 2 epochs")
    _add_cluster(commands)
    _add_assign(commands)
    return parser


def _add_cluster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = cluster.Options
    command = commands.add_parser(
        "cluster",
        help="cluster a file of features, of any size, into a file of pseudo labels",
        description="Clusters features, composes the clusters with the labels of the earlier stages into dense pseudo "
        "labels, and writes these with a summary next to them (LABELS.json). It replaces the clustering script of the "
        "paper's CLIP code, whose --MCL-label-path reads a .pt file of these labels. When that script accumulates "
        "stages it keeps only the last one; this command keeps all of them.",
        formatter_class=_HelpFormatter,
    )
    add = command.add_argument
    add("features", type=Path, metavar="FEATURES", help=FEATURES_HELP)
    add("--clusters", type=int, required=True, metavar="K", help="clusters of this stage")
    add("--out", type=Path, required=True, metavar="LABELS", help="pseudo labels to write: .npy (int32), .pt (int64)")
    previous_help = "labels of the earlier stages, in order: cluster ids of each, or this command's output for the last"
    add("--previous", type=Path, nargs="+", default=(), metavar="LABELS", help=previous_help)
    add("--tensor", metavar="NAME", help="name of the features in a file of several tensors")
    add("--metric", choices=METRICS, default=defaults.metric, help="metric; cosine needs no normalised features")
    add("--seed", type=int, default=defaults.seed, help="seed of the initialisation")
    add("--n-init", type=int, default=defaults.n_init, help="restarts; the best one is used")
    add("--max-iter", type=int, default=defaults.max_iter, help="iterations of a restart")
    add("--tol", type=float, default=defaults.tol, help="stop when the centres move less, as in scikit-learn")
    add("--batch-size", type=int, help="rows of a mini-batch; by default every iteration reads all rows")
    add("--impl", choices=IMPLS["kmeans"], default=defaults.impl, help="implementation of k-means")
    add("--centers", type=Path, metavar="CENTERS", help="also write the centres, for `assign`: .safetensors")


def _add_assign(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "assign",
        help="find the nearest centres, saved by `cluster`, of a file of new features",
        description="Finds the nearest centre of each row, and writes the cluster ids with a summary next to them "
        "(LABELS.json). For the features that were clustered, these ids are the labels that `cluster` writes without "
        "--previous.",
        formatter_class=_HelpFormatter,
    )
    add = command.add_argument
    add("features", type=Path, metavar="FEATURES", help=FEATURES_HELP)
    add("--centers", type=Path, required=True, metavar="CENTERS", help="centres, of cluster --centers or KMeans.save")
    add("--out", type=Path, required=True, metavar="LABELS", help="cluster ids to write: .npy (int32), .pt (int64)")
    add("--tensor", metavar="NAME", help="name of the features in a file of several tensors")
    add("--impl", choices=IMPLS["kmeans"], default=assign.Options.impl, help="implementation of k-means")
