"""Tables of the results: verdicts on the claims, the overview of all methods, the sweep, and the table of probes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.markdown import markdown
from experiments.suppression.groups import Cell, Group, Groups
from experiments.suppression.suite import SWEEP, SWEEP_DATA

OVERVIEW_DATA = ("randbits-8", "trifeature-64", "dominoes", "emoji")
# Linear probes from the table of "Learning the Unlearned" (arXiv 2402.11816v3); its data recipes are not public.
PAPER: dict[str, dict[str, float]] = {
    "simclr": {"shape": 0.81, "texture": 0.99, "color": 1.00},
    "ifm": {"shape": 0.99, "texture": 0.99, "color": 1.00},
    "ts": {"shape": 0.93, "texture": 1.00, "color": 1.00},
    "fd": {"shape": 0.75, "texture": 0.73, "color": 0.78},
    "mcl+simclr": {"shape": 1.00, "texture": 1.00, "color": 1.00},
}


class Claim(NamedTuple):
    text: str
    measured: str
    verdict: str  # "yes", "no", or "within the spread" of the seeds


def claims(groups: Groups) -> list[Claim]:
    """Expected results, each with its verdict."""
    return [*threshold_claims(groups), *ordering_claims(groups)]


def threshold_claims(groups: Groups) -> Iterator[Claim]:
    """Claims about how much SimCLR suppresses on randbits-8, and how much of it MCL recovers."""
    by_name = groups.get("randbits-8", {})
    if "simclr" in by_name:
        digit = by_name["simclr"].probe("digit")
        yield Claim("randbits-8: SimCLR reads the digit at 0.20 or less", str(digit), _verdict(digit.mean <= 0.20))
    if "mcl+simclr" in by_name:
        digit = by_name["mcl+simclr"].probe("digit")
        yield Claim("randbits-8: MCL reads it at 0.90 or more", str(digit), _verdict(digit.mean >= 0.90))
        if "ensemble+simclr" in by_name:
            gain = digit.mean - by_name["ensemble+simclr"].probe("digit").mean
            text = "randbits-8: MCL is above an ensemble of as many SimCLRs by 0.5 or more"
            yield Claim(text, f"{gain:.3f}", _verdict(gain >= 0.5))


def ordering_claims(groups: Groups) -> Iterator[Claim]:
    """Claims that MCL is at or above its baseline and an ensemble in every feature, as it is in the paper."""
    for data, by_name in groups.items():
        for name, group in by_name.items():
            if not name.startswith("mcl+") or not group.is_default:
                continue
            for control in (name.removeprefix("mcl+"), name.replace("mcl+", "ensemble+")):
                if control not in by_name:
                    continue
                for feature in group.features:
                    ours, theirs = group.probe(feature), by_name[control].probe(feature)
                    gain = ours.mean - theirs.mean
                    unclear = 0 < abs(gain) <= math.hypot(ours.spread, theirs.spread)
                    verdict = "within the spread" if unclear else _verdict(gain >= 0)
                    text = f"{data}: {feature} under {group.title} at or above {by_name[control].title}"
                    yield Claim(text, f"{ours} against {theirs}", verdict)


def _verdict(holds: bool) -> str:
    return "yes" if holds else "no"


def overview_columns(groups: Groups) -> list[tuple[str, str]]:
    """Data sets and features of the tables that show several data sets."""
    return [
        (data, feature)
        for data in OVERVIEW_DATA
        for feature in (next(iter(groups[data].values())).features if data in groups else ())
    ]


def overview(groups: Groups) -> list[tuple[str, list[Cell | None], float | None]]:
    """Rows in the paper's layout: a method, its probe in each of `overview_columns`, the average if it has all."""
    columns = overview_columns(groups)
    titles = {name: group.title for data, _ in columns for name, group in groups[data].items() if group.is_default}
    rows = []
    for name, title in titles.items():
        cells = [groups[data][name].probe(feature) if name in groups[data] else None for data, feature in columns]
        means = [cell.mean for cell in cells if cell]
        rows.append((title, cells, statistics.fmean(means) if len(means) == len(columns) else None))
    return rows


def probe_table(groups: Groups) -> str:
    """Markdown table: a row for each of `overview_columns`, a column for each of four uses of the same epochs."""
    titles = {
        "simclr": "SimCLR",
        "wide+simclr": "SimCLR, three times as wide",
        "ensemble+simclr": "three SimCLR encoders, concatenated",
        "mcl+simclr": "three stages of MCL, concatenated",
    }
    body = []
    for data, feature in overview_columns(groups):
        values = [str(groups[data][name].probe(feature)) if name in groups[data] else "" for name in titles]
        body.append([f"{data}: {feature}", *values])
    return markdown(["probe", *titles.values()], body)


def sweep(groups: Groups) -> dict[str, list[tuple[Any, Group]]]:
    """Values of each setting in order, each with its group; the default is among them."""
    by_name = groups.get(SWEEP_DATA, {})
    default = by_name.get("mcl+simclr")
    if default is None:
        return {}
    found = {}
    for setting in SWEEP:
        points = [(getattr(default.settings, setting), default)]
        for name, group in by_name.items():
            method, *changes = name.split(" ")
            if method == "mcl+simclr" and len(changes) == 1 and changes[0].startswith(f"{setting}="):
                points.append((getattr(group.settings, setting), group))
        if len(points) > 1:
            found[setting] = sorted(points, key=lambda point: point[0])
    return found
