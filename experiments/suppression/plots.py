"""Figures of finished runs. Bars and points are means over seeds, whiskers the sample standard deviation."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.suppression.details import Details
from experiments.suppression.groups import Cell, Group, Groups, cell
from experiments.suppression.results import RECALL_AT, Recall
from experiments.suppression.settings import kind_of, number_in
from mcl_kernels._durable import replaced_file
from mcl_kernels.cli.report import CORRECT, REFERENCE, WRONG, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLORS = ("#1b6ca8", "#d1603d", "#2e8b57", "#8e5ea2", "#c9a227")
# Four uses of the same epochs: label, colour and marker.
CONTROL_STYLES = {
    "simclr": ("SimCLR", REFERENCE, "o"),
    "wide+simclr": ("SimCLR, three times as wide", "#a3a8b0", "s"),
    "ensemble+simclr": ("three SimCLR encoders, concatenated", COLORS[1], "^"),
    "mcl+simclr": ("three stages of MCL, concatenated", COLORS[0], "D"),
}


def by_stage(groups: Sequence[Group]) -> Figure:
    """Probes of each encoder and of all side by side: a row of bars for each method with several encoders.

    Dashed lines are the probes of one encoder with the same objective, if it was run.
    """
    several = [group for group in groups if len(group.runs[0].encoders) > 1]
    by_name = {group.name: group for group in groups}
    features = several[0].features
    figure = new_figure(9, 0.7 + 1.3 * len(several))
    panels = figure.subplots(len(several), 1, sharex=True, squeeze=False)[:, 0]
    columns = 1 + max(len(group.runs[0].encoders) for group in several)
    for axes, group in zip(panels, several, strict=True):
        control = by_name.get(group.settings.objective)
        for index, feature in enumerate(features):
            color = _color(index)
            cells = [group.encoder_probe(encoder, feature) for encoder in range(len(group.runs[0].encoders))]
            positions = [*range(len(cells)), columns - 1]
            _bars(axes, positions, [*cells, group.probe(feature)], (index, len(features)), color, feature)
            if control:
                axes.axhline(control.probe(feature).mean, color=color, linestyle="--", linewidth=1, zorder=0)
        axes.set_ylim(0, 1.3)
        axes.set_yticks([0, 0.5, 1])
        axes.set_title(group.title + (f" (dashed: {control.title})" if control else ""), loc="left", fontsize=9)
    nouns = {"mcl": "stage", "ensemble": "member"}
    noun = " or ".join(dict.fromkeys(nouns[group.settings.regime or ""] for group in several[::-1]))
    panels[-1].set_xticks(range(columns), [*(f"{noun} {index}" for index in range(columns - 1)), "side by side"])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(features), frameon=False, fontsize=9)
    return figure


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _bars(
    axes: Axes,
    positions: Iterable[int],
    cells: Sequence[Cell],
    series: tuple[int, int],
    color: str,
    label: str,
    size: float = 7,
) -> None:
    """Draws bars with their means above, next to those of other series; `series`: index, and number of series."""
    from matplotlib.patheffects import withStroke

    index, count = series
    width = 0.84 / count
    centers = [x + width * (index - (count - 1) / 2) for x in positions]
    means, spreads = [c.mean for c in cells], [c.spread for c in cells]
    bars = axes.bar(centers, means, width * 0.92, yerr=spreads, color=color, label=label, error_kw={"linewidth": 1})
    # A halo keeps lines behind a number, such as a control's, from striking it through.
    halo = [withStroke(linewidth=2, foreground="white")]
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=size, path_effects=halo)


def against_bits(groups: Groups) -> dict[str, Figure]:
    """Probe of the image against the number of bits, by kind of image; only for kinds with several numbers of bits."""
    figures = {}
    for kind in ("randbits", "fashion-randbits"):
        by_bits = groups_by_bits(groups, kind)
        if len(by_bits) > 1:
            figures[kind] = new_figure(4.8, 3.6)
            axes = figures[kind].subplots()
            draw_against_bits(axes, by_bits)
            axes.set_title(kind, fontsize=10)
    return figures


def groups_by_bits(groups: Groups, kind: str) -> dict[int, dict[str, Group]]:
    return {number_in(data): by_name for data, by_name in groups.items() if kind_of(data) == kind}


def draw_against_bits(axes: Axes, by_bits: dict[int, dict[str, Group]]) -> None:
    """Draws a line for each of `CONTROL_STYLES` over the number of bits."""
    for name, (label, color, marker) in CONTROL_STYLES.items():
        found = {bits: by_name[name] for bits, by_name in sorted(by_bits.items()) if name in by_name}
        if len(found) > 1:
            cells = [group.probe(group.features[0]) for group in found.values()]
            means, spreads = [c.mean for c in cells], [c.spread for c in cells]
            axes.errorbar(list(found), means, spreads, color=color, marker=marker, capsize=2, label=label)
    axes.axhline(0.1, color=REFERENCE, linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(sorted(by_bits))
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("bits next to each image")
    axes.set_ylabel("probe accuracy, class of the image")
    axes.legend(frameon=False, fontsize=9)


def agreement(groups: Sequence[Group]) -> Figure:
    """Adjusted mutual information of the encoders' clusters, mean over seeds."""
    columns = min(len(groups), 4)
    rows = -(-len(groups) // columns)
    figure = new_figure(max(3.2, 2.25 * columns), 2.6 * rows)
    for index, group in enumerate(groups):
        axes = figure.add_subplot(rows, columns, index + 1)
        n = len(group.runs[0].ami)
        matrix = [[sum(run.ami[i][j] for run in group.runs) / len(group.runs) for j in range(n)] for i in range(n)]
        axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
        for i, line in enumerate(matrix):
            for j, value in enumerate(line):
                color = "white" if value > 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
        axes.set_xticks(range(n))
        axes.set_yticks(range(n))
        axes.spines[:].set_visible(False)
        axes.set_title(group.title, fontsize=9)
    return figure


def label_sizes(details: Details) -> Figure:
    """Number of samples of each pseudo label during each stage, largest first."""
    figure = new_figure(2.4 * len(details.label_sizes), 2.3)
    panels = figure.subplots(1, len(details.label_sizes), squeeze=False)[0]
    for stage, (axes, label_counts) in enumerate(zip(panels, details.label_sizes, strict=True)):
        sizes = sorted(label_counts, reverse=True)
        axes.bar(range(len(sizes)), sizes, width=1.0 if len(sizes) > 1 else 0.4, color=COLORS[0])
        axes.set_title(f"stage {stage}: {len(sizes)} label{'s' * (len(sizes) > 1)}", fontsize=10)
        axes.set_xticks([])
        if len(sizes) == 1:
            axes.set_xlim(-1, 1)
    figure.supxlabel("pseudo labels, by size", fontsize=10)
    figure.supylabel("samples", fontsize=10)
    return figure


def loss_curves(details: Details) -> Figure:
    """Mean loss of each epoch, a line for each stage."""
    figure = new_figure(5, 2.6)
    axes = figure.subplots()
    for stage, curve in enumerate(details.curves):
        axes.plot(range(1, len(curve) + 1), curve, color=_color(stage), label=f"stage {stage}")
    axes.set_xlabel("epochs of the stage", fontsize=10)
    axes.set_ylabel("mean loss", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    return figure


def neighbour_gallery(details: Details, features: Sequence[str]) -> Figure:
    """Nearest neighbours of held-out anchors, by stage, framed by whether the first feature agrees.

    A mark below each neighbour stands for a feature. Its opacity is the share that agrees: half of the bits, half the
    colour.
    """
    from matplotlib.image import imread
    from matplotlib.patches import Patch

    found = details.neighbours
    pictures = [imread(io.BytesIO(base64.b64decode(picture)), format="png") for picture in found.pictures]
    stages, anchors, neighbours = len(found.indices), len(found.anchors), len(found.indices[0][0])
    widths = [1.0] + [0.35, *[1.0] * neighbours] * stages
    figure = new_figure(0.78 * sum(widths), 0.95 * anchors + 0.3)
    grid = figure.add_gridspec(anchors, len(widths), width_ratios=widths)

    def show(row: int, column: int, picture: int, frame: str, title: str | None) -> Axes:
        axes = figure.add_subplot(grid[row, column])
        axes.imshow(pictures[picture])
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=True, color=frame, linewidth=2.5)
        if row == 0 and title:
            axes.set_title(title, fontsize=10)
        return axes

    for row, anchor in enumerate(found.anchors):
        show(row, 0, anchor, REFERENCE, "anchor")
        for stage in range(stages):
            for order, picture in enumerate(found.indices[stage][row]):
                agrees = found.agreement[stage][row][order]
                title = f"stage {stage}" if order == neighbours // 2 else None
                frame = CORRECT if agrees[features[0]] == 1 else WRONG
                axes = show(row, 2 + stage * (neighbours + 1) + order, picture, frame, title)
                _draw_marks(axes, [agrees[feature] for feature in features])
    patches = [Patch(color=_color(index), label=feature) for index, feature in enumerate(features)]
    figure.legend(handles=patches, loc="outside lower right", ncols=len(features), frameon=False, fontsize=9)
    return figure


def _draw_marks(axes: Axes, shares: Sequence[float]) -> None:
    """Draws a mark for each feature below a picture, with the share that agrees as its opacity."""
    for index, share in enumerate(shares):
        x = 0.5 + 0.2 * (index - (len(shares) - 1) / 2)
        axes.plot(
            x, -0.16, "o", markersize=4.5, markerfacecolor=(_color(index), float(share)), markeredgecolor=_color(index),
            markeredgewidth=0.8, transform=axes.transAxes, clip_on=False,
        )  # fmt: skip


def retrieval(groups: Sequence[Group]) -> Figure:
    """R@1, 5 and 10 in both directions, for the concatenation of each method and for the soup of its weights."""
    bars: list[tuple[str, list[Recall]]] = []
    for group in groups:
        measured = [run.retrieval for run in group.runs if run.retrieval]
        bars.append((group.title, [one.concatenation for one in measured]))
        soups = [one.soup for one in measured if one.soup]
        if soups:
            bars.append((f"{group.title}, soup of weights", soups))
    figure = new_figure(10, 3.4)
    titles = {"image_to_text": "captions of an image", "text_to_image": "images of a caption"}
    for axes, (direction, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for index, (label, recalls) in enumerate(bars):
            cells = [cell(values) for values in zip(*(recall[direction] for recall in recalls), strict=True)]
            _bars(axes, range(len(RECALL_AT)), cells, (index, len(bars)), _color(index), label, 6)
        axes.set_xticks(range(len(RECALL_AT)), [f"R@{k}" for k in RECALL_AT])
        axes.margins(y=0.1)
        axes.set_title(title, fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def sweep(found: dict[str, list[tuple[Any, Group]]]) -> Figure:
    """The digit's probe of the concatenation, and of the best stage, for each value of each setting."""
    figure = new_figure(max(4.0, 2.0 * len(found)), 3.0)
    widths = [max(len(points), 3) + 1 for points in found.values()]  # 3: two words are as wide as three numbers
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, (setting, points) in zip(panels, found.items(), strict=True):
        groups = [group for _, group in points]
        feature = groups[0].features[0]
        concatenation = [group.probe(feature) for group in groups]
        best = [group.best_encoder_probe(feature) for group in groups]
        for cells, label, color in ((concatenation, "concatenation", COLORS[0]), (best, "best stage", COLORS[1])):
            means, spreads = [c.mean for c in cells], [c.spread for c in cells]
            axes.errorbar(range(len(cells)), means, spreads, color=color, marker="o", capsize=2, label=label)
        axes.set_xticks(range(len(points)), [str(value) for value, _ in points], fontsize=8)
        axes.set_xlim(-0.6, len(points) - 0.4)
        axes.set_xlabel(setting.replace("_", " "), fontsize=9)
    panels[0].set_ylabel("linear probe of the digit")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def probe_figure(groups: Groups, path: Path) -> Path:
    """Writes the figure of probes: four uses of the same epochs, on two data sets and against the number of bits.

    Results without these data sets are shown for their first data set.
    """
    figure = new_figure(10, 3.4)
    controls = {data: [name for name in CONTROL_STYLES if name in by_name] for data, by_name in groups.items()}
    shown = [data for data in ("randbits-8", "trifeature-64") if controls.get(data)]
    shown = shown or [next((data for data, names in controls.items() if names), next(iter(groups)))]
    by_bits = groups_by_bits(groups, "randbits")
    widths = [len(next(iter(groups[data].values())).features) for data in shown] + [2] * (len(by_bits) > 1)
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for axes, data in zip(panels, shown, strict=False):
        names = controls[data] or list(groups[data])[: len(COLORS)]
        features = groups[data][names[0]].features
        for index, name in enumerate(names):
            label, color, _ = CONTROL_STYLES.get(name, (groups[data][name].title, COLORS[index], ""))
            cells = [groups[data][name].probe(feature) for feature in features]
            _bars(axes, range(len(features)), cells, (index, len(names)), color, label)
        axes.set_xticks(range(len(features)), features)
        axes.set_ylim(0, 1.12)
        axes.set_title(data, fontsize=10)
    panels[0].set_ylabel("accuracy of a linear probe")
    if len(by_bits) > 1:
        draw_against_bits(panels[-1], by_bits)
        panels[-1].get_legend().remove()
        panels[-1].text(0.02, 0.12, "chance", color=REFERENCE, fontsize=9, transform=panels[-1].get_yaxis_transform())
        panels[-1].set_title("digit of randbits", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replaced_file(path) as file:
        figure.savefig(file, format="png")
    return path
