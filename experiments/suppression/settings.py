"""Settings of a run: data, method, seed, and the defaults of each kind of data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

LAYERS = ("backbone", "projection")
STARTS = ("fresh", "previous")
REGIMES = ("mcl", "ensemble", "wide")
# As in the paper's public code for CLIP: each stage continues from the previous one, so that weights can be averaged.
CLIP = {"layer": "projection", "start": "previous"}
# Epochs of all stages together. Settings that are not listed have the default of `RunSettings`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "randbits": {"samples": 5000, "epochs": 90},
    "fashion-randbits": {"samples": 5000, "epochs": 90},
    # Six epochs a stage are too few for a new network. Stages that continue from the previous one train for 18 in all.
    "trifeature": {"samples": 16_000, "epochs": 18, "start": "previous"},
    "dominoes": {"samples": 5000, "epochs": 90},
    "dominoes-side": {"samples": 5000, "epochs": 90},
    "emoji": {"samples": None, "epochs": 90},
    "emoji-captions": {"samples": None, "epochs": 90, **CLIP},
}


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run. Two runs with equal settings give the same numbers on one machine.

    Attributes:
        data: kind of data, followed by a number for some kinds: `randbits-8`, `trifeature-64`, `dominoes`.
        method: `simclr`, `moco`, ..., alone or after `mcl+`, `ensemble+` or `wide+`.
        seed: seed of the random parts of the data, of networks, views and clusterings.
        samples: number of training samples; None: all.
        epochs: total of all stages, or of all members of an ensemble: every method reads the data equally often.
        stages: number of stages of MCL or of members of an ensemble, or the factor by which a wide encoder is wider.
        clusters: K of each stage.
        clusters_per_batch: number of clusters in a batch of MCL, each with many samples.
        batch_size: images of a batch, each in two views.
        temperature: temperature of the loss; the initial one for CLIP, which learns it.
        learning_rate: maximum of a one-cycle schedule, which starts again in each stage.
        features: dimensions of an encoder's output.
        layer: features that are clustered: the encoder's output (`backbone`) or the head's (`projection`). Probes
            always read the encoder's output.
        start: initial weights of a stage or of a member of an ensemble: `fresh`, or those of the `previous` one.
    """

    data: str
    method: str
    seed: int = 0
    samples: int | None = 5000
    epochs: int = 90
    stages: int = 3
    clusters: int = 16
    clusters_per_batch: int = 4
    batch_size: int = 128
    temperature: float = 0.2
    learning_rate: float = 4e-3
    features: int = 128
    layer: str = "backbone"
    start: str = "fresh"

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "stages", "clusters", "clusters_per_batch", "batch_size", "features"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1: got {value}")
        if self.regime not in (None, *REGIMES):
            raise ValueError(f"method must be an objective, alone or after one of {REGIMES} and +: got {self.method!r}")
        if self.batch_size % self.clusters_per_batch:
            raise ValueError(
                f"clusters_per_batch must divide batch_size = {self.batch_size}: got {self.clusters_per_batch}"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive: got {self.temperature}")
        for name, allowed in (("layer", LAYERS), ("start", STARTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}: got {getattr(self, name)!r}")
        if self.epochs < self.encoders:
            raise ValueError(f"epochs must be at least 1 for each of {self.encoders} encoders: got {self.epochs}")

    @classmethod
    def of(cls, data: str, method: str, seed: int, **changes: Any) -> RunSettings:
        """Returns the defaults of these data with `changes`."""
        settings = cls(data, method, seed, **DEFAULTS[kind_of(data)])
        if settings.encoders == 1:
            settings = replace(settings, start="fresh")  # a single encoder has no previous one
        return replace(settings, **changes)

    @property
    def regime(self) -> str | None:
        """Use of the objective: "mcl", "ensemble", "wide", or None for the method as published."""
        regime, plus, _ = self.method.rpartition("+")
        return regime if plus else None

    @property
    def objective(self) -> str:
        return self.method.rpartition("+")[2]

    @property
    def encoders(self) -> int:
        return self.stages if self.regime in ("mcl", "ensemble") else 1

    def epochs_of(self, encoder: int) -> int:
        """Epochs of one encoder: an equal share, and one of the remainder for the first ones."""
        return self.epochs // self.encoders + (encoder < self.epochs % self.encoders)

    @property
    def name(self) -> str:
        """The method, and the settings that differ from the defaults of the data: `mcl+simclr clusters=32`."""
        defaults = asdict(RunSettings.of(self.data, self.method, self.seed))
        values = asdict(self)
        changed = (field.name for field in fields(self) if values[field.name] != defaults[field.name])
        return " ".join([self.method, *(f"{name}={values[name]}" for name in changed)])

    @property
    def file_name(self) -> str:
        return f"{self.name.replace(' ', ',')}-seed{self.seed}"


def kind_of(data: str) -> str:
    """Kind of a data set, `randbits` for `randbits-8`: the longest kind that the name begins with."""
    kinds = [kind for kind in DEFAULTS if data == kind or data.startswith(f"{kind}-")]
    if not kinds:
        raise ValueError(f"data must be one of {', '.join(DEFAULTS)}, as in `randbits-8`: got {data!r}")
    return max(kinds, key=len)


def number_in(data: str) -> int:
    """Number at the end of a data set's name, 8 for `randbits-8`; 0 if it has none."""
    number = data.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
