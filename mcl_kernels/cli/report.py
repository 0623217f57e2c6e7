"""The report of the demo: one HTML file with embedded pictures."""

from __future__ import annotations

import base64
import io
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from mcl_kernels._durable import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mcl_kernels.cli.demo_results import Results

CHANCE = 0.1
DIGIT, BIT, REFERENCE, CORRECT, WRONG = "#1b6ca8", "#d1603d", "#6b7280", "#2e8b57", "#c0392b"


def write_report(results: Results, path: Path) -> Path:
    """Writes the report of a run; returns its path. Replaces an older report in one step."""
    from jinja2 import Environment

    template = resources.files("mcl_kernels.cli").joinpath("report.html.jinja").read_text(encoding="utf-8")
    figures = {
        "accuracy": accuracy_by_stage(results),
        "ami": ami_matrix(results),
        "labels": label_distribution(results),
        "neighbours": neighbour_gallery(results),
    }
    html = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            results=results,
            rows=[results.ceiling, *results.stages, results.concatenated],
            figures={name: data_uri(figure) for name, figure in figures.items()},
        )
    )
    replace_file(path, html.encode())
    return path


def accuracy_by_stage(results: Results) -> Figure:
    """Bar chart of the digit and bit probes of each stage and of the concatenation, with the ceiling and chance."""
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    rows = [*results.stages, results.concatenated]
    positions = range(len(rows))
    for name, color, offset, values in (
        ("digit", DIGIT, -0.2, [row.digit_probe for row in rows]),
        ("bits (mean)", BIT, 0.2, [row.bit_probe or 0.0 for row in rows]),
    ):
        bars = axes.bar([position + offset for position in positions], values, width=0.38, color=color, label=name)
        for text in axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    ceiling = results.ceiling.digit_probe
    axes.axhline(ceiling, color=DIGIT, linestyle="--", linewidth=1, label=f"digit, no bits: {ceiling:.2f}")
    axes.axhline(CHANCE, color=REFERENCE, linestyle=":", linewidth=1, label=f"digit, chance: {CHANCE:.2f}")
    axes.set_xticks(positions, [row.name.replace(": ", "\n").replace(", ", ",\n") for row in rows])
    axes.set_ylabel("linear probe, held out")
    axes.set_ylim(0, 1.12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=4, frameon=False, fontsize=9)
    return figure


def ami_matrix(results: Results) -> Figure:
    """Matrix of the adjusted mutual information between the clusterings of the stages."""
    stages = len(results.stages)
    matrix = [[1.0] * stages for _ in range(stages)]
    for later, row in enumerate(results.stages):
        for earlier, value in enumerate(row.ami):
            matrix[later][earlier] = matrix[earlier][later] = value
    figure = new_figure(3.4, 3.0)
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    for i, line in enumerate(matrix):
        for j, value in enumerate(line):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    names = [f"stage {index}" for index in range(stages)]
    axes.set_xticks(range(stages), names)
    axes.set_yticks(range(stages), names)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def label_distribution(results: Results) -> Figure:
    """Bar charts of the samples per pseudo label during each stage, largest first."""
    figure = new_figure(2.4 * len(results.stages), 2.6)
    for index, row in enumerate(results.stages):
        axes = figure.add_subplot(1, len(results.stages), index + 1)
        sizes = sorted(row.label_sizes, reverse=True)
        axes.bar(range(len(sizes)), sizes, width=1.0 if len(sizes) > 1 else 0.4, color=DIGIT)
        plural = "" if len(sizes) == 1 else "s"
        axes.set_title(f"stage {index}: {len(sizes)} label{plural}", fontsize=10)
        axes.set_xticks([])
        if len(sizes) == 1:
            axes.set_xlim(-1, 1)
        axes.set_xlabel("pseudo labels, by size")
        if index == 0:
            axes.set_ylabel("samples")
    return figure


def neighbour_gallery(results: Results) -> Figure:
    """Nearest neighbours of held-out anchors by each stage's features, framed by whether the digit is the same."""
    anchors, stages, neighbours = results.neighbours.shape
    # One column for the anchor; then, for each stage, a gap and its neighbours.
    widths = [1.0] + [0.4, *[1.0] * neighbours] * stages
    figure = new_figure(0.82 * sum(widths), 0.9 * anchors + 0.3)
    grid = figure.add_gridspec(anchors, len(widths), width_ratios=widths)

    def show(row: int, column: int, sample: int, frame: str, title: str | None, note: str) -> None:
        axes = figure.add_subplot(grid[row, column])
        axes.imshow(results.images[sample, 0], cmap="gray", vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(note, fontsize=7, labelpad=2)
        for spine in axes.spines.values():
            spine.set(visible=True, color=frame, linewidth=2.5)
        if row == 0 and title:
            axes.set_title(title, fontsize=10)

    for row, anchor in enumerate(results.anchors.tolist()):
        show(row, 0, anchor, REFERENCE, "anchor", "")
        for stage in range(stages):
            for position, sample in enumerate(results.neighbours[row, stage].tolist()):
                same = bool(results.digits[sample] == results.digits[anchor])
                title = f"stage {stage}" if position == neighbours // 2 else None
                shared = int((results.bits[sample] == results.bits[anchor]).sum())
                column = 2 + stage * (neighbours + 1) + position
                show(row, column, sample, CORRECT if same else WRONG, title, f"{shared} of {results.settings.bits}")
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Empty figure of this size in inches; needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=140, layout="constrained")


def data_uri(figure: Figure) -> str:
    """Data URI of a figure, for the `src` of an image: the page then needs no other file."""
    for axes in figure.axes:
        if not axes.images:
            axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
