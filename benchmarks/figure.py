"""Draws the figure of batch sizes from results.csv."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import read_rows

# Peers of the case "batch-size", and the single point of "cubic-memory": that peer has no larger batch.
STYLES = {
    "ours": ("mcl_kernels", "#1b6ca8", "o"),
    "eager, dense mask": ("PyTorch, dense mask", "#c0392b", "s"),
    "eager, loop over clusters": ("PyTorch, loop over clusters", "#6b7280", "D"),
    "pytorch-metric-learning": ("pytorch-metric-learning, largest N in 4 GiB", "#7d3c98", "^"),
}


def draw(results: Path, figure_path: Path) -> None:
    """Draws time and peak memory against batch size, log-log, each with its limit."""
    from matplotlib.figure import Figure

    rows = [row for row in read_rows(results) if row["case"] in ("batch-size", "cubic-memory")]
    swept = [row for row in rows if row["case"] == "batch-size"]
    if not swept:
        raise SystemExit(f"no rows of the case batch-size in {results}: run `python -m benchmarks batch-size`")
    sizes = sorted({int(row["n"]) for row in swept})
    ours = [row for row in swept if row["peer"] == "ours"]

    def line(axes, chosen: list[dict[str, str]], value: Callable[[dict[str, str]], float], **style) -> None:
        points = sorted((int(row["n"]), value(row)) for row in chosen)
        if points:
            axes.plot(*zip(*points, strict=True), **style)

    def milliseconds(row: dict[str, str]) -> float:
        return 1e3 * float(row["p50"])

    def mebibytes(row: dict[str, str]) -> float:
        return float(row["peak_bytes"]) / 2**20

    def limit(row: dict[str, str]) -> float:
        return milliseconds(row) * float(row["fraction_of_limit"])

    def memory_bound(row: dict[str, str]) -> float:
        return 5 * 2 * int(row["n"]) * int(row["d"]) * 4 / 2**20

    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    time, memory = figure.subplots(1, 2)
    for axes, value in ((time, milliseconds), (memory, mebibytes)):
        for peer, (label, color, marker) in STYLES.items():
            # "cubic-memory" also has a row of ours, which is not part of the sweep.
            source = rows if peer == "pytorch-metric-learning" else swept
            chosen = [row for row in source if row["peer"] == peer]
            line(axes, chosen, value, color=color, marker=marker, markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=30)
        axes.minorticks_off()
        axes.set_xlabel("batch size N")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    thin = {"color": "black", "linewidth": 1}
    speed = "limit: minimal operations at the speed of a large matrix product"
    bound = "bound on the memory of mcl_kernels: 10 N D fp32 values"
    line(time, ours, limit, **thin, linestyle="--", label=speed)
    line(memory, ours, memory_bound, **thin, linestyle=":", label=bound)
    time.set_title("time of forward and backward, ms", fontsize=10)
    memory.set_title("peak memory above that of the inputs, MiB", fontsize=10)
    title = "NT-Xent within {clusters} clusters, D = {d}, {dtype}, {threads} threads"
    figure.suptitle(title.format(**ours[0]), fontsize=11)
    lines = {each.get_label(): each for axes in (time, memory) for each in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(figure_path)
