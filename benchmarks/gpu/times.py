"""Parts that time: on the device by graph replay, on the host, other tiles, and what a user would write instead."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import device_seconds, host_seconds, input_sets, kernel_times, median
from benchmarks.gpu.workloads import CLIP, DTYPES, MCL, MOCO, SIMCLR, WIDE, WORKLOADS, Workload
from benchmarks.measure import Step
from benchmarks.peers import SCALE
from mcl_kernels import KMeans
from mcl_kernels.backends import cuda

BUDGET = 0.4  # seconds of replays of one contender
RARE = 0.01  # part of a step's time below which its kernels are added up


def device_times(session: Session) -> None:
    """Each workload in bf16, then in fp32: ours, its kernels, plain PyTorch, and ours in CUDA C++ for some."""
    has_cuda = session.device.type == "cuda" and cuda.unavailable_reason(session.device) is None
    for dtype in DTYPES:
        for workload in _sized(session, WORKLOADS):
            contenders = ["ours"] + ["eager"] * workload.has_eager()
            contenders += ["ours, CUDA C++"] * (has_cuda and workload in (MOCO, SIMCLR[1]))
            for contender in contenders:
                _measure(session, workload, dtype, contender, by_kernel=contender == "ours")
    _raise_failures()


def _sized(session: Session, workloads: Sequence[Workload]) -> list[Workload]:
    if not session.tiny:
        return list(workloads)
    return [workload.tiny() for workload in {workload.loss: workload for workload in workloads}.values()]


def _steps(session: Session, workload: Workload, dtype: str, contender: str) -> list[Step]:
    """Steps of a contender on inputs that together are larger than the L2."""
    first = workload.batch(DTYPES[dtype], session.device)
    size = sum(x.nbytes for tensors in first for x in tensors)
    sets = 2 if session.tiny else input_sets(size)
    batches = [first] + [workload.batch(DTYPES[dtype], session.device, seed) for seed in range(1, sets)]
    return [workload.step(batch, contender) for batch in batches]


failures: list[str] = []


def _measure(session: Session, workload: Workload, dtype: str, contender: str, by_kernel: bool = False) -> float:
    """Records the time of a step, or why there is none; returns it, or NaN."""
    labels = {"workload": workload.name, "dtype": dtype, "contender": contender}
    if session.seconds_left() < 3 * BUDGET and not session.tiny:
        session.record("skipped", "no time left", **labels)
        return math.nan
    try:
        steps = _steps(session, workload, dtype, contender)
        times = device_seconds(steps, BUDGET, session.device)
        session.record("device time", 1e6 * median(times), "us", **labels)
        session.record("device time, least", 1e6 * min(times), "us", **labels)
        if by_kernel:
            _record_kernels(session, steps[0], labels)
        return median(times)
    except Exception as error:  # too large for this GPU, or a kernel that does not compile: others are still measured
        failures.append(f"{workload.name} {dtype} {contender}")
        session.record("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}", **labels)
        return math.nan


def _raise_failures() -> None:
    if failures:
        raise RuntimeError(f"{len(failures)} measurements failed: {'; '.join(failures)}")


def _record_kernels(session: Session, step: Step, labels: dict[str, str]) -> None:
    kernels = kernel_times(step, session.device)
    every, rest = sum(seconds for _, seconds in kernels.values()), 0.0
    session.record("launches", sum(count for count, _ in kernels.values()), **labels)
    for name, (count, seconds) in sorted(kernels.items(), key=lambda item: -item[1][1]):
        if seconds < RARE * every:
            rest += seconds
        else:
            session.record(f"kernel {name[:60]}, {count:g} launches", 1e6 * seconds, "us", **labels)
    session.record("other kernels", 1e6 * rest, "us", **labels)


def host_times(session: Session) -> None:
    """Small batches without a graph: the time in which the host issues a step, and in which it ends."""
    for workload in _sized(session, (SIMCLR[0], MOCO, CLIP[0], MCL[0], SIMCLR[1])):
        for dtype in DTYPES:
            batch = workload.batch(DTYPES[dtype], session.device)
            for contender in ("ours", "eager"):
                if session.seconds_left() < 2:
                    return
                labels = {"workload": workload.name, "dtype": dtype, "contender": contender}
                turns = (1, 1) if session.tiny else (20, 10)
                issued, ended = host_seconds(workload.step(batch, contender), session.device, *turns)
                session.record("host time", 1e6 * issued, "us", **labels)
                session.record("step without a graph", 1e6 * ended, "us", **labels)


TILED = (SIMCLR[3], WIDE)  # workloads of other tiles
# Changes of the tiles in use, by kernel; fields that the tiles do not have are left out.
ALTERNATIVES: dict[str, tuple[dict[str, int], ...]] = {
    "forward": (
        {"rows": 64, "warps": 4}, {"rows": 128, "columns": 64}, {"warps": 4}, {"stages": 3}, {"stages": 1},
        {"rows": 64, "columns": 128, "warps": 4, "stages": 3}, {"per_multiprocessor": 1},
    ),
    "backward": (
        {"rows": 64, "columns": 64, "warps": 4}, {"rows": 64, "columns": 128, "warps": 4}, {"columns": 32},
        {"stages": 3}, {"stages": 1}, {"rows": 64, "warps": 8}, {"per_multiprocessor": 1},
    ),
}  # fmt: skip


def alternatives(kernel: str, dtype: str, architecture: int) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yields a description of each change of a kernel's tiles with the table that has it."""
    from mcl_kernels.logsumexp.triton import tile_table

    precision = "half" if dtype == "bf16" else "bf16x6"
    found = [key for key in tile_table.TABLE if key[:2] == (kernel, precision) and key[2] <= architecture]
    if not found:
        return
    key = max(found)
    for change in ALTERNATIVES[kernel]:
        changed = {
            width: tiles._replace(**{name: value for name, value in change.items() if name in tiles._fields})
            for width, tiles in tile_table.TABLE[key].items()
        }
        if changed != tile_table.TABLE[key]:
            yield ", ".join(f"{kernel} {name} {value}" for name, value in change.items()), {key: changed}


@contextmanager
def tiles_of(table: dict[Any, Any]) -> Iterator[None]:
    """Replaces entries of the table of tiles."""
    from mcl_kernels.logsumexp.triton import tile_table

    with patch.dict(tile_table.TABLE, table):
        tile_table.choose_tiles.cache_clear()
        yield
    tile_table.choose_tiles.cache_clear()


def alternative_tiles(session: Session) -> None:
    """Other rows, columns, warps and stages, at D = 128 and 512, beside the tiles of the table."""
    for workload in _sized(session, TILED):
        in_use = _measure(session, workload, "bf16", "ours")
        for kernel in ALTERNATIVES:
            for name, table in islice(alternatives(kernel, "bf16", 90), 1 if session.tiny else None):
                with tiles_of(table):
                    seconds = _measure(session, workload, "bf16", f"ours, {name}")
                if seconds > 0:
                    session.record("times the time in use", seconds / in_use, workload=workload.name, contender=name)


def compiled_times(session: Session) -> None:
    """Plain PyTorch by torch.compile."""
    session.needs_cuda("a compiled loss in a graph")
    for workload in (SIMCLR[2], MOCO):
        for dtype in DTYPES:
            _measure(session, workload, dtype, "compiled")
    _raise_failures()


def flex_attention_times(session: Session) -> None:
    """The log-sum-exp of a masked FlexAttention with its gradient, in place of a loss: what a user would write."""
    session.needs_cuda("FlexAttention's log-sum-exp with a gradient")
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    rows, width = 8192, 128
    attend = torch.compile(flex_attention, dynamic=False)
    for clusters in (1, 10):
        labels = torch.randint(clusters, (rows,), device=session.device).sort().values
        mask = create_block_mask(_same_cluster(labels), 1, 1, rows, rows, device=str(session.device))
        x = torch.nn.functional.normalize(torch.randn(1, 1, rows, width, device=session.device), dim=-1)
        query, key = (x.bfloat16().requires_grad_() for _ in range(2))

        def step(query: Tensor = query, key: Tensor = key, mask: Any = mask) -> tuple[Tensor, ...]:
            _, sums = attend(query, key, key, block_mask=mask, scale=SCALE, return_aux=AuxRequest(lse=True))
            return torch.autograd.grad(sums.lse.mean(), (query, key))

        compiling = time.monotonic()
        step()
        torch.cuda.synchronize()
        name = {"workload": f"simclr {rows}, {clusters} clusters", "dtype": "bf16", "contender": "flex_attention"}
        session.record("seconds to compile", time.monotonic() - compiling, "s", **name)
        session.record("device time", 1e6 * median(device_seconds([step], BUDGET, session.device)), "us", **name)


def _same_cluster(labels: Tensor) -> Callable[..., Tensor]:
    def keep(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (labels[row] == labels[column]) & (row != column)

    return keep


def kmeans_times(session: Session) -> None:
    """An iteration of k-means with 10 and 1,000 centres, against one read of the rows."""
    n, turns, widths = (64, 1, (32,)) if session.tiny else (1 << 20, 5, (128, 512))
    for width in widths:
        for dtype in DTYPES:
            x = torch.randn(n, width, device=session.device).to(DTYPES[dtype])
            for clusters in (10, 1000):
                centers = x[: min(clusters, n // 2)].float()
                labels = {"workload": f"{n} x {width}, {clusters} centres", "dtype": dtype}
                for name, seconds in _kmeans_seconds(x, centers, turns, session.device):
                    session.record("time", 1e6 * seconds, "us", contender=name, **labels)
                    if session.seconds_left() < 1 and not session.tiny:
                        session.record("skipped", "no time left", **labels)
                        return


def _kmeans_seconds(x: Tensor, centers: Tensor, turns: int, device: torch.device) -> Iterator[tuple[str, float]]:
    """Yields contenders with their seconds; those of an iteration are a difference of two fits."""

    def seconds(step: Step) -> float:
        return host_seconds(step, device, 1, turns)[1]

    yield "x.sum()", seconds(lambda: (x.sum(dtype=torch.float32),))
    yield (
        "ours, an iteration",
        (seconds(lambda: kmeans_fit(x, centers, 6)) - seconds(lambda: kmeans_fit(x, centers, 1))) / 5,
    )


def kmeans_fit(x: Tensor, centers: Tensor, iterations: int) -> tuple[Tensor, ...]:
    fitted = KMeans(len(centers), init=centers, max_iter=iterations, tol=0.0, impl="triton").fit(x)
    return (fitted.cluster_centers_,)
