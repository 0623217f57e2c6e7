"""Parts that run the GPU's own tools: Nsight Compute's counters, and compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from benchmarks.conditions import ROOT
from benchmarks.gpu.checks import check_case, smoke_cases
from benchmarks.gpu.session import Session, SkipPartError
from benchmarks.gpu.workloads import CLIP, DTYPES, MOCO, SIMCLR

SECTIONS = ("SpeedOfLight", "WarpStateStats", "Occupancy", "MemoryWorkloadAnalysis", "LaunchStats")
PROFILED = ((SIMCLR[3], "bf16"), (MOCO, "bf16"), (CLIP[1], "bf16"), (SIMCLR[3], "fp32"))
MAX_KERNELS = 16


def _tool(session: Session, name: str) -> str:
    session.needs_cuda(name)
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise SkipPartError(f"{name} is not installed")
    return found


def _run_under(session: Session, tool: list[str], function: str, log: str, **environment: str) -> tuple[int, str]:
    """Runs a function of this module in a process under a tool. Returns its exit status and what was printed."""
    target = [sys.executable, "-c", f"from benchmarks.gpu import carry, tools; carry.use(); tools.{function}()"]
    with (session.out / log).open("w") as file:
        process = subprocess.Popen(
            tool + target, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        try:
            code = process.wait(max(session.seconds_left(), 1))
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise SkipPartError("no time left") from error
    return code, (session.out / log).read_text(errors="replace")


def profile_kernels(session: Session) -> None:
    """Counters of the kernels of a step: which pipe is busy, what warps wait for."""
    tool = [
        _tool(session, "ncu"),
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--csv",
        "--page",
        "details",
    ]
    tool += [option for section in SECTIONS for option in ("--section", section)]
    tool += ["--kernel-name", f"regex:^({'|'.join(own_kernels())})$", "--launch-count", str(MAX_KERNELS)]
    code, printed = _run_under(session, tool, "steps_to_profile", "ncu.csv")
    session.record("rows", sum(line.startswith('"') for line in printed.splitlines()))
    if code:
        raise RuntimeError(f"ncu ended with {code}: {printed.strip().splitlines()[-1]}")


def own_kernels() -> list[str]:
    """Returns the names of the kernels of the operation."""
    folder = ROOT / "mcl_kernels" / "logsumexp" / "triton"
    lines = [line for path in sorted(folder.glob("*.py")) for line in path.read_text().splitlines()]
    return sorted({line[4:].split("(")[0] for line in lines if line.startswith("def ") and "_kernel(" in line})


def steps_to_profile() -> None:
    steps = []
    for workload, dtype in PROFILED:
        batch = workload.batch(DTYPES[dtype], torch.device("cuda"))
        steps.append(workload.step(batch, "ours"))
        steps[-1]()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for step in steps:
        step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def check_memory(session: Session) -> None:
    """compute-sanitizer's memcheck: reads and writes out of range."""
    tool = [_tool(session, "compute-sanitizer"), "--tool", "memcheck", "--error-exitcode", "9"]
    _sanitize(session, tool, "some_smoke_cases", "memcheck.txt")


def some_smoke_cases() -> None:
    for case in smoke_cases(40)[::7]:
        if case.n <= 300:
            check_case(case, torch.device("cuda"))


def check_races(session: Session) -> None:
    """compute-sanitizer's racecheck on the plan in CUDA C++; Triton manages the shared memory of its kernels."""
    from mcl_kernels.backends import cuda

    tool = [_tool(session, "compute-sanitizer"), "--tool", "racecheck", "--error-exitcode", "9"]
    if reason := cuda.unavailable_reason(session.device):
        raise SkipPartError(reason)
    _sanitize(session, tool, "make_plans", "racecheck.txt")


def make_plans() -> None:
    from mcl_kernels.logsumexp.device_plan import make_plan
    from mcl_kernels.logsumexp.pairs import Pairs

    for n in (300, 3000):
        x = torch.empty(n, 1, device="cuda")
        labels, ids = (torch.randint(40, (n,), device="cuda") for _ in range(2))
        make_plan(x, None, Pairs(labels, None, ids, None, "same"))
    torch.cuda.synchronize()


def _sanitize(session: Session, tool: list[str], function: str, log: str) -> None:
    code, printed = _run_under(session, tool, function, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    last = printed.strip().splitlines()[-1] if printed.strip() else ""
    session.record("compute-sanitizer", last)
    if code:
        raise AssertionError(f"compute-sanitizer ended with {code}: {last}")
