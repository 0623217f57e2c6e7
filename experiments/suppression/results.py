"""results.csv: one row for each finished run, with its settings, its conditions and every number of the tables.

`probed` lists the features that the data set has, `classes` their numbers of classes. Each feature has three columns:
`probe_x` of all encoders side by side, `encoder_probe_x` of each encoder, `soup_probe_x` of averaged weights. A column
with several values separates them by spaces: one for each encoder; recall at 1, 5 and 10, of one encoder after the
other; the adjusted mutual information of encoders 0 and 1, 0 and 2, ..., 1 and 2, and so on. Numbers have full
precision. A cell is empty where a run has no such value.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from experiments.suppression.settings import DEFAULTS, RunSettings, kind_of, number_in
from mcl_kernels._durable import replace_file

PACKAGES = ("torch", "numpy", "scikit-learn")
RECALL_AT = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
Probes = dict[str, float]  # accuracy by feature
Recall = dict[str, list[float]]  # recall at each of RECALL_AT, by direction
Row = dict[str, str]


@dataclass(frozen=True)
class EncoderResult:
    """Results of one encoder.

    Attributes:
        probes: accuracy by feature of the data, from this encoder's output alone.
        seconds: time of training.
        loss_seconds: time of the loss alone, its backward pass included.
        clustering_seconds: time of k-means on its features.
        commit: commit at which it was trained; empty if that was not recorded.
    """

    probes: Probes
    seconds: float
    loss_seconds: float
    clustering_seconds: float
    commit: str = ""


@dataclass(frozen=True)
class Retrieval:
    """Recall of captions by images and of images by captions among the held-out pairs."""

    encoders: list[Recall]
    concatenation: Recall
    soup: Recall | None


@dataclass(frozen=True)
class RunResult:
    """Results of a run.

    Attributes:
        commit: commit at which it was measured.
        versions: versions of Python and of `PACKAGES`.
        train_samples: number of training samples.
        test_samples: number of held-out samples, which are the candidates of retrieval.
        dimensions: width of all encoders' outputs side by side.
        classes: number of classes by feature.
        ami: adjusted mutual information of the clusters of each pair of encoders.
        concatenation: probes of all encoders side by side.
        soup: probes of the encoder whose weights are the average of all encoders'.
    """

    settings: RunSettings
    commit: str
    versions: dict[str, str]
    processor: str
    threads: int
    train_samples: int
    test_samples: int
    dimensions: int
    classes: dict[str, int]
    encoders: list[EncoderResult]
    ami: list[list[float]]
    concatenation: Probes
    soup: Probes | None
    retrieval: Retrieval | None


def read_results(path: Path) -> list[RunResult]:
    """Returns the results of a CSV in the order of its rows; none if there is no file.

    Raises:
        ValueError: a row that is not the result of a run, named by its line.
    """
    if not path.exists():
        return []
    results = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            try:
                results.append(_from_row(row))
            except KeyError as error:
                raise _damaged(path, reader.line_num, f"no column {error}") from None
            except (ValueError, TypeError, AttributeError) as error:
                raise _damaged(path, reader.line_num, str(error)) from None
    return results


def _damaged(path: Path, line: int, reason: str) -> ValueError:
    return ValueError(f"{path}, line {line}: not the result of a run ({reason}); delete the line to measure it again")


def add_result(path: Path, result: RunResult) -> None:
    """Adds a row in one step, in place of an earlier one with the same settings. Other processes wait meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(path.parent):
        others = [other for other in read_results(path) if other.settings != result.settings]
        write_results(path, [*others, result])


def write_results(path: Path, results: Iterable[RunResult]) -> None:
    """Writes a CSV in one step, sorted by data, name and seed."""
    rows = [_to_row(result) for result in sorted(results, key=_order)]
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())


def _order(result: RunResult) -> tuple[Any, ...]:
    settings = result.settings
    kind = list(DEFAULTS).index(kind_of(settings.data))
    return kind, number_in(settings.data), settings.name, settings.seed


def _columns(rows: Sequence[Row]) -> list[str]:
    """Columns of all rows; the probes of each feature are together, in the place of the first probe."""
    features = dict.fromkeys(feature for row in rows for feature in row["probed"].split())
    probes = [f"{part}probe_{feature}" for feature in features for part in ("", "encoder_", "soup_")]
    named = list(rows[0])
    first_probe = next(index for index, name in enumerate(named) if "probe_" in name)
    others = [name for name in named if "probe_" not in name]
    return [*others[:first_probe], *probes, *others[first_probe:]]


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Waits until no other process is in such a block of this directory."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _to_row(result: RunResult) -> Row:
    retrieval = result.retrieval
    row: dict[str, Any] = {
        **asdict(result.settings),
        "train_samples": result.train_samples,
        "test_samples": result.test_samples,
        "dimensions": result.dimensions,
        "probed": list(result.concatenation),
        "classes": [result.classes[feature] for feature in result.concatenation],
    }
    for feature, accuracy in result.concatenation.items():
        row[f"probe_{feature}"] = accuracy
        row[f"encoder_probe_{feature}"] = [encoder.probes[feature] for encoder in result.encoders]
        row[f"soup_probe_{feature}"] = result.soup and result.soup[feature]
    for way in DIRECTIONS:
        row[f"recall_{way}"] = retrieval and retrieval.concatenation[way]
        row[f"encoder_recall_{way}"] = retrieval and [value for one in retrieval.encoders for value in one[way]]
        row[f"soup_recall_{way}"] = retrieval and retrieval.soup and retrieval.soup[way]
    row["ami"] = [result.ami[i][j] for i, j in combinations(range(len(result.ami)), 2)]
    for name in ("seconds", "loss_seconds", "clustering_seconds"):
        row[name] = [getattr(encoder, name) for encoder in result.encoders]
    row |= {"processor": result.processor, "threads": result.threads, **result.versions, "commit": result.commit}
    row["encoder_commits"] = [encoder.commit for encoder in result.encoders if encoder.commit]
    return {name: _cell(value) for name, value in row.items()}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    return " ".join(map(_cell, value))


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str, "int": int, "float": float, "int | None": lambda text: int(text) if text else None,
}  # fmt: skip


def _from_row(row: Row) -> RunResult:
    settings = RunSettings(**{field.name: _PARSERS[str(field.type)](row[field.name]) for field in fields(RunSettings)})
    n = settings.encoders
    probed = row["probed"].split()
    encoder_probes = {feature: _floats(row[f"encoder_probe_{feature}"], n) for feature in probed}
    seconds = zip(*(_floats(row[f"{name}seconds"], n) for name in ("", "loss_", "clustering_")), strict=True)
    commits = row["encoder_commits"].split() or [""] * n
    encoders = [
        EncoderResult({feature: encoder_probes[feature][index] for feature in probed}, *times, commit)
        for index, (times, commit) in enumerate(zip(seconds, commits, strict=True))
    ]
    soup = {feature: float(row[f"soup_probe_{feature}"]) for feature in probed if row[f"soup_probe_{feature}"]}
    return RunResult(
        settings=settings,
        commit=row["commit"],
        versions={name: row[name] for name in ("python", *PACKAGES)},
        processor=row["processor"],
        threads=int(row["threads"]),
        train_samples=int(row["train_samples"]),
        test_samples=int(row["test_samples"]),
        dimensions=int(row["dimensions"]),
        classes=dict(zip(probed, map(int, row["classes"].split()), strict=True)),
        encoders=encoders,
        ami=_symmetric(_floats(row["ami"], n * (n - 1) // 2), n),
        concatenation={feature: float(row[f"probe_{feature}"]) for feature in probed},
        soup=soup or None,
        retrieval=_retrieval(row, n),
    )


def _floats(cell: str, count: int) -> list[float]:
    values = [float(value) for value in cell.split()]
    if len(values) != count:
        raise ValueError(f"expected {count} values: got {cell!r}")
    return values


def _symmetric(pairs: Sequence[float], n: int) -> list[list[float]]:
    """Matrix of 1 on the diagonal and of `pairs`, row by row, on both sides of it."""
    matrix = [[1.0] * n for _ in range(n)]
    for (i, j), value in zip(combinations(range(n), 2), pairs, strict=True):
        matrix[i][j] = matrix[j][i] = value
    return matrix


def _retrieval(row: Row, n: int) -> Retrieval | None:
    if not row[f"recall_{DIRECTIONS[0]}"]:
        return None
    size = len(RECALL_AT)
    by_encoder = {way: _floats(row[f"encoder_recall_{way}"], n * size) for way in DIRECTIONS}
    soup = row[f"soup_recall_{DIRECTIONS[0]}"]
    return Retrieval(
        encoders=[{way: by_encoder[way][size * i : size * (i + 1)] for way in DIRECTIONS} for i in range(n)],
        concatenation={way: _floats(row[f"recall_{way}"], size) for way in DIRECTIONS},
        soup={way: _floats(row[f"soup_recall_{way}"], size) for way in DIRECTIONS} if soup else None,
    )
