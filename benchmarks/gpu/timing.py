"""Seconds of a step on a device and on its host, and those of its kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.measure import Step

COLD_BYTES = 130 << 20  # twice the L2 of a H200: inputs that add up to this are read from memory
MAX_SETS = 24  # inputs in turn; with small ones the L2 holds what a training loop would leave there, too


def input_sets(bytes_of_one: int) -> int:
    """Returns the number of inputs that a measurement takes in turn."""
    return min(MAX_SETS, max(2, -(-COLD_BYTES // max(bytes_of_one, 1))))


def device_seconds(steps: Sequence[Step], budget: float, device: torch.device) -> list[float]:
    """Seconds of a step without launches, by replays of a CUDA graph of all steps; on a CPU by a clock."""
    if device.type == "cpu":
        return [_clock(steps) for _ in range(2)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in (*steps[:2], steps[-1]):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    torch.cuda.synchronize()
    stop, times = time.monotonic() + budget, []
    while len(times) < 5 or (time.monotonic() < stop and len(times) < 50):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(steps))
        if sum(times) * len(steps) > 2 * budget:
            break
    return times


def host_seconds(step: Step, device: torch.device, steps: int = 20, turns: int = 10) -> tuple[float, float]:
    """Returns the smallest seconds in which the host issues a step, and in which a step ends."""
    issued, ended = [], []
    for turn in range(turns + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        stopped = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn:  # the first compiles
            issued.append((stopped - started) / steps)
            ended.append((time.perf_counter() - started) / steps)
    return min(issued), min(ended)


def kernel_times(step: Step, device: torch.device, steps: int = 3) -> dict[str, tuple[float, float]]:
    """Returns by name of a kernel its launches and its seconds in a step."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if device.type == "cpu":
        return {}
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return {
        event.key: (event.count / steps, event.self_device_time_total / 1e6 / steps)
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CUDA
    }


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def _clock(steps: Sequence[Step]) -> float:
    started = time.perf_counter()
    for step in steps:
        step()
    return (time.perf_counter() - started) / len(steps)
