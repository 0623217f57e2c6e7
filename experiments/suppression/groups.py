"""Groups of results: runs that differ only in their seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.suppression.results import RunResult
from experiments.suppression.settings import DEFAULTS, RunSettings, kind_of, number_in

OBJECTIVE_TITLES = {
    "simclr": "SimCLR", "moco": "MoCo-v2", "clip": "CLIP", "ifm": "IFM", "ts": "TS", "fd": "FD", "dcl": "DCL",
    "debiased": "Debiased", "hard": "Hard negatives", "isogclr": "iSogCLR",
}  # fmt: skip
REGIME_TITLES = {"": "{}", "wide": "{}, as wide", "ensemble": "{} ensemble", "mcl": "MCL on {}"}


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
    """The runs of one data set and one name, sorted by seed."""

    data: str
    name: str
    runs: Sequence[RunResult]

    def over_seeds(self, read: Callable[[RunResult], float]) -> Cell:
        return cell([read(run) for run in self.runs])

    @property
    def settings(self) -> RunSettings:
        """Settings of the first seed."""
        return self.runs[0].settings

    @property
    def is_default(self) -> bool:
        """True if all settings are the defaults of the data."""
        return " " not in self.name

    @property
    def title(self) -> str:
        """Name for readers: `MCL on SimCLR clusters=32`."""
        method, *changes = self.name.split(" ")
        regime, _, objective = method.rpartition("+")
        return " ".join([REGIME_TITLES[regime].format(OBJECTIVE_TITLES.get(objective, objective)), *changes])

    @property
    def features(self) -> list[str]:
        return list(self.runs[0].concatenation)

    def probe(self, feature: str) -> Cell:
        """Accuracy of a feature, of all encoders side by side."""
        return self.over_seeds(lambda run: run.concatenation[feature])

    def encoder_probe(self, encoder: int, feature: str) -> Cell:
        return self.over_seeds(lambda run: run.encoders[encoder].probes[feature])

    def best_encoder_probe(self, feature: str) -> Cell:
        return self.over_seeds(lambda run: max(encoder.probes[feature] for encoder in run.encoders))

    @property
    def lowest(self) -> Cell:
        """Lowest probe of all features: how far the most suppressed one is read."""
        return self.over_seeds(lambda run: min(run.concatenation.values()))

    @property
    def average(self) -> Cell:
        return self.over_seeds(lambda run: statistics.fmean(run.concatenation.values()))

    @property
    def seconds(self) -> Cell:
        return self.over_seeds(lambda run: sum(encoder.seconds for encoder in run.encoders))

    @property
    def loss_share(self) -> float:
        """Share of the training time that the loss takes."""
        encoders = [encoder for run in self.runs for encoder in run.encoders]
        return sum(e.loss_seconds for e in encoders) / sum(e.seconds for e in encoders)


Groups = dict[str, dict[str, Group]]  # by data and name


def group_results(results: Sequence[RunResult]) -> Groups:
    """Groups results over seeds, sorted by data, variations of settings last, then by objective and regime."""
    found: dict[tuple[str, str], list[RunResult]] = {}
    for result in results:
        found.setdefault((result.settings.data, result.settings.name), []).append(result)
    groups: Groups = {}
    for data, name in sorted(found, key=_order):
        runs = sorted(found[data, name], key=lambda run: run.settings.seed)
        groups.setdefault(data, {})[name] = Group(data, name, runs)
    return groups


def _order(key: tuple[str, str]) -> tuple[Any, ...]:
    data, name = key
    regime, _, objective = name.split(" ")[0].rpartition("+")
    kinds, objectives, regimes = list(DEFAULTS), list(OBJECTIVE_TITLES), list(REGIME_TITLES)
    position = objectives.index(objective) if objective in objectives else len(objectives)
    return kinds.index(kind_of(data)), number_in(data), " " in name, position, regimes.index(regime), name
