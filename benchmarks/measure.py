"""Measurement of a case: contenders take turns in one process; each peak is measured in a process of its own.

Seconds are wall-clock time on a CPU, and the time between two events of the stream on a GPU. Memory is that of the
process or of the device.
"""

from __future__ import annotations

import csv
import ctypes
import multiprocessing
import os
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case, LossInputs
from benchmarks.peers import Contender
from mcl_kernels.backends.table import resolve

BUDGET = 3.0  # seconds for the passes of one contender
MAX_PASSES = 200  # of one contender; a few milliseconds vary more than seconds
CPU = torch.device("cpu")
PRODUCT = {"cpu": 2048, "cuda": 8192}  # rows and columns of the product that defines the limit

Step = Callable[[], tuple[Tensor, ...]]
Row = dict[str, Any]


def find(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def step_of(case: Case, contender: Contender, inputs: LossInputs) -> Step:
    """Returns a step of one contender, its loss and gradients. Inputs are rounded to the dtype of the case for all."""
    dtype = contender.dtype or case.dtype
    leaves = [leaf.detach().to(case.dtype).to(dtype).requires_grad_() for leaf in inputs.leaves]

    def step() -> tuple[Tensor, ...]:
        loss = contender.loss(*leaves, *inputs.fixed)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def step_with_threads() -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(contender.threads or before)
        try:
            return step()
        finally:
            torch.set_num_threads(before)

    return step_with_threads if contender.threads else step


def check_agreement(case: Case, contender: Contender, n: int, device: torch.device = CPU) -> None:
    """Raises unless loss and gradients of the contender equal ours: only equal results have comparable costs."""
    inputs = case.make(n).to(device)
    half = torch.bfloat16 in (case.dtype, contender.dtype)
    ours, theirs = (step_of(case, each, inputs)() for each in (case.contenders_on(device)[0], contender))
    for index, (expected, actual) in enumerate(zip(ours, theirs, strict=True)):
        difference = (actual.double() - expected.double()).abs().max()
        allowed = 0 if contender.exact else (1e-2 if half else 1e-3) * expected.double().abs().max()
        if not difference <= allowed:
            what = f"gradient {index - 1}" if index else "loss"
            raise AssertionError(f"{case.name}: {what} of {contender.name} differs by {difference:.2g} from ours")


def time_case(name: str, n: int, device: torch.device) -> tuple[list[Row], dict[str, str]]:
    """Rows of the contenders, timed in turns with a large product, and the reason for each contender without a row."""
    case = find(name)
    every = case.contenders_on(device)
    skipped = {contender.name: reason for contender in every if (reason := contender.missing())}
    contenders = [c for c in every if c.name not in skipped and n <= (c.largest or n)]
    for contender in contenders[1:]:
        try:
            check_agreement(case, contender, n, device)
        except AssertionError:
            raise
        except Exception as error:  # for example too large for this GPU: the other contenders are still measured
            if device.type == "cpu":
                raise
            skipped[contender.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    contenders = [contender for contender in contenders if contender.name not in skipped]
    inputs = case.make(n).to(device)
    steps = {contender.name: step_of(case, contender, inputs) for contender in contenders}
    seconds = _in_turns({**steps, "product": _product(device)}, device)
    rate = _rate(case, seconds["product"], device)
    ours = statistics.median(seconds["ours"])
    rows = [_row(case, contender, n, inputs, seconds[contender.name], rate) for contender in contenders]
    for row in rows[1:]:
        row["ratio"] = row["p50"] / ours
    return rows, skipped


def measure_peak(name: str, n: int, device: torch.device, peer: str, cap_bytes: int | None = None) -> int | None:
    """Peak bytes above the inputs in one pass, gradients included; None above the cap."""
    case = find(name)
    contender = next(c for c in case.contenders_on(device) if c.name == peer)
    try:
        peak = _peak(case, contender, case.make(n).to(device), device, cap_bytes)[0]
    except (RuntimeError, MemoryError):
        if cap_bytes is None:
            raise
        return None
    return peak if cap_bytes is None or peak <= cap_bytes else None


def measure_once(name: str, n: int, device: torch.device) -> Row:
    """Row of a case with a single pass: our time and peak."""
    case = find(name)
    inputs = case.make(n).to(device)
    ours = case.contenders_on(device)[0]
    peak, seconds = _peak(case, ours, inputs, device)
    rate = _rate(case, _in_turns({"product": _product(device)}, device)["product"], device)
    return {**_row(case, ours, n, inputs, [seconds], rate), "peak_bytes": peak}


def _peak(
    case: Case, contender: Contender, inputs: LossInputs, device: torch.device, cap_bytes: int | None = None
) -> tuple[int, float]:
    step = step_of(case, contender, inputs)
    # A small step first, to load what is loaded on first use. A compiled step is compiled for its size only.
    (step if contender.compiled else step_of(case, contender, case.make(64).to(device)))()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = _seconds(step, device)
        return torch.cuda.max_memory_allocated(device) - before, seconds
    seconds: list[float] = []
    peak = peak_of(lambda: seconds.append(_seconds(step, device)), cap_bytes)
    return peak, seconds[0]


def peak_of(step: Callable[[], object], cap_bytes: int | None = None) -> int:
    """Peak bytes of this process during the step, above those before."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide part of the peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    if cap_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + cap_bytes, resource.RLIM_INFINITY))
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Value of a line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def _row(case: Case, contender: Contender, n: int, inputs: LossInputs, seconds: list[float], rate: float) -> Row:
    device, spread = inputs.leaves[0].device, quantiles(seconds)
    return {
        "case": case.name, "peer": contender.name,
        "impl": resolve("logsumexp", contender.impl, device) if contender.own else "",
        "n": n, "d": inputs.leaves[0].shape[1], "clusters": inputs.clusters,
        "dtype": str(contender.dtype or case.dtype).removeprefix("torch."),
        "threads": contender.threads or torch.get_num_threads(), **spread,
        # The limit is for all threads.
        "fraction_of_limit": None if contender.threads else inputs.operations / rate / spread["p50"],
    }  # fmt: skip


def quantiles(seconds: Iterable[float]) -> dict[str, float]:
    """Median of measurements, and those of them at 20 and 80 percent."""
    in_order = sorted(seconds)
    p20, p80 = (in_order[round(q * (len(in_order) - 1))] for q in (0.2, 0.8))
    return {"p20": p20, "p50": statistics.median(in_order), "p80": p80}


def _product(device: torch.device) -> Callable[[], Tensor]:
    """Returns the product of the limit. On a CPU it is in fp32 for every case, so that a gain of bf16 shows."""
    size, dtype = PRODUCT[device.type], torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def _rate(case: Case, seconds: list[float], device: torch.device) -> float:
    """Operations per second. On a GPU fp32 takes three products of tf32, each at half the rate of bf16."""
    slower = 6 if device.type == "cuda" and case.dtype == torch.float32 else 1
    return 2 * PRODUCT[device.type] ** 3 / statistics.median(seconds) / slower


def _in_turns(steps: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step. Slow steps are called less often, but over the same period of time.

    Each turn begins with another step, so that none always follows the one that leaves the caches full.
    """
    if device.type == "cuda":
        for step in steps.values():
            step()  # compiles the kernels
    first = {name: _seconds(step, device) for name, step in steps.items()}  # warm-up, and the cost of a call
    passes = {name: max(3 if t < 5 else 2, min(MAX_PASSES, int(BUDGET / t))) for name, t in first.items()}
    rounds = max(passes.values())
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        begin = turn % len(names)
        for name in names[begin:] + names[:begin]:
            if turn * passes[name] // rounds != (turn - 1) * passes[name] // rounds:
                seconds[name].append(_seconds(steps[name], device))
    return seconds


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV as text; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    """Writes a CSV in one step: the file is complete or absent."""
    written = path.with_suffix(".partial")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows)
    os.replace(written, path)


def in_fresh_process(measure: Callable[..., Any], *arguments: object) -> Any:
    """Result of a function in a process that has imported torch and computed nothing."""
    # Forks of a server that has imported torch save 3 s per process, compared with spawn.
    context = multiprocessing.get_context("forkserver")
    # Torch alone: a process forked from one that has imported mcl_kernels computes with one thread.
    context.set_forkserver_preload(["torch"])
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # tuning of one machine, which users do not have
        os.environ.pop(name, None)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, measure, arguments))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        result, error = None, "the process died"
    process.join()
    if error:
        raise RuntimeError(f"{measure.__name__}{arguments}: {error} (exit code {process.exitcode})")
    return result


def _answer(sender: Any, measure: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    try:
        sender.send((measure(*arguments), None))
    except Exception:
        sender.send((None, traceback.format_exc()))
