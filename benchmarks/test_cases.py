"""The same cases under pytest-benchmark: `pytest benchmarks`, with its --benchmark-json, --benchmark-compare and so on.

Each case is a group. Sweeps over N are timed at their first size. All sizes, peaks, ratios and limits are measured by
`python -m benchmarks`.
"""

from __future__ import annotations

import pytest

from benchmarks.cases import CASES, Case
from benchmarks.measure import CPU, check_agreement, step_of
from benchmarks.peers import Contender

pytest.importorskip("pytest_benchmark", reason="timing needs pytest-benchmark, of the bench extra")

ALL = [
    pytest.param(case, contender, id=f"{case.name}: {contender.name}")
    for case in CASES
    if case.runs_on(CPU)
    for contender in case.contenders_on(CPU)
]
PEERS = [param for param in ALL if param.values[1].name != "ours"]


SIZE_UNDER_CAP = 128  # samples of a case whose size is the largest that fits


def size_of(case: Case) -> int:
    return case.sizes[0] if case.sizes else SIZE_UNDER_CAP


def skip_if_missing(contender: Contender) -> None:
    if reason := contender.missing():
        pytest.skip(f"{contender.name}: {reason}")


@pytest.mark.parametrize(("case", "contender"), PEERS)
def test_same_loss(case: Case, contender: Contender) -> None:
    skip_if_missing(contender)
    check_agreement(case, contender, size_of(case))


@pytest.mark.parametrize(("case", "contender"), ALL)
def test_time(benchmark, case: Case, contender: Contender) -> None:
    skip_if_missing(contender)
    n = size_of(case)
    benchmark.group = case.name
    benchmark.extra_info = {"reason": case.reason, "target": case.target, "n": n}
    step = step_of(case, contender, case.make(n))
    benchmark.pedantic(step, rounds=1 if case.once else 5, warmup_rounds=0 if case.once else 1)
