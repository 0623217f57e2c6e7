"""From the JSONs of finished runs to tables, claims and one self-contained page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.suppression.experiments import SWEEP, SWEPT
from experiments.suppression.settings import DEFAULTS, Settings, kind_of
from mcl_kernels._durable import replace_file

Run = dict[str, Any]
KEYS = (
    "settings", "name", "versions", "processor", "threads", "commit", "samples", "classes", "width", "encoders", "ami",
    "concatenation", "retrieval", "neighbours",
)  # fmt: skip
# Linear probes from the table of "Learning the Unlearned" (arXiv 2402.11816v3); its data recipes are not public.
PAPER: dict[str, dict[str, float]] = {
    "simclr": {"shape": 0.81, "texture": 0.99, "color": 1.00},
    "ifm": {"shape": 0.99, "texture": 0.99, "color": 1.00},
    "ts": {"shape": 0.93, "texture": 1.00, "color": 1.00},
    "fd": {"shape": 0.75, "texture": 0.73, "color": 0.78},
    "mcl+simclr": {"shape": 1.00, "texture": 1.00, "color": 1.00},
}
NAMES = {
    "simclr": "SimCLR", "moco": "MoCo-v2", "clip": "CLIP", "ifm": "IFM", "ts": "TS", "fd": "FD", "dcl": "DCL",
    "debiased": "Debiased", "hard": "Hard negatives", "isogclr": "iSogCLR",
}  # fmt: skip
MEANINGS = {"mcl": "MCL on {}", "ensemble": "{} ensemble", "wide": "{}, as wide"}


class Cell(NamedTuple):
    """A number over seeds."""

    mean: float
    spread: float  # sample standard deviation; 0 for one seed
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.n == 1 else f"{self.mean:.3f} ± {self.spread:.3f}"


def cell(values: Sequence[float]) -> Cell:
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class Group:
    """The runs of one data set and one name, which differ in their seed."""

    data: str
    name: str
    runs: Sequence[Run]

    def over_seeds(self, read: Callable[[Run], float]) -> Cell:
        return cell([read(run) for run in self.runs])

    @property
    def settings(self) -> Settings:
        return Settings(**self.runs[0]["settings"])

    @property
    def title(self) -> str:
        """`MCL on SimCLR clusters=32`."""
        method, *changes = self.name.split(" ")
        regime, _, objective = method.rpartition("+")
        return " ".join([MEANINGS.get(regime, "{}").format(NAMES.get(objective, objective)), *changes])

    @property
    def features(self) -> list[str]:
        return list(self.runs[0]["concatenation"])

    def probe(self, feature: str) -> Cell:
        """Of everything an approach has: all encoders side by side."""
        return self.over_seeds(lambda run: run["concatenation"][feature])

    def probe_of(self, encoder: int, feature: str) -> Cell:
        return self.over_seeds(lambda run: run["encoders"][encoder]["probes"][feature])

    @property
    def least(self) -> Cell:
        """The feature that is suppressed most."""
        return self.over_seeds(lambda run: min(run["concatenation"].values()))

    @property
    def average(self) -> Cell:
        return self.over_seeds(lambda run: statistics.fmean(run["concatenation"].values()))

    @property
    def seconds(self) -> Cell:
        return self.over_seeds(lambda run: sum(encoder["seconds"] for encoder in run["encoders"]))

    @property
    def loss_share(self) -> float:
        encoders = [encoder for run in self.runs for encoder in run["encoders"]]
        return sum(e["loss_seconds"] for e in encoders) / sum(e["seconds"] for e in encoders)

    @property
    def width(self) -> int:
        return int(self.runs[0]["width"])


Groups = dict[str, dict[str, Group]]  # by data and name


class Claim(NamedTuple):
    text: str
    measured: str
    verdict: str  # "yes", "no", or "within the spread" of the seeds


def read_runs(directory: Path) -> list[Run]:
    """The JSONs below a directory, by data, name and seed.

    Raises:
        ValueError: a file that is not a run's JSON, which is named.
    """
    runs = []
    for path in sorted(directory.glob("*/*.json")):
        try:
            run = json.loads(path.read_text())
            missing = [key for key in KEYS if key not in run]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not the result of a run ({error}); delete it to measure again") from None
        if missing:
            raise ValueError(f"{path} is not the result of a run ({missing[0]} is missing); delete it to measure again")
        runs.append(run)
    return runs


def group_runs(runs: Sequence[Run]) -> Groups:
    """Runs that differ in their seed together; plain methods first, then what was made of them, then variations.

    Raises:
        ValueError: runs of one name that differ in more than their seed, as after a change of the defaults.
    """
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run["settings"]["data"], run["name"]), []).append(run)

    def order(item: tuple[tuple[str, str], list[Run]]) -> tuple[Any, ...]:
        data, name = item[0]
        regime, _, objective = name.split(" ")[0].rpartition("+")
        bits = data.rpartition("-")[2]
        place = list(NAMES).index(objective) if objective in NAMES else len(NAMES)
        number = int(bits) if bits.isdigit() else 0
        kind = list(DEFAULTS).index(kind_of(data))
        return kind, number, " " in name, place, ["", "wide", "ensemble", "mcl"].index(regime), name

    groups: Groups = {}
    for (data, name), members in sorted(found.items(), key=order):
        first = members[0]["settings"]
        differing = {key for run in members for key, value in run["settings"].items() if value != first.get(key)}
        if differing - {"seed"}:
            what = ", ".join(sorted(differing - {"seed"}))
            raise ValueError(f"{data} {name}: runs differ in {what}, not only in their seed; delete those to run again")
        groups.setdefault(data, {})[name] = Group(data, name, sorted(members, key=lambda run: run["settings"]["seed"]))
    return groups


def claims(groups: Groups) -> list[Claim]:
    """What should show, and whether it does."""
    return [*thresholds(groups), *orderings(groups)]


def thresholds(groups: Groups) -> Iterator[Claim]:
    """How much is suppressed, and how much of it MCL gets back."""
    of = groups.get("randbits-8", {})
    if "simclr" in of:
        digit = of["simclr"].probe("digit")
        yield Claim("randbits-8: SimCLR reads the digit at 0.20 or less", str(digit), _said(digit.mean <= 0.20))
    if "mcl+simclr" in of:
        digit = of["mcl+simclr"].probe("digit")
        yield Claim("randbits-8: MCL reads it at 0.90 or more", str(digit), _said(digit.mean >= 0.90))
        if "ensemble+simclr" in of:
            control = of["ensemble+simclr"].probe("digit")
            text = "randbits-8: MCL is above as many SimCLRs concatenated by 0.5 or more"
            yield Claim(text, f"{digit.mean - control.mean:.3f}", _said(digit.mean - control.mean >= 0.5))


def orderings(groups: Groups) -> Iterator[Claim]:
    """Every feature, with MCL and without: the paper has MCL at or above what it stands on everywhere."""
    for data, of in groups.items():
        for name, group in of.items():
            if not name.startswith("mcl+") or " " in name:
                continue
            for control in (name.removeprefix("mcl+"), name.replace("mcl+", "ensemble+")):
                if control not in of:
                    continue
                for feature in group.features:
                    ours, theirs = group.probe(feature), of[control].probe(feature)
                    above = ours.mean - theirs.mean
                    unclear = 0 < abs(above) <= math.hypot(ours.spread, theirs.spread)
                    verdict = "within the spread" if unclear else _said(above >= 0)
                    text = f"{data}: {feature} under {group.title} at or above {of[control].title}"
                    yield Claim(text, f"{ours} against {theirs}", verdict)


def _said(holds: bool) -> str:
    return "yes" if holds else "no"


def columns_of(groups: Groups) -> list[tuple[str, str]]:
    """The data sets and features that the tables over several data sets show."""
    return [
        (data, feature)
        for data in ("randbits-8", "trifeature-64", "dominoes", "emoji")
        for feature in (next(iter(groups[data].values())).features if data in groups else ())
    ]


def overview(groups: Groups) -> list[tuple[str, list[Cell | None], float | None]]:
    """Rows of the paper's layout: a method, its probe of each of `columns_of`, their average where it has them all."""
    columns = columns_of(groups)
    titles = {name: g.title for data, _ in columns for name, g in groups[data].items() if " " not in name}
    rows = []
    for name, title in titles.items():
        cells = [groups[data][name].probe(feature) if name in groups[data] else None for data, feature in columns]
        means = [each.mean for each in cells if each]
        rows.append((title, cells, statistics.fmean(means) if len(means) == len(columns) else None))
    return rows


def readme_table(groups: Groups) -> str:
    """Markdown: a row for each of the four ways to spend the same epochs, a column for each of `columns_of`."""
    columns = columns_of(groups)
    rows = {
        "simclr": "SimCLR",
        "wide+simclr": "SimCLR, as many dimensions",
        "ensemble+simclr": "three SimCLRs, concatenated",
        "mcl+simclr": "**MCL, three stages, concatenated**",
    }
    seeds = sorted({len(groups[data][name].runs) for data, _ in columns for name in rows if name in groups[data]})
    number = " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1]))) if seeds else "no"
    lines = [
        f"| linear probes, mean of {number} seed{'s' * (seeds != [1])} | "
        + " | ".join(f"{data} {feature}" for data, feature in columns)
        + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name, title in rows.items():
        values = [f"{groups[data][name].probe(f).mean:.2f}" if name in groups[data] else "" for data, f in columns]
        lines.append(f"| {title} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def sweep(groups: Groups) -> dict[str, list[tuple[Any, Group]]]:
    """By setting: its values in order, with the runs of each; the default among them."""
    found = {}
    for data, of in groups.items():
        default = of.get("mcl+simclr")
        if data != SWEPT or default is None:
            continue
        for setting in SWEEP:
            at = [(getattr(default.settings, setting), default)]
            for name, group in of.items():
                changes = name.split(" ")
                if changes[0] == "mcl+simclr" and len(changes) == 2 and changes[1].startswith(f"{setting}="):
                    at.append((getattr(group.settings, setting), group))
            if len(at) > 1:
                found[setting] = sorted(at)
    return found


def write_report(groups: Groups, path: Path) -> Path:
    """One page with its pictures inside; returns its path. Overwrites an older one in one step."""
    from jinja2 import Environment

    from experiments.suppression import figures
    from mcl_kernels.cli.report import data_uri

    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    sections = [_section(data, of) for data, of in groups.items()]
    against = {kind: data_uri(figure) for kind, figure in figures.against_bits(groups).items()}
    swept = sweep(groups)
    html = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            thresholds=list(thresholds(groups)), orderings=list(orderings(groups)), columns=columns_of(groups),
            overview=overview(groups), sections=sections, against=against, sweep=swept,
            sweep_figure=data_uri(figures.sweep(swept)) if swept else None,
            paper=PAPER, names=NAMES, trifeature=groups.get("trifeature-64", {}),
            conditions=sorted({_conditions(run) for of in groups.values() for g in of.values() for run in g.runs}),
        )
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, html.encode())
    return path


def _section(data: str, of: dict[str, Group]) -> dict[str, Any]:
    """What the page says of one data set; None for a figure that its runs do not have."""
    from experiments.suppression import figures
    from mcl_kernels.cli.report import data_uri

    plain = [group for name, group in of.items() if " " not in name]
    several = [group for group in plain if len(group.runs[0]["encoders"]) > 1]
    shown = next((group for group in several if group.settings.regime == "mcl"), None)
    retrieved = [group for group in plain if group.runs[0]["retrieval"]]
    any_group = next(iter(of.values()))
    return {
        "data": data,
        "aside": kind_of(data).endswith("randbits") and data != SWEPT,
        "groups": plain,
        "rows": [group for group in of.values() if data != SWEPT or not group.name.startswith("mcl+simclr ")],  # swept
        "features": any_group.features,
        "chance": {name: 1 / classes for name, classes in any_group.runs[0]["classes"].items()},
        "by_stage": data_uri(figures.by_stage(plain)) if several else None,
        "ami": data_uri(figures.agreement(several)) if several else None,
        "shown": shown,
        "labels": data_uri(figures.label_sizes(shown)) if shown else None,
        "neighbours": data_uri(figures.neighbour_gallery(shown)) if shown and shown.runs[0]["neighbours"] else None,
        "retrieval": data_uri(figures.retrieval(retrieved)) if retrieved else None,
        "retrieved": retrieved,
    }


def _conditions(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"{run['processor']}, {run['threads']} thread; {versions}; commit {run['commit']}"
