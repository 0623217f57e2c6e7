"""A model, not a measurement: lower bounds of a loss's time on a GPU (`python -m benchmarks.gpu.model`).

    time of a kernel = pairs of the busiest multiprocessor x cost of a pair / clock
    cost of a pair   = max(tensor cores + max(issue, special functions), L2)     where one CTA fits a multiprocessor
                       max(tensor cores, issue, special functions, L2)           where two or more fit

Costs are counted in the machine code (static.csv), for tiles without a mask; pairs are those of the schedule
(schedule.py). The assumption: the CTAs of a multiprocessor overlap completely, and within one CTA products and
exponentials take turns. A loss takes at least the time of its kernels, and that of its inputs and outputs at the
memory's bandwidth. Latency, launches, planning and clocks under load are not modelled: real times are longer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from benchmarks.conditions import IMAGES
from benchmarks.gpu.peers import INF_CL, MEMEFF
from benchmarks.gpu.schedule import (
    MULTIPROCESSORS,
    Workload,
    equal_clusters,
    kernel_of,
    present_share,
    static_row,
    units_of_programs,
)

D = 512
SIZES = tuple(1 << power for power in range(12, 21))
# In a clock a multiprocessor issues 4 instructions of warps, does 16 special functions, and reads 32 bytes of L2.
ISSUE, SPECIAL, L2 = 4 * 32, 16, 32


class Device(NamedTuple):
    """A GPU: clock by its data sheet, bytes per second of its memory."""

    name: str
    architecture: int
    clock: float
    bandwidth: float

    @property
    def multiprocessors(self) -> int:
        return MULTIPROCESSORS[self.architecture]


H200 = Device("H200", 90, 1.755e9, 4.3e12)
DEVICES = (Device("A100 (SXM, 80 GB)", 80, 1.41e9, 2.039e12), H200, Device("B200", 100, 1.85e9, 8e12))


def pair_clocks(row: dict[str, str]) -> float:
    """Clocks of a multiprocessor for a pair, by a row of static.csv."""
    tensor = float(row["tensor"]) / 16
    issue, special = float(row["slots"]) / ISSUE, float(row["mufu"]) / SPECIAL
    epilogue, l2 = max(issue, special), float(row["l2_bytes"]) / L2
    return max(tensor, epilogue, l2) if int(row["ctas"]) >= 2 else max(tensor + epilogue, l2)


def launches(workload: Workload) -> list[tuple[str, Workload]]:
    """Kernels of a loss and its gradients."""
    both = [workload, workload.swapped()]
    forward = both if workload.loss == "clip" else [workload]
    backward = both if workload.loss in ("clip", "rows") else [workload]
    return [("forward", each) for each in forward] + [("backward", each) for each in backward]


def own_seconds(workload: Workload, device: Device, precision: str) -> float:
    """Seconds of a loss and its gradients by our kernels."""
    clocks = 0.0
    for name, each in launches(workload):
        kernel = kernel_of(name, device.architecture, precision, workload.d)
        share = present_share(units_of_programs(each, kernel), device.multiprocessors, kernel.ctas)
        pairs = share.busiest * kernel.rows * kernel.columns
        clocks += pairs * pair_clocks(static_row(name, device.architecture, precision, workload.d))
    moved = _moved_bytes(workload, 2 if precision == "bf16" else 4)
    return max(clocks / device.clock, moved / device.bandwidth)


def _moved_bytes(workload: Workload, itemsize: int) -> float:
    """Bytes of both sides, read by both passes, and of their gradients; vectors are negligible."""
    rows = workload.rows if workload.loss == "self" else workload.rows + workload.columns
    return 3 * rows * workload.d * itemsize


# Times that a peer launches its kernels for CLIP's loss and gradients. The last kernel of memeff computes one side.
PEER_LAUNCHES = dict.fromkeys(INF_CL, 2) | dict(zip(MEMEFF, (1, 2), strict=True))


def peer_seconds(kernels: tuple[str, ...], workload: Workload, device: Device, precision: str) -> float:
    """Seconds of CLIP's loss and gradients by a peer, whose programs own tiles of rows and visit all pairs.

    memeff's forward pass and, for wide rows, its backward pass have a program for each tile.
    """
    clocks = 0.0
    for name in kernels:
        row = static_row(name, device.architecture, precision, workload.d)
        rows, columns = int(row["rows"]), int(row["columns"])
        programs, units = -(-workload.rows // rows), -(-workload.columns // columns)
        count = PEER_LAUNCHES[name]
        if name == MEMEFF[0] or (name == MEMEFF[1] and row["units_both_directions"] == "4"):
            programs, units, count = programs * units, 1, 1
        clocks += count * -(-programs // device.multiprocessors) * units * rows * columns * pair_clocks(row)
    return max(clocks / device.clock, _moved_bytes(workload, 2 if precision == "bf16" else 4) / device.bandwidth)


def clip_of(n: int, k: int) -> Workload:
    return Workload("", "clip", D, n, n, equal_clusters(n, k))


def curves(device: Device) -> dict[str, list[float]]:
    """Seconds of CLIP's loss at each of SIZES."""
    lines = {
        "Inf-CL (tf32; it has no bf16)": [peer_seconds(INF_CL, clip_of(n, 1), device, "tf32") for n in SIZES],
        "memeff (bf16)": [peer_seconds(MEMEFF, clip_of(n, 1), device, "bf16") for n in SIZES],
    }
    for k in (1, 10, 100):
        name = f"mcl_kernels (bf16), {k} cluster{'s' if k > 1 else ''}"
        lines[name] = [own_seconds(clip_of(n, k), device, "bf16") for n in SIZES]
    return lines


def draw(figure_path: Path) -> None:
    from matplotlib.figure import Figure

    styles = (("#7d3c98", "^"), ("#c0392b", "s"), ("#1b6ca8", "o"), ("#2e86c1", "v"), ("#5dade2", "D"))
    figure = Figure(figsize=(9, 4), dpi=140, layout="constrained")
    panels = figure.subplots(1, len(DEVICES), sharey=True)
    for axes, device in zip(panels, DEVICES, strict=True):
        for (label, line), (color, marker) in zip(curves(device).items(), styles, strict=True):
            axes.loglog(SIZES, [1e3 * t for t in line], color=color, marker=marker, markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES[::2], [f"{n // 1024:,}k" for n in SIZES[::2]])
        axes.minorticks_off()
        axes.set_title(device.name, fontsize=10)
        axes.set_xlabel("batch size N (pairs), 1k = 1,024")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("lower bound of the time, ms")
    figure.suptitle(f"A model, not a measurement: CLIP's loss and gradients, D = {D}", fontsize=11)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    figure.savefig(figure_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=IMAGES / "gpu_model.png")
    options = parser.parse_args()
    print(f"A model, not a measurement: CLIP's loss and gradients, D = {D}, ms at least")
    for device in DEVICES:
        print(f"\n{device.name:<28}" + "".join(f"{n:>11,}" for n in SIZES))
        for label, line in curves(device).items():
            print(f"{label:<28}" + "".join(f"{1e3 * t:>11.3g}" for t in line))
    draw(options.figure)


if __name__ == "__main__":
    main()
