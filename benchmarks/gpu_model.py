"""A model, not a measurement: a loss's operations at a GPU's peak rates (`python -m benchmarks.gpu_model`).

    time = max(2 D units pairs / tensor rate, bytes / bandwidth) + exponentials / special-function rate

Units and pairs are those of the kernels in gpu_static.csv: ours visit the kept pairs, rounded up to tiles, and the
peers all pairs. Bytes are those of inputs and outputs, moved once, which favours kernels that read them several times.
Exponentials do not overlap with other work. Latency, occupancy, launches and planning are not modelled. The result
ranks algorithms and is not a time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.conditions import IMAGES
from benchmarks.gpu_kernels import INF_CL, MEMEFF, own_units, peer_units
from mcl_kernels.logsumexp.triton.tile_table import choose_tiles

D = 512
SIZES = tuple(1 << power for power in range(12, 21))


class Device(NamedTuple):
    """A GPU by NVIDIA's data sheets: operations per second of the dense tensor cores, bytes per second."""

    name: str
    architecture: int
    tensor: dict[str, float]
    bandwidth: float
    exponentials: float  # per second: 16 per clock of each multiprocessor


DEVICES = (
    Device("A100 (SXM, 80 GB)", 80, {"bf16": 312e12, "tf32": 156e12}, 2.039e12, 108 * 16 * 1.41e9),
    Device("H100 (SXM)", 90, {"bf16": 989e12, "tf32": 495e12}, 3.35e12, 132 * 16 * 1.83e9),
    Device("B200", 100, {"bf16": 2250e12, "tf32": 1125e12}, 8e12, 148 * 16 * 1.85e9),
)


class Work(NamedTuple):
    """Work of a loss and its gradients."""

    products: float  # units x pairs
    exponentials: float
    bytes: float


def visited_pairs(sizes: np.ndarray, rows: int, columns: int) -> int:
    """Pairs visited for clusters of these sizes, rounded up to tiles.

    A tile of rows is compared with the columns from the cluster of its first row to that of its last row.
    """
    ends = np.cumsum(sizes)
    n = int(ends[-1])
    first = np.arange(0, n, rows)
    last = np.minimum(first + rows, n) - 1
    cluster_of_first, cluster_of_last = (np.searchsorted(ends, row, side="right") for row in (first, last))
    compared = ends[cluster_of_last] - (ends - sizes)[cluster_of_first]
    return int((rows * columns * -(-compared // columns)).sum())


def own_clip(architecture: int, sizes: np.ndarray, width: int) -> Work:
    """Work of both directions in bf16: the rows of each side against those of the other, forward and backward."""
    n, capability = int(sizes.sum()), (architecture // 10, 0)
    forward, backward = (choose_tiles(kernel, "half", width, capability) for kernel in ("forward", "backward"))
    forward_pairs, backward_pairs = (visited_pairs(sizes, tiles.rows, tiles.columns) for tiles in (forward, backward))
    units = own_units(architecture, "bf16", width).both_directions - 2
    parts = units // 2 - 1
    return Work(
        products=2 * forward_pairs + units * backward_pairs,
        # Backward: two terms of each pair, in each part of the features.
        exponentials=2 * forward_pairs + 2 * 2 * parts * backward_pairs,
        bytes=_moved_bytes(n, width, 2),
    )


def peer_clip(kernel: str, architecture: int, n: int, width: int) -> Work:
    units = peer_units(kernel, architecture, width).both_directions
    # Inf-CL: the forward pass and the gradient of each side, in both directions. memeff: forward, and each side.
    exponentials = 6 if kernel in INF_CL else units - 2
    return Work(units * n * n, exponentials * n * n, _moved_bytes(n, width, 4 if kernel in INF_CL else 2))


def _moved_bytes(n: int, width: int, itemsize: int) -> float:
    """Bytes of two sides, read by both passes, and of their gradients; vectors are negligible."""
    return 2 * n * width * itemsize * 3


def seconds(work: Work, device: Device, precision: str, width: int) -> float:
    operations = 2 * width * work.products / device.tensor[precision]
    return max(operations, work.bytes / device.bandwidth) + work.exponentials / device.exponentials


def equal_clusters(n: int, k: int) -> np.ndarray:
    return np.diff(np.linspace(0, n, k + 1).round().astype(np.int64))


def curves(device: Device) -> dict[str, list[float]]:
    """Seconds of CLIP's loss at each of SIZES."""
    lines = {
        "Inf-CL (tf32; it has no bf16)": [
            seconds(peer_clip(INF_CL[0], device.architecture, n, D), device, "tf32", D) for n in SIZES
        ],
        "memeff (bf16)": [seconds(peer_clip(MEMEFF[0], device.architecture, n, D), device, "bf16", D) for n in SIZES],
    }
    for k in (1, 10, 100):
        lines[f"mcl_kernels (bf16), {k} cluster{'s' if k > 1 else ''}"] = [
            seconds(own_clip(device.architecture, equal_clusters(n, k), D), device, "bf16", D) for n in SIZES
        ]
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
    panels[0].set_ylabel("time at the peak rates of the GPU, ms")
    figure.suptitle(f"A model, not a measurement: CLIP's loss and gradients, D = {D}", fontsize=11)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    figure.savefig(figure_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=IMAGES / "gpu_model.png")
    options = parser.parse_args()
    print(f"A model, not a measurement: CLIP's loss and gradients, D = {D}, ms at peak rates")
    for device in DEVICES:
        print(f"\n{device.name:<28}" + "".join(f"{n:>11,}" for n in SIZES))
        for label, line in curves(device).items():
            print(f"{label:<28}" + "".join(f"{1e3 * t:>11.3g}" for t in line))
    draw(options.figure)


if __name__ == "__main__":
    main()
