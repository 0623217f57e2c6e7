"""Settings and results of a demo, and the file in which its rows are saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from mcl_kernels._durable import replace_file

BATCH_SIZE = 128


@dataclass(frozen=True)
class Settings:
    """Settings of a run; a directory of a run with other settings is refused."""

    bits: int = 8
    stages: int = 3
    clusters: int = 16
    epochs: int = 30
    seed: int = 0
    samples: int = 5000

    def __post_init__(self) -> None:
        minima = {"bits": 1, "stages": 1, "clusters": 1, "epochs": 1, "samples": 2 * BATCH_SIZE}
        for name, minimum in minima.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}: got {getattr(self, name)}")


@dataclass(frozen=True)
class Row:
    """One line of the table: a trained encoder, or the concatenation of all."""

    name: str
    digit_probe: float
    bit_probe: float | None = None
    ami: Sequence[float] = ()  # between its clusters and those of each earlier stage
    label_sizes: Sequence[int] = ()  # samples per pseudo label during the stage
    seconds: float | None = None


@dataclass(frozen=True)
class Results:
    """Results from which the report is drawn."""

    settings: Settings
    ceiling: Row
    stages: Sequence[Row]
    concatenated: Row
    images: Tensor  # [N, 1, 28, 28]
    digits: Tensor  # int64 [N]
    bits: Tensor  # [N, b]
    anchors: Tensor  # int64 [A]
    neighbours: Tensor  # int64 [A, stages, neighbours]


class SavedRows:
    """The rows computed so far, which are saved in a JSON file next to the stages."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.ceiling: Row | None = None
        self.stages: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def add(self, row: Row) -> Row:
        """Appends the row of a stage and saves all rows; returns it."""
        self.stages.append(row)
        self.save(self.ceiling)
        return row

    def save(self, ceiling: Row | None) -> None:
        """Sets the row of the ceiling and saves all rows."""
        self.ceiling = ceiling
        content = {
            "settings": asdict(self.settings),
            "ceiling": None if ceiling is None else asdict(ceiling),
            "stages": [asdict(row) for row in self.stages],
        }
        replace_file(self.path, json.dumps(content, indent=2).encode())

    def _read(self) -> None:
        try:
            saved = json.loads(self.path.read_text())
            saved_settings = asdict(Settings(**saved["settings"]))
            self.ceiling = Row(**saved["ceiling"])
            self.stages = [Row(**row) for row in saved["stages"]][: self.settings.stages]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is not the results of a demo ({error}); delete it to evaluate again"
            ) from None
        directory = self.path.parent
        for name, value in asdict(self.settings).items():
            if name != "stages" and saved_settings[name] != value:
                raise ValueError(
                    f"{directory} holds another run: {name} is {saved_settings[name]} there and {value} here; "
                    f"pass another --output, or delete {directory}"
                )
