"""Parts that come first: the machine and its two ceilings, the numbers against fp64, the tests of the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import cycle, islice, product
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.conditions import ROOT
from benchmarks.gpu import carry
from benchmarks.gpu.session import Session, SkipPartError
from benchmarks.gpu.timing import device_seconds, median
from mcl_kernels import masked_logsumexp
from mcl_kernels.backends.table import TABLE
from tests.accuracy import assert_accurate, relative_error
from tests.cases import make_case

TESTS = ("tests/test_gpu.py", "tests/test_logsumexp.py")


def describe_machine(session: Session) -> None:
    """Device, clocks, versions, and the rates of a copy and of a product: no kernel is faster."""
    for name, value in carry.conditions(session.device).items():
        session.record(name, value)
    for name in ("triton", "cuda"):
        session.record(f"impl {name}", TABLE[name].describe()[1])
    size, edge = (1 << 20, 64) if session.tiny else (2 << 30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=session.device).random_()
    target = torch.empty_like(source)
    copying = median(device_seconds([lambda: (target.copy_(source),)], 0.5, session.device))
    session.record("copy, read and written", 2 * size / copying / 1e12, "TB/s")
    a, b = (torch.randn(edge, edge, device=session.device).bfloat16() for _ in range(2))
    multiplying = median(device_seconds([lambda: (a @ b,)], 1.0, session.device))
    session.record(f"product of {edge} x {edge}, bf16", 2 * edge**3 / multiplying / 1e12, "Tflop/s")
    if session.device.type == "cuda":
        session.record("after the product", carry.query_gpu("clocks.sm,clocks.mem,temperature.gpu,power.draw"))


class SmokeCase(NamedTuple):
    dtype: torch.dtype
    form: str  # "self", "rows" or "both"
    negatives: str
    width: int
    n: int

    def __str__(self) -> str:
        return f"{self.form} {self.negatives} {self.n} x {self.width}"


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (128, 200, 512, 64, 1024)
SIZES = (300, 1, 5000, 127)


def smoke_cases(count: int = 40, tiny: bool = False) -> list[SmokeCase]:
    """Returns cases in which each dtype comes with each form, negatives, width and size."""
    kinds = product(DTYPES.values(), ("self", "both", "rows"), ("same", "all", "different"))
    widths, sizes = cycle((24, 200) if tiny else WIDTHS), cycle((70, 1) if tiny else SIZES)
    return [SmokeCase(*kind, next(widths), next(sizes)) for kind in islice(cycle(kinds), count)]


def smoke(session: Session) -> None:
    """Compares values and gradients with fp64 on the device, twice and bit for bit, in memory that holds NaN."""
    wrong, cases = [], smoke_cases(6 if session.tiny else 40, session.tiny)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for index, case in enumerate(cases):
        if session.seconds_left() < 1:
            session.record("skipped", f"{len(cases) - index} of {len(cases)} cases, no time left")
            break
        dtype = next(name for name, value in DTYPES.items() if value == case.dtype)
        try:
            check_case(case, session.device)
        except Exception as error:
            wrong.append(f"{dtype} {case}")
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            session.record("wrong", reason, workload=str(case), dtype=dtype)
    session.record("cases", len(cases))
    session.record("wrong cases", len(wrong))
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(cases)} are wrong: {'; '.join(wrong)}")


def check_case(case: SmokeCase, device: torch.device) -> None:
    """Raises AssertionError unless a case is as accurate as the definition, and the same bits twice."""
    got, again = (result_and_gradients(case, "triton", device) for _ in range(2))
    reference = result_and_gradients(case, "reference", device)
    exact = result_and_gradients(case, "reference", device, exact=True)
    vectors = [name for name in exact if name in ("grad_query", "grad_key")]
    usual = max([torch.finfo(torch.float32).eps, *(relative_error(reference[name], exact[name]) for name in vectors)])
    for name, value in exact.items():
        assert torch.equal(got[name].nan_to_num(), again[name].nan_to_num()), f"{name}: other bits in a second run"
        assert_accurate(got[name], reference[name], value, name, usual if name == "grad_scale" else None)


def result_and_gradients(case: SmokeCase, impl: str, device: torch.device, *, exact: bool = False) -> dict[str, Tensor]:
    """Returns the log-sum-exps, and the gradients of a weighted sum of those that are finite; `exact` is in fp64."""
    m = None if case.form == "self" else max(case.n * 2 // 3, 1)
    made = make_case(case.n, m, case.width, dtype=case.dtype, device=str(device))
    dtype = torch.float64 if exact else None
    scale = torch.tensor(10.0, dtype=dtype, device=device)
    leaves = {"query": made.query, "key": made.key, "scale": scale}
    inputs = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items() if x is not None}
    values = masked_logsumexp(
        inputs["query"], inputs.get("key"), made.labels, made.key_labels, ids=made.ids, key_ids=made.key_ids,
        scale=inputs["scale"], negatives=case.negatives, bidirectional=case.form == "both", impl=impl,
    )  # fmt: skip
    every = torch.cat(values) if isinstance(values, tuple) else values
    weight = torch.linspace(-1, 2, len(every), device=device, dtype=every.dtype)
    gradients = torch.autograd.grad(torch.where(every.isinf(), 0, weight * every).sum(), list(inputs.values()))
    return {"lse": every.detach(), **{f"grad_{name}": g for name, g in zip(inputs, gradients, strict=True)}}


def run_tests(session: Session) -> None:
    """Runs the tests of the operation on the GPU, in parallel."""
    session.needs_cuda("its tests")
    try:
        import pytest  # noqa: F401
        import xdist  # noqa: F401
    except ImportError as error:
        raise SkipPartError(str(error)) from error
    workers = min(12, os.cpu_count() or 1)
    log = session.out / "pytest.txt"
    command = [sys.executable, "-m", "pytest", *TESTS, "-k", "cuda-triton or cuda-cuda", "-n", str(workers)]
    command += ["--maxfail", "30", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.carry", "--tb", "short"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(max(session.seconds_left(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
    lines = log.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    session.record("pytest", last if code is not None else f"no time left: {last[-100:]}")
    if code not in (0, None):
        raise AssertionError(f"pytest ended with {code}: {last}")
