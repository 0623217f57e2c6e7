"""Time and peak memory of NT-Xent within clusters against the batch size: `python -m benchmarks.batch_size`.

Each point is one forward and backward pass of the loss alone on N samples (2N rows), in a fresh process: the median
of several passes, and the peak resident memory above that before the first one. Writes batch_size.csv and draws
batch_size.png from it; `--draw` draws only.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels import nt_xent

HERE = Path(__file__).parent
CSV, FIGURE = HERE / "batch_size.csv", HERE / "batch_size.png"
FEATURES, CLUSTERS, TEMPERATURE = 128, 10, 0.2
# 256: the smallest batch anybody trains SimCLR with; 16,384: a batch that the dense mask makes impractical.
SAMPLES = (256, 512, 1024, 2048, 4096, 8192, 16384)
LARGEST_DENSE = 8192  # a step takes 11 s and 4.3 GiB there, and four times both at the next size


def dense_mask(view_a: Tensor, view_b: Tensor, labels: Tensor) -> Tensor:
    """What people write: all logits, then a mask."""
    n = len(view_a)
    z = F.normalize(torch.cat((view_a, view_b)), dim=1)
    logits = z @ z.T / TEMPERATURE
    both, sample = labels.repeat(2), torch.arange(n).repeat(2)
    positive = logits[torch.arange(2 * n), (torch.arange(2 * n) + n) % (2 * n)]
    negative = (both[:, None] == both) & (sample[:, None] != sample)
    return torch.logaddexp(positive, logits.masked_fill(~negative, -math.inf).logsumexp(1)).sub(positive).mean()


def loop_over_clusters(view_a: Tensor, view_b: Tensor, labels: Tensor) -> Tensor:
    """The best plain PyTorch: the dense loss of each cluster by itself."""
    total = view_a.new_zeros(())
    for label in labels.unique():
        members = labels == label
        a, b = view_a[members], view_b[members]
        total = total + dense_mask(a, b, labels[members]) * len(a)
    return total / len(view_a)


def ours(view_a: Tensor, view_b: Tensor, labels: Tensor) -> Tensor:
    return nt_xent(view_a, view_b, labels, temperature=TEMPERATURE)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mcl_kernels, auto": ours,
    "eager, dense mask": dense_mask,
    "eager, loop over clusters": loop_over_clusters,
}


def measure(name: str, n: int) -> dict[str, float]:
    """Seconds (p20, p50, p80) and peak MiB of one loss, in this process."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, FEATURES, generator=generator, requires_grad=True) for _ in range(2)]
    labels = torch.randint(0, CLUSTERS, (n,), generator=generator)

    def step(size: int) -> float:
        started = time.perf_counter()
        loss = LOSSES[name](inputs[0][:size], inputs[1][:size], labels[:size])
        torch.autograd.grad(loss, inputs)
        return time.perf_counter() - started

    step(64)  # loads what is loaded on first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _status("VmRSS")
    first = step(n)
    peak = _status("VmHWM") - before
    seconds = sorted(step(n) for _ in range(max(3, min(20, int(5 / first)))))
    p20, p80 = (seconds[round(q * (len(seconds) - 1))] for q in (0.2, 0.8))
    return {"p20": p20, "p50": statistics.median(seconds), "p80": p80, "peak_mib": peak / 1024}


def _status(field: str) -> int:
    """A line of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def conditions() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE
    )
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "features": FEATURES, "clusters": CLUSTERS, "dtype": "float32", "threads": torch.get_num_threads(),
        "processor": model[0] if model else platform.processor(), "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit.stdout.strip(),
    }  # fmt: skip


def run() -> None:
    rows = []
    for n in SAMPLES:
        for name in LOSSES:
            if name == "eager, dense mask" and n > LARGEST_DENSE:
                continue
            point = [sys.executable, "-m", "benchmarks.batch_size", "--point", name, str(n)]
            result = subprocess.run(point, capture_output=True, text=True, check=True, cwd=HERE.parent)
            row = {"loss": name, "samples": n, **json.loads(result.stdout)}
            print(f"{name:<28} N {n:>6}  {1e3 * row['p50']:>9.1f} ms  {row['peak_mib']:>8.0f} MiB", flush=True)
            rows.append({**row, **conditions()})
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw() -> None:
    from matplotlib.figure import Figure

    with CSV.open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(9, 3.6), dpi=140, layout="constrained")
    panels = figure.subplots(1, 2)
    columns = (("p50", 1e3, "time of forward + backward, ms"), ("peak_mib", 1.0, "peak memory above the inputs, MiB"))
    for axes, (column, unit, label) in zip(panels, columns, strict=True):
        for name, color, marker in zip(LOSSES, ("#1b6ca8", "#c0392b", "#6b7280"), "osD", strict=True):
            points = [(int(row["samples"]), unit * float(row[column])) for row in rows if row["loss"] == name]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(SAMPLES, [f"{n:,}" for n in SAMPLES], rotation=30)
        axes.set_xlabel("batch size N (2N rows)")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--point", nargs=2, metavar=("LOSS", "N"), help="measure one point and print JSON")
    parser.add_argument("--draw", action="store_true", help="only draw the figure from the CSV")
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options.point[0], int(options.point[1]))))
        return
    if not options.draw:
        run()
    draw()


if __name__ == "__main__":
    main()
