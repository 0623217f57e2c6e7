"""Pictures of finished runs. Bars and points are means over seeds, whiskers the sample standard deviation."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.suppression.report import Cell, Group, Groups, cell
from experiments.suppression.settings import kind_of
from mcl_kernels._durable import replaced_file
from mcl_kernels.cli.report import CORRECT, REFERENCE, WRONG, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLORS = ("#1b6ca8", "#d1603d", "#2e8b57", "#8e5ea2", "#c9a227")
WAYS = {  # of spending the same epochs
    "simclr": ("SimCLR", REFERENCE, "o"),
    "wide+simclr": ("SimCLR, as wide", "#a3a8b0", "s"),
    "ensemble+simclr": ("SimCLRs, concatenated", COLORS[1], "^"),
    "mcl+simclr": ("MCL, concatenated", COLORS[0], "D"),
}


def by_stage(groups: Sequence[Group]) -> Figure:
    """Probes of each encoder and of all side by side, a row of bars for each method that has several.

    Dashed lines are what one encoder of the same objective reads, where it was run.
    """
    many = [group for group in groups if len(group.runs[0]["encoders"]) > 1]
    alone = {group.name: group for group in groups}
    features = many[0].features
    figure = new_figure(9, 0.7 + 1.3 * len(many))
    rows = figure.subplots(len(many), 1, sharex=True, squeeze=False)[:, 0]
    columns = 1 + max(len(group.runs[0]["encoders"]) for group in many)
    for axes, group in zip(rows, many, strict=True):
        control = alone.get(group.settings.objective)
        for place, feature in enumerate(features):
            color = COLORS[place % len(COLORS)]
            cells = [group.probe_of(index, feature) for index in range(len(group.runs[0]["encoders"]))]
            at = [*range(len(cells)), columns - 1]
            _bars(axes, at, [*cells, group.probe(feature)], place, len(features), color, feature)
            if control:
                axes.axhline(control.probe(feature).mean, color=color, linestyle="--", linewidth=1, zorder=0)
        axes.set_ylim(0, 1.3)
        axes.set_yticks([0, 0.5, 1])
        axes.set_title(group.title + (f" (dashed: {control.title})" if control else ""), loc="left", fontsize=9)
    nouns = {"mcl": "stage", "ensemble": "member"}
    noun = " or ".join(dict.fromkeys(nouns[group.settings.regime or ""] for group in many[::-1]))
    rows[-1].set_xticks(range(columns), [*(f"{noun} {index}" for index in range(columns - 1)), "side by side"])
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(features), frameon=False, fontsize=9)
    return figure


def _bars(
    axes: Axes, at: Sequence[int], cells: Sequence[Cell], place: int, of: int, color: str, label: str, size: float = 7
) -> None:
    """The bars of one series, the `place`-th `of` so many beside each other, with their means above them."""
    from matplotlib.patheffects import withStroke

    width = 0.84 / of
    positions = [x + width * (place - (of - 1) / 2) for x in at]
    means, spreads = [c.mean for c in cells], [c.spread for c in cells]
    bars = axes.bar(positions, means, width * 0.92, yerr=spreads, color=color, label=label, error_kw={"linewidth": 1})
    # What is behind a number, such as a control's line, must not strike it through.
    halo = [withStroke(linewidth=2, foreground="white")]
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=size, path_effects=halo)


def against_bits(groups: Groups) -> dict[str, Figure]:
    """The probe of the image against the number of bits, by kind of image; only where there are several numbers."""
    drawn = {}
    for kind in ("randbits", "fashion-randbits"):
        of = {int(data.rpartition("-")[2]): found for data, found in groups.items() if kind_of(data) == kind}
        if len(of) > 1:
            drawn[kind] = new_figure(4.8, 3.6)
            axes = drawn[kind].subplots()
            draw_against_bits(axes, of)
            axes.set_title(kind, fontsize=10)
    return drawn


def draw_against_bits(axes: Axes, of: dict[int, dict[str, Group]]) -> None:
    """Lines of `WAYS` over the number of bits."""
    for name, (label, color, marker) in WAYS.items():
        cells = {
            bits: found[name].probe(found[name].features[0]) for bits, found in sorted(of.items()) if name in found
        }
        if len(cells) > 1:
            means, spreads = [c.mean for c in cells.values()], [c.spread for c in cells.values()]
            axes.errorbar(list(cells), means, spreads, color=color, marker=marker, capsize=2, label=label)
    axes.axhline(0.1, color=REFERENCE, linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(sorted(of))
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("bits beside each image")
    axes.set_ylabel("linear probe of the image's class")
    axes.legend(frameon=False, fontsize=9)


def agreement(groups: Sequence[Group]) -> Figure:
    """Adjusted mutual information of the encoders' clusters, mean over seeds."""
    columns = min(len(groups), 4)
    rows = -(-len(groups) // columns)
    figure = new_figure(max(3.2, 2.25 * columns), 2.6 * rows)
    for place, group in enumerate(groups):
        axes = figure.add_subplot(rows, columns, place + 1)
        n = len(group.runs[0]["ami"])
        matrix = [[sum(run["ami"][i][j] for run in group.runs) / len(group.runs) for j in range(n)] for i in range(n)]
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


def label_sizes(group: Group) -> Figure:
    """Samples of each pseudo label during each stage, largest first; the first seed's."""
    encoders = group.runs[0]["encoders"]
    figure = new_figure(2.4 * len(encoders), 2.3)
    for axes, encoder in zip(figure.subplots(1, len(encoders), squeeze=False)[0], encoders, strict=True):
        sizes = sorted(encoder["label_sizes"], reverse=True)
        axes.bar(range(len(sizes)), sizes, width=1.0 if len(sizes) > 1 else 0.4, color=COLORS[0])
        axes.set_title(f"{encoder['name']}: {len(sizes)} label{'s' * (len(sizes) > 1)}", fontsize=10)
        axes.set_xticks([])
        if len(sizes) == 1:
            axes.set_xlim(-1, 1)
    figure.supxlabel("pseudo labels, by size", fontsize=10)
    figure.supylabel("samples", fontsize=10)
    return figure


def neighbour_gallery(group: Group) -> Figure:
    """Nearest neighbours of held-out anchors, by stage, of the first seed; framed by whether the first feature agrees.

    Below each a mark for every feature, as full as it agrees: half of the bits are half of the colour.
    """
    from matplotlib.image import imread
    from matplotlib.patches import Patch

    found = group.runs[0]["neighbours"]
    features = group.features
    pictures = [imread(io.BytesIO(base64.b64decode(picture)), format="png") for picture in found["pictures"]]
    stages, anchors, neighbours = len(found["indices"]), len(found["anchors"]), len(found["indices"][0][0])
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

    for row, anchor in enumerate(found["anchors"]):
        show(row, 0, anchor, REFERENCE, "anchor")
        for stage in range(stages):
            for rank, picture in enumerate(found["indices"][stage][row]):
                agrees = found["agree"][stage][row][rank]
                title = f"stage {stage}" if rank == neighbours // 2 else None
                frame = CORRECT if agrees[features[0]] == 1 else WRONG
                axes = show(row, 2 + stage * (neighbours + 1) + rank, picture, frame, title)
                for place, feature in enumerate(features):
                    color = COLORS[place % len(COLORS)]
                    face = (color, float(agrees[feature]))
                    at = 0.5 + 0.2 * (place - (len(features) - 1) / 2)
                    axes.plot(
                        at, -0.16, "o", markersize=4.5, markerfacecolor=face, markeredgecolor=color,
                        markeredgewidth=0.8, transform=axes.transAxes, clip_on=False,
                    )  # fmt: skip
    marks = [Patch(color=COLORS[place % len(COLORS)], label=feature) for place, feature in enumerate(features)]
    figure.legend(handles=marks, loc="outside lower right", ncols=len(features), frameon=False, fontsize=9)
    return figure


def retrieval(groups: Sequence[Group]) -> Figure:
    """R@1, 5 and 10 both ways, for the concatenation of each method, and the soup of its weights where there is one."""
    bars: list[tuple[str, list[Any]]] = []
    for group in groups:
        for part in ("concatenation", "soup"):
            if group.runs[0]["retrieval"][part]:
                title = group.title + (", soup of weights" if part == "soup" else "")
                bars.append((title, [run["retrieval"][part] for run in group.runs]))
    figure = new_figure(10, 3.4)
    ways = {"image_to_text": "captions of an image", "text_to_image": "images of a caption"}
    for axes, (way, text) in zip(figure.subplots(1, 2, sharey=True), ways.items(), strict=True):
        for place, (title, measured) in enumerate(bars):
            cells = [cell([one[way][k] for one in measured]) for k in ("1", "5", "10")]
            _bars(axes, range(3), cells, place, len(bars), COLORS[place % len(COLORS)], title, 6)
        axes.set_xticks(range(3), ["R@1", "R@5", "R@10"])
        axes.margins(y=0.1)
        axes.set_title(text, fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def sweep(found: dict[str, list[tuple[Any, Group]]]) -> Figure:
    """The digit's probe of the concatenation, and of the best stage, for each value of each setting."""
    figure = new_figure(max(4.0, 2.0 * len(found)), 3.0)
    widths = [max(len(at), 3) + 1 for at in found.values()]  # 3: two words need as much as three numbers
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, (setting, at) in zip(panels, found.items(), strict=True):
        feature = at[0][1].features[0]
        joined = [group.probe(feature) for _, group in at]
        best = [
            group.over_seeds(lambda run, f=feature: max(e["probes"][f] for e in run["encoders"])) for _, group in at
        ]
        for cells, label, color in ((joined, "concatenation", COLORS[0]), (best, "best stage", COLORS[1])):
            means, spreads = [c.mean for c in cells], [c.spread for c in cells]
            axes.errorbar(range(len(at)), means, spreads, color=color, marker="o", capsize=2, label=label)
        axes.set_xticks(range(len(at)), [str(value) for value, _ in at], fontsize=8)
        axes.set_xlim(-0.6, len(at) - 0.4)
        axes.set_xlabel(setting.replace("_", " "), fontsize=9)
    panels[0].set_ylabel("linear probe of the digit")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def readme_figure(groups: Groups, path: Path) -> Path:
    """Four ways to spend the same epochs: every feature of two data sets, and the digit against the bits beside it."""
    figure = new_figure(10, 3.4)
    known = {data: [name for name in WAYS if name in of] for data, of in groups.items()}
    shown = [data for data in ("randbits-8", "trifeature-64") if known.get(data)]
    # Of somebody's own runs, which need not be those of the README, the first data set.
    shown = shown or [next((data for data, ways in known.items() if ways), next(iter(groups)))]
    bits = {int(d.rpartition("-")[2]): of for d, of in groups.items() if kind_of(d) == "randbits"}
    widths = [len(next(iter(groups[data].values())).features) for data in shown] + [2] * (len(bits) > 1)
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for axes, data in zip(panels, shown, strict=False):
        ways = known[data] or list(groups[data])[: len(COLORS)]
        features = groups[data][ways[0]].features
        for place, name in enumerate(ways):
            label, color, _ = WAYS.get(name, (groups[data][name].title, COLORS[place], ""))
            cells = [groups[data][name].probe(feature) for feature in features]
            _bars(axes, range(len(features)), cells, place, len(ways), color, label)
        axes.set_xticks(range(len(features)), features)
        axes.set_ylim(0, 1.12)
        axes.set_title(data, fontsize=10)
    panels[0].set_ylabel("linear probe, held out")
    if len(bits) > 1:
        draw_against_bits(panels[-1], bits)
        panels[-1].get_legend().remove()
        panels[-1].set_title("randbits: digit", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replaced_file(path) as file:
        figure.savefig(file, format="png")
    return path
