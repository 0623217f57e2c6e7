"""Draws the figure of whole k-means fits from clustering.csv."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import read_rows

FIGURE_CASE = "mnist-100"
STYLES = {
    "ours": ("mcl_kernels", "#1b6ca8", "o"),
    "ours, no bounds": ("mcl_kernels, bounds=False", "#7fb3d5", "o"),
    "scikit-learn, lloyd": ("scikit-learn, lloyd", "#c0392b", "s"),
    "scikit-learn, elkan": ("scikit-learn, elkan", "#e59866", "s"),
    "scikit-learn-intelex": ("scikit-learn-intelex", "#7d3c98", "^"),
    "faiss": ("faiss", "#6b7280", "D"),
    "superkmeans": ("superkmeans", "#1e8449", "v"),
}


def draw(results: Path, figure_path: Path) -> None:
    """Draws the time of a whole fit against its iterations, log-log; the last point of each line has converged."""
    from matplotlib.figure import Figure

    rows = [row for row in read_rows(results) if row["case"] == FIGURE_CASE and row["mode"] != "k-means++"]
    if not rows:
        raise SystemExit(f"no rows of {FIGURE_CASE} in {results}: run `python -m benchmarks.clustering {FIGURE_CASE}`")
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, (label, color, marker) in STYLES.items():
        points = sorted((int(row["iterations"]), float(row["p50"])) for row in rows if row["contender"] == name)
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({int(row["iterations"]) for row in rows if row["contender"] == "ours"})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("iterations; the last point: until convergence")
    axes.set_ylabel("seconds of the whole fit")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    shape = "MNIST, {n:,} x {d}, K = {k}, float32, {threads} threads, same initial centres"
    numbers = {name: int(rows[0][name]) for name in ("n", "d", "k", "threads")}
    axes.set_title(shape.format(**numbers), fontsize=11)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(figure_path)
