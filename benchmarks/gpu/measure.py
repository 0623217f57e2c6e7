"""Everything to measure on a GPU, in minutes and without an installation: `python -m benchmarks.gpu.measure --out DIR`.

Each part is a process of its own with a limit of time: a kernel that fails or hangs ends its part, and the next one
starts. Results are written row by row: `measured.csv` (what was measured), `parts.csv` (how each part ended) and
`log.txt` (what the parts printed). Parts for which no time is left, or whose tools are missing, are listed as skipped.
After wrong numbers (the part `smoke`) nothing is timed, but with --keep-going. `python -m benchmarks.gpu.carry`
compiles kernels on a machine without a GPU; with --carry DIR they are loaded from there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import torch

from benchmarks.gpu import carry
from benchmarks.gpu.session import Session, SkipPartError, append_row

ROOT = Path(__file__).parents[2]
LOG, STATUS = "log.txt", "parts.csv"
STATUS_COLUMNS = ("part", "status", "seconds", "reason")
SKIPPED = 77  # exit status of a part that cannot run here
GRACE = 3.0  # seconds between the time at which a part should end and that at which it is killed
LEAST = 5.0  # seconds: with less left a part is not started


class Part(NamedTuple):
    name: str
    function: str  # "module:name", called with the session
    limit: float  # seconds
    needs_right_numbers: bool = True


CHECKS, TIMES, TOOLS = (f"benchmarks.gpu.{name}" for name in ("checks", "times", "tools"))
PARTS = (
    Part("machine", f"{CHECKS}:describe_machine", 40, False),
    Part("smoke", f"{CHECKS}:smoke", 75, False),
    Part("tests", f"{CHECKS}:run_tests", 100, False),
    Part("device", f"{TIMES}:device_times", 130),
    Part("host", f"{TIMES}:host_times", 30),
    Part("tiles", f"{TIMES}:alternative_tiles", 60),
    Part("ncu", f"{TOOLS}:profile_kernels", 60),
    Part("compiled", f"{TIMES}:compiled_times", 50),
    Part("flex", f"{TIMES}:flex_attention_times", 45),
    Part("kmeans", f"{TIMES}:kmeans_times", 30),
    Part("memcheck", f"{TOOLS}:check_memory", 45, False),
    Part("races", f"{TOOLS}:check_races", 30, False),
)


class Options(NamedTuple):
    out: Path
    device: str
    tiny: bool
    budget: float  # seconds for all parts
    carry: Path | None = None
    keep_going: bool = False


def run_parts(parts: Sequence[Part], options: Options) -> bool:
    """Runs the parts one after the other. Returns whether none of them failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if options.carry is not None:
        environment |= carry.install(options.carry)
    started, wrong, succeeded = time.monotonic(), False, True
    for part in parts:
        left = started + options.budget - time.monotonic()
        if wrong and part.needs_right_numbers:
            status, seconds, reason = "skipped", 0.0, "the part smoke found wrong numbers (--keep-going times them)"
        elif left < LEAST:
            status, seconds, reason = "skipped", 0.0, f"{options.budget:.0f} s for all parts are over"
        else:
            status, seconds, reason = _run_part(part, min(part.limit, left), options, environment)
        append_row(options.out / STATUS, STATUS_COLUMNS, (part.name, status, f"{seconds:.1f}", reason))
        print(f"== {part.name}: {status}, {seconds:.1f} s{': ' + reason if reason else ''}", flush=True)
        succeeded &= status in ("done", "skipped")
        wrong |= part.name == "smoke" and status == "failed" and not options.keep_going
    return succeeded


def _run_part(part: Part, seconds: float, options: Options, environment: dict[str, str]) -> tuple[str, float, str]:
    """Runs a part in its own process. Returns how it ended, its seconds and the reason."""
    command = [sys.executable, "-m", "benchmarks.gpu.measure", "--out", str(options.out), "--device", options.device]
    command += ["--function", part.name, part.function, str(max(seconds - GRACE, 1.0))] + ["--tiny"] * options.tiny
    log, started = options.out / LOG, time.monotonic()
    begin = log.stat().st_size if log.exists() else 0
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        code = process.wait(seconds)
        status = {0: "done", SKIPPED: "skipped"}.get(code, "failed")
    except subprocess.TimeoutExpired:
        status = "over time"
    except Interrupted:
        append_row(
            options.out / STATUS, STATUS_COLUMNS, (part.name, "interrupted", f"{time.monotonic() - started:.1f}", "")
        )
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the part started, too
        process.wait()
    with log.open(errors="replace") as file:
        file.seek(begin)
        printed = file.read()
    sys.stdout.write(printed)
    lines = printed.strip().splitlines()
    reasons = {"done": "", "over time": f"killed after {seconds:.0f} s"}
    return status, time.monotonic() - started, reasons.get(status, lines[-1][:300] if lines else f"exit status {code}")


class Interrupted(SystemExit):
    """A signal ended the measurement."""


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(128 + number)


def _call(name: str, function: str, seconds: float, options: argparse.Namespace) -> int:
    """Calls the function of a part in this process; the last line that it prints is the reason of a failure."""
    carry.use()
    module, attribute = function.split(":")
    session = Session(name, options.out, torch.device(options.device), options.tiny, time.monotonic() + seconds)
    try:
        getattr(importlib.import_module(module), attribute)(session)
    except SkipPartError as reason:
        print(reason, flush=True)
        return SKIPPED
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:250]}", flush=True)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--carry", type=Path, help="folder that benchmarks.gpu.carry wrote")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all parts (default: 480)")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--keep-going", action="store_true", help="time kernels with wrong results, too")
    parser.add_argument("--function", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(part.name for part in PARTS)}; all")
    options = parser.parse_args()
    if options.function:
        name, function, seconds = options.function
        return _call(name, function, float(seconds), options)
    names = {part.name for part in PARTS}
    if unknown := set(options.parts) - names:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device (--device cpu --tiny runs the script itself)")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _interrupt)
    chosen = [part for part in PARTS if not options.parts or part.name in options.parts]
    settings = Options(options.out, options.device, options.tiny, options.budget, options.carry, options.keep_going)
    return 0 if run_parts(chosen, settings) else 1


if __name__ == "__main__":
    sys.exit(main())
