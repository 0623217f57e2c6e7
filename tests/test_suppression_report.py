"""Tables, claims, figures and the page of experiments/suppression, from made-up results."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from experiments.suppression import plots
from experiments.suppression.details import details_path, read_details, run_directory, write_details
from experiments.suppression.groups import cell, group_results
from experiments.suppression.page import write_page
from experiments.suppression.tables import claims, overview, probe_table, sweep
from mcl_kernels.cli.report import WRONG
from tests.made_up_results import DIGITS, TRIFEATURE, controls, made_up, made_up_details


def heights(axes) -> list[float]:
    return [round(bar.get_height(), 6) for bar in axes.patches]


def test_cells_are_means_and_sample_deviations():
    assert cell([0.5]) == (0.5, 0.0, 1)
    assert str(cell([0.5])) == "0.500"
    mean, spread, n = cell(DIGITS)
    assert (mean, n) == (pytest.approx(0.93), 3)
    assert spread == pytest.approx(math.sqrt((0.03**2 + 0.03**2) / 2))
    assert str(cell(DIGITS)) == "0.930 ± 0.030"


def test_runs_are_grouped_over_seeds():
    groups = group_results([*controls(), *controls("randbits-2")][::-1])
    assert list(groups) == ["randbits-2", "randbits-8"]  # by number
    assert list(groups["randbits-8"]) == ["simclr", "wide+simclr", "ensemble+simclr", "mcl+simclr"]
    group = groups["randbits-8"]["mcl+simclr"]
    assert [run.settings.seed for run in group.runs] == [0, 1, 2]
    assert group.title == "MCL on SimCLR"
    assert group.probe("digit").mean == pytest.approx(0.93)
    assert group.encoder_probe(1, "digit").mean == pytest.approx(0.83)
    assert group.best_encoder_probe("digit").mean == pytest.approx(0.83)
    assert (group.lowest.mean, group.average.mean) == (pytest.approx(0.93), pytest.approx(0.965))
    assert (group.seconds.mean, group.loss_share) == (120, pytest.approx(0.1))


def test_details_are_read_as_they_were_written(tmp_path):
    settings = controls()[0].settings
    assert read_details(settings, tmp_path) is None
    run_directory(settings, tmp_path).mkdir(parents=True)
    details = made_up_details(3, {"digit": 0.0, "bits": 0.25})
    write_details(details, settings, tmp_path)
    assert read_details(settings, tmp_path) == details


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"neighbours": {}}'])
def test_damaged_details_are_named(tmp_path, content):
    settings = controls()[0].settings
    path = details_path(settings, tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"details.json does not hold the details of a run \(.*; delete it"):
        read_details(settings, tmp_path)


def test_claims_are_measured_and_can_fail():
    verdicts = {claim.text: (claim.measured, claim.verdict) for claim in claims(group_results(controls()))}
    assert verdicts["randbits-8: SimCLR reads the digit at 0.20 or less"] == ("0.100 ± 0.000", "yes")
    assert verdicts["randbits-8: MCL reads it at 0.90 or more"] == ("0.930 ± 0.030", "yes")
    assert verdicts["randbits-8: MCL is above an ensemble of as many SimCLRs by 0.5 or more"] == ("0.820", "yes")
    assert verdicts["randbits-8: digit under MCL on SimCLR at or above SimCLR"][1] == "yes"
    assert all(verdict == "yes" for _, verdict in verdicts.values())
    low = {claim.text: claim.verdict for claim in claims(group_results(controls(mcl=(0.01, 0.02, 0.03))))}
    assert list(low.values()).count("no") == 4  # two thresholds, and the digit below SimCLR and below the ensemble
    near = {claim.text: claim.verdict for claim in claims(group_results(controls(mcl=(0.05, 0.1, 0.14))))}
    assert near["randbits-8: digit under MCL on SimCLR at or above SimCLR"] == "within the spread"
    assert claims(group_results(controls("dominoes")))[0].text.startswith("dominoes: digit")
    assert claims({}) == []


def test_the_probe_table_has_the_results_of_the_runs():
    groups = group_results(
        [*controls(), made_up("trifeature-64", "simclr", 0, {"shape": 0.9, "texture": 0.7, "color": 1.0})]
    )
    header, _, digit, *_, color = probe_table(groups).splitlines()
    assert header.startswith("| probe | SimCLR | SimCLR, three times as wide |")
    assert digit.startswith("| randbits-8: digit | 0.100 ± 0.000 |")
    assert digit.endswith("| 0.930 ± 0.030 |")
    assert color == "| trifeature-64: color | 1.000 |  |  |  |"


def test_the_overview_averages_only_complete_rows():
    groups = group_results([*controls(), made_up("trifeature-64", "simclr", 0, TRIFEATURE)])
    rows = {title: (cells, average) for title, cells, average in overview(groups)}
    cells, average = rows["SimCLR"]
    assert [each.mean for each in cells] == pytest.approx([0.1, 1.0, 0.9, 0.7, 1.0])
    assert average == pytest.approx((0.1 + 1.0 + 0.9 + 0.7 + 1.0) / 5)
    cells, average = rows["MCL on SimCLR"]
    assert cells[2:] == [None] * 3
    assert average is None


def test_the_sweep_is_in_order_and_has_the_default():
    changed = [("clusters", 64), ("clusters", 4), ("layer", "projection")]
    runs = [
        made_up("randbits-8", "mcl+simclr", 0, {"digit": 0.5, "bits": 1.0}, **{name: value}) for name, value in changed
    ]
    found = sweep(group_results([*controls(), *runs]))
    assert [value for value, _ in found["clusters"]] == [4, 16, 64]
    assert [value for value, _ in found["layer"]] == ["backbone", "projection"]
    assert found.keys() == {"clusters", "layer"}
    figure = plots.sweep(found)
    assert [axes.get_xlabel() for axes in figure.axes] == ["clusters", "layer"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx([0.5, 0.93, 0.5])
    assert sweep(group_results(controls())) == {}


def test_figures_draw_the_results():
    groups = group_results([*controls(), *controls("randbits-2", mcl=(0.5, 0.6, 0.7))])
    methods = list(groups["randbits-8"].values())
    ensemble, mcl = plots.by_stage(methods).axes  # a method with one encoder has no stages
    assert heights(ensemble) == pytest.approx([0.01] * 3 + [0.11] + [0.9] * 3 + [1.0])
    assert heights(mcl) == pytest.approx([0.83] * 3 + [0.93] + [0.9] * 3 + [1.0])
    dashed = [line.get_ydata()[0] for line in mcl.lines if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([0.1, 1.0])  # SimCLR's digit and bits
    assert mcl.get_title("left") == "MCL on SimCLR (dashed: SimCLR)"
    lines = plots.against_bits(groups)["randbits"].axes[0].get_legend_handles_labels()
    drawn = {label: line.lines[0].get_ydata().tolist() for line, label in zip(*lines, strict=True) if label != "chance"}
    assert drawn["three stages of MCL, concatenated"] == pytest.approx([0.6, 0.93])
    assert plots.against_bits(group_results(controls())) == {}
    matrix = plots.agreement(methods[2:]).axes[0].images[0].get_array()
    np.testing.assert_allclose(matrix, 0.3 + 0.7 * np.eye(3))
    details = made_up_details(3, {"digit": 1.0})
    assert heights(plots.label_sizes(details).axes[0]) == [30, 20]
    assert [line.get_ydata().tolist() for line in plots.loss_curves(details).axes[0].lines] == [[1.0, 0.5]] * 3
    clip = group_results([made_up("emoji-captions", "mcl+clip", seed, {"category": 0.5}) for seed in (0, 1)])
    axes = plots.retrieval(list(clip["emoji-captions"].values())).axes
    assert heights(axes[0]) == pytest.approx([0.1, 0.35, 0.6] * 2)
    assert axes[0].get_legend_handles_labels()[1] == ["MCL on CLIP", "MCL on CLIP, soup of weights"]


def test_the_page_has_the_sections_of_its_runs(tmp_path):
    """Each section that has runs, and no other. The page refers to no other file."""
    runs = [
        *controls(),
        made_up("randbits-2", "simclr", 0, {"digit": 0.5, "bits": 1.0}),
        made_up("randbits-8", "mcl+simclr", 0, {"digit": 0.4321, "bits": 1.0}, clusters=4),
        made_up("emoji-captions", "clip", 0, {"category": 0.5}),
        made_up("trifeature-64", "ifm", 0, TRIFEATURE),
    ]
    text = write_page(group_results(runs), tmp_path / "all" / "report.html", tmp_path).read_text()
    common = ("Compared with the paper", "against the number of bits", "Number of clusters", "Retrieval", "Agreement")
    for title in (*common, "Retrieval among 20 held-out pairs"):
        assert title in text
    assert "0.930 ± 0.030" in text
    assert "0.432" in text
    assert text.count("http") == 0
    assert text.count("<img") == text.count('src="data:image/png;base64,')
    few = write_page(group_results(runs[:3]), tmp_path / "few.html", tmp_path).read_text()
    for title in (*common, "Nearest", "By stage", "<img"):
        assert title not in few
    assert "<table" in few


def test_the_page_shows_details_or_the_command_that_makes_them(tmp_path):
    groups = group_results(controls())
    text = " ".join(write_page(groups, tmp_path / "report.html", tmp_path).read_text().split())
    assert "details of MCL on SimCLR, seed 0, are not in this directory" in text
    assert "make suppression RUNS=&#34;randbits-8 mcl+simclr --seeds 0 --details&#34;" in text
    assert "<h3>Nearest neighbours</h3>" not in text
    settings = groups["randbits-8"]["mcl+simclr"].runs[1].settings
    run_directory(settings, tmp_path).mkdir(parents=True)
    write_details(made_up_details(3, {"digit": 1.0, "bits": 0.5}), settings, tmp_path)
    text = write_page(groups, tmp_path / "report.html", tmp_path).read_text()
    for title in ("Loss of each stage", "Pseudo labels during each stage", "Nearest neighbours"):
        assert f"<h3>{title}</h3>" in text
    assert text.count("MCL on SimCLR, seed 1") == 3
    assert "--details" not in text


def test_the_page_lists_claims_that_do_not_hold(tmp_path):
    """They are next to the thresholds, not only in the folded list of all orderings."""

    def page(*mcl: float) -> str:
        text = write_page(group_results(controls(mcl=mcl)), tmp_path / "report.html", tmp_path).read_text()
        return " ".join(text.split())

    text = page(0.01, 0.02, 0.03)
    assert "above by more than the spread, for 2 of 4 means; the others are in the table above" in text
    shown = text[: text.index("<details>")]
    assert shown.count('<td class="no">no</td>') == 4
    assert "<td>0.020 ± 0.010 against 0.100 ± 0.000</td>" in shown
    assert "for 4 of 4 means; none falls short" in page(*DIGITS)


def test_the_gallery_marks_the_agreement_of_each_feature():
    details = made_up_details(3, {"digit": 0.0, "bits": 0.25})
    axes = [each for each in plots.neighbour_gallery(details, ["digit", "bits"]).axes if each.lines]
    assert len(axes) == 3 * 2 * 3
    assert [mark.get_markerfacecolor()[1] for mark in axes[0].lines] == [0.0, 0.25]
    assert to_hex(axes[0].spines["top"].get_edgecolor()) == WRONG


def test_the_probe_figure_of_other_data(tmp_path):
    for index, runs in enumerate(
        ([made_up("dominoes", "simclr", 0, {"digit": 0.5})], [made_up("emoji-captions", "clip", 0, {"category": 0.5})])
    ):
        assert plots.probe_figure(group_results(runs), tmp_path / f"{index}.png").stat().st_size > 1000


def test_the_probe_figure(tmp_path):
    path = plots.probe_figure(group_results([*controls(), *controls("randbits-2")]), tmp_path / "figure.png")
    with Image.open(path) as image:
        assert image.size[0] > image.size[1] > 300
