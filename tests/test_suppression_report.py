"""Tables, claims and pictures of experiments/suppression from JSONs alone: these are made up, nothing is trained."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from experiments.suppression import figures
from experiments.suppression.report import (
    cell,
    claims,
    group_runs,
    overview,
    read_runs,
    readme_table,
    sweep,
    write_report,
)
from experiments.suppression.settings import Settings
from mcl_kernels.cli.report import WRONG

DIGITS = (0.90, 0.93, 0.96)  # of three seeds
TRIFEATURE = {"shape": 0.9, "texture": 0.7, "color": 1.0}


def made_up(data: str, method: str, seed: int, probes: dict[str, float], **changes: Any) -> dict[str, Any]:
    """The JSON of a run whose encoders are each a little worse than all together."""
    settings = Settings.of(data, method, seed, **changes)
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 40 * seed, np.uint8)).save(buffer, format="PNG")
    n = settings.encoders
    encoder = {
        "probes": {name: value - 0.1 for name, value in probes.items()}, "curve": [1.0, 0.5], "label_sizes": [30, 20],
        "cluster_sizes": [30, 20], "clustering_seconds": 0.1, "seconds": 40.0, "loss_seconds": 4.0,
    }  # fmt: skip
    ranks = {way: {"1": 0.1, "5": 0.3 + 0.1 * seed, "10": 0.6} for way in ("image_to_text", "text_to_image")}
    clip = settings.objective == "clip"
    retrieved = {"encoders": [ranks] * n, "concatenation": ranks, "soup": ranks, "candidates": 20}
    return {
        "settings": asdict(settings), "name": settings.name,
        "versions": {"torch": "2.13.0"}, "processor": "a processor", "threads": 1, "commit": "abc1234",
        "samples": {"train": 50, "test": 20}, "classes": dict.fromkeys(probes, 10), "width": 128 * n,
        "encoders": [{**encoder, "name": f"stage {index}"} for index in range(n)],
        "ami": [[1.0 if i == j else 0.2 + 0.1 * seed for j in range(n)] for i in range(n)],
        "concatenation": probes, "soup": probes if clip and n > 1 else None,
        "retrieval": retrieved if clip else None,
        "neighbours": {
            "pictures": [base64.b64encode(buffer.getvalue()).decode()] * 4, "anchors": [0, 1],
            "indices": [[[1, 2, 3]] * 2] * n, "agree": [[[dict.fromkeys(probes, 1.0)] * 3] * 2] * n,
        },
    }  # fmt: skip


def controls(data: str = "randbits-8", mcl: Sequence[float] = DIGITS) -> list[dict[str, Any]]:
    """Three seeds of SimCLR, as wide, an ensemble and MCL."""
    methods = {
        "simclr": (0.1, 0.1, 0.1),
        "wide+simclr": (0.1, 0.1, 0.13),
        "ensemble+simclr": (0.1, 0.11, 0.12),
        "mcl+simclr": mcl,
    }
    return [
        made_up(data, method, seed, {"digit": value, "bits": 1.0})
        for method, values in methods.items()
        for seed, value in enumerate(values)
    ]


def write(runs: Sequence[dict[str, Any]], directory: Path) -> Path:
    for run in runs:
        settings = Settings(**run["settings"])
        path = directory / settings.data / f"{settings.file_name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))
    return directory


def heights(axes) -> list[float]:
    return [round(bar.get_height(), 6) for bar in axes.patches]


def test_cells_are_means_and_sample_deviations():
    assert cell([0.5]) == (0.5, 0.0, 1)
    assert str(cell([0.5])) == "0.500"
    mean, spread, n = cell(DIGITS)
    assert (mean, n) == (pytest.approx(0.93), 3)
    assert spread == pytest.approx(math.sqrt((0.03**2 + 0.03**2) / 2))
    assert str(cell(DIGITS)) == "0.930 ± 0.030"


def test_runs_are_read_and_grouped_over_seeds(tmp_path):
    runs = read_runs(write([*controls(), *controls("randbits-2")], tmp_path))
    groups = group_runs(runs[::-1])
    assert list(groups) == ["randbits-2", "randbits-8"]  # by number, not by letter: 12 comes after 8
    assert list(groups["randbits-8"]) == ["simclr", "wide+simclr", "ensemble+simclr", "mcl+simclr"]
    group = groups["randbits-8"]["mcl+simclr"]
    assert [run["settings"]["seed"] for run in group.runs] == [0, 1, 2]
    assert group.title == "MCL on SimCLR"
    assert group.probe("digit").mean == pytest.approx(0.93)
    assert group.probe_of(1, "digit").mean == pytest.approx(0.83)
    assert (group.least.mean, group.average.mean) == (pytest.approx(0.93), pytest.approx(0.965))
    assert (group.seconds.mean, group.loss_share, group.width) == (120, pytest.approx(0.1), 384)


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "Expecting"), ("[]", "settings is missing"), ('{"settings": {}}', "name is missing")]
)
def test_a_damaged_json_is_named(tmp_path, content, reason):
    path = write(controls(), tmp_path) / "randbits-8" / "simclr-seed7.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"simclr-seed7.json is not the result of a run \(.*{reason}.*; delete it"):
        read_runs(tmp_path)


@pytest.mark.parametrize("key", ["versions", "threads", "classes", "width", "retrieval"])
def test_whatever_the_report_reads_is_asked_for(tmp_path, key):
    run = controls()[0]
    del run[key]
    with pytest.raises(ValueError, match=rf"simclr-seed0.json .*\({key} is missing\)"):
        read_runs(write([run], tmp_path))


def test_runs_of_one_name_differ_in_their_seed_only():
    runs = controls()[:3]
    runs[1]["settings"]["epochs"] = 7
    with pytest.raises(ValueError, match="randbits-8 simclr: runs differ in epochs, not only in their seed"):
        group_runs(runs)


def test_claims_are_measured_and_may_fail():
    said = {claim.text: (claim.measured, claim.verdict) for claim in claims(group_runs(controls()))}
    assert said["randbits-8: SimCLR reads the digit at 0.20 or less"] == ("0.100 ± 0.000", "yes")
    assert said["randbits-8: MCL reads it at 0.90 or more"] == ("0.930 ± 0.030", "yes")
    assert said["randbits-8: MCL is above as many SimCLRs concatenated by 0.5 or more"] == ("0.820", "yes")
    assert said["randbits-8: digit under MCL on SimCLR at or above SimCLR"][1] == "yes"
    assert all(verdict == "yes" for _, verdict in said.values())
    low = {claim.text: claim.verdict for claim in claims(group_runs(controls(mcl=(0.01, 0.02, 0.03))))}
    assert list(low.values()).count("no") == 4  # two thresholds, and the digit below SimCLR and below the ensemble
    near = {claim.text: claim.verdict for claim in claims(group_runs(controls(mcl=(0.05, 0.1, 0.14))))}
    assert near["randbits-8: digit under MCL on SimCLR at or above SimCLR"] == "within the spread"
    assert claims(group_runs(controls("dominoes")))[0].text.startswith("dominoes: digit")
    assert claims({}) == []


def test_the_readme_table_has_what_was_run():
    groups = group_runs(
        [*controls(), made_up("trifeature-64", "simclr", 0, {"shape": 0.9, "texture": 0.7, "color": 1.0})]
    )
    header, _, simclr, *_, mcl = readme_table(groups).splitlines()
    assert header.startswith("| linear probes, mean of 1 to 3 seeds |")
    assert header.count("trifeature-64") == 3
    assert simclr == "| SimCLR | 0.10 | 1.00 | 0.90 | 0.70 | 1.00 |"
    assert mcl == "| **MCL, three stages, concatenated** | 0.93 | 1.00 |  |  |  |"


def test_the_overview_averages_only_whole_rows():
    groups = group_runs([*controls(), made_up("trifeature-64", "simclr", 0, TRIFEATURE)])
    rows = {title: (cells, average) for title, cells, average in overview(groups)}
    cells, average = rows["SimCLR"]
    assert [each.mean for each in cells] == pytest.approx([0.1, 1.0, 0.9, 0.7, 1.0])
    assert average == pytest.approx((0.1 + 1.0 + 0.9 + 0.7 + 1.0) / 5)
    cells, average = rows["MCL on SimCLR"]
    assert cells[2:] == [None] * 3
    assert average is None


def test_the_sweep_is_in_order_with_the_default_among_it():
    changed = [("clusters", 64), ("clusters", 4), ("layer", "projection")]
    runs = [
        made_up("randbits-8", "mcl+simclr", 0, {"digit": 0.5, "bits": 1.0}, **{name: value}) for name, value in changed
    ]
    found = sweep(group_runs([*controls(), *runs]))
    assert [value for value, _ in found["clusters"]] == [4, 16, 64]
    assert [value for value, _ in found["layer"]] == ["backbone", "projection"]
    assert found.keys() == {"clusters", "layer"}
    figure = figures.sweep(found)
    assert [axes.get_xlabel() for axes in figure.axes] == ["clusters", "layer"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx([0.5, 0.93, 0.5])
    assert sweep(group_runs(controls())) == {}


def test_figures_draw_the_numbers():
    groups = group_runs([*controls(), *controls("randbits-2", mcl=(0.5, 0.6, 0.7))])
    of = list(groups["randbits-8"].values())
    ensemble, mcl = figures.by_stage(of).axes  # what has one encoder only has no stages
    assert heights(ensemble) == pytest.approx([0.01] * 3 + [0.11] + [0.9] * 3 + [1.0])
    assert heights(mcl) == pytest.approx([0.83] * 3 + [0.93] + [0.9] * 3 + [1.0])
    dashed = [line.get_ydata()[0] for line in mcl.lines if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([0.1, 1.0])  # SimCLR's digit and bits
    assert mcl.get_title("left") == "MCL on SimCLR (dashed: SimCLR)"
    lines = figures.against_bits(groups)["randbits"].axes[0].get_legend_handles_labels()
    drawn = {label: line.lines[0].get_ydata().tolist() for line, label in zip(*lines, strict=True) if label != "chance"}
    assert drawn["MCL, concatenated"] == pytest.approx([0.6, 0.93])
    assert figures.against_bits(group_runs(controls())) == {}
    matrix = figures.agreement(of[2:]).axes[0].images[0].get_array()
    np.testing.assert_allclose(matrix, 0.3 + 0.7 * np.eye(3))
    assert heights(figures.label_sizes(of[3]).axes[0]) == [30, 20]
    clip = group_runs([made_up("emoji-captions", "mcl+clip", seed, {"category": 0.5}) for seed in (0, 1)])
    axes = figures.retrieval(list(clip["emoji-captions"].values())).axes
    assert heights(axes[0]) == pytest.approx([0.1, 0.35, 0.6] * 2)
    assert axes[0].get_legend_handles_labels()[1] == ["MCL on CLIP", "MCL on CLIP, soup of weights"]


def test_the_page_is_whole_and_has_no_empty_section(tmp_path):
    """Every section with its runs, none without; nothing outside the file is referred to."""
    runs = [
        *controls(),
        made_up("randbits-2", "simclr", 0, {"digit": 0.5, "bits": 1.0}),
        made_up("randbits-8", "mcl+simclr", 0, {"digit": 0.4321, "bits": 1.0}, clusters=4),
        made_up("emoji-captions", "clip", 0, {"category": 0.5}),
        made_up("trifeature-64", "ifm", 0, TRIFEATURE),
    ]
    text = write_report(group_runs(runs), tmp_path / "all" / "report.html").read_text()
    whole = (
        "Beside the paper",
        "Against the number of bits",
        "Number of clusters",
        "Retrieval among 20 held-out pairs",
    )
    for title in whole:
        assert title in text
    assert "0.930 ± 0.030" in text
    assert "0.432" in text
    assert text.count("http") == 0
    assert text.count("<img") == text.count('src="data:image/png;base64,')
    few = write_report(group_runs(runs[:3]), tmp_path / "few.html").read_text()
    for title in (
        "Beside the paper",
        "Against the number of bits",
        "Number of clusters",
        "Retrieval",
        "Agreement",
        "Nearest",
    ):
        assert title not in few
    assert "By stage" not in few
    assert "<img" not in few
    assert "<table" in few


def test_the_page_says_what_does_not_hold(tmp_path):
    """Beside the thresholds, not only in the list of all orderings, which is folded."""

    def page(*mcl: float) -> str:
        text = write_report(group_runs(controls(mcl=mcl)), tmp_path / "report.html").read_text()
        return " ".join(text.split())

    text = page(0.01, 0.02, 0.03)
    assert "that holds, exactly or by more than the spread, for 2 of 4 means; the others are in the table above" in text
    shown = text[: text.index("<details>")]
    assert shown.count('<td class="no">no</td>') == 4
    assert "<td>0.020 ± 0.010 against 0.100 ± 0.000</td>" in shown
    assert "for 4 of 4 means; none falls short" in page(*DIGITS)


def test_the_gallery_marks_each_feature_as_far_as_it_agrees():
    run = made_up("randbits-8", "mcl+simclr", 0, {"digit": 0.5, "bits": 1.0})
    run["neighbours"]["agree"] = [[[{"digit": 0.0, "bits": 0.25}] * 3] * 2] * 3
    (group,) = group_runs([run])["randbits-8"].values()
    axes = [each for each in figures.neighbour_gallery(group).axes if each.lines]
    assert len(axes) == 3 * 2 * 3
    assert [mark.get_markerfacecolor()[1] for mark in axes[0].lines] == [0.0, 0.25]
    assert to_hex(axes[0].spines["top"].get_edgecolor()) == WRONG


def test_the_readme_figure_of_somebody_elses_runs(tmp_path):
    for index, runs in enumerate(
        ([made_up("dominoes", "simclr", 0, {"digit": 0.5})], [made_up("emoji-captions", "clip", 0, {"category": 0.5})])
    ):
        assert figures.readme_figure(group_runs(runs), tmp_path / f"{index}.png").stat().st_size > 1000


def test_the_readme_figure(tmp_path):
    path = figures.readme_figure(group_runs([*controls(), *controls("randbits-2")]), tmp_path / "figure.png")
    with Image.open(path) as image:
        assert image.size[0] > image.size[1] > 300
