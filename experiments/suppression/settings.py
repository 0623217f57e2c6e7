"""What a run is: data, method, seed, and what it does not leave at the default of its data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

LAYERS = ("backbone", "projection")
STARTS = ("fresh", "previous")
REGIMES = ("mcl", "ensemble", "wide")
# As the paper's public code trains CLIP: each stage goes on from the last one, so that their weights can be averaged.
CLIP = {"layer": "projection", "start": "previous"}
# Epochs are those of all stages together. What is not here is the default below.
DEFAULTS: dict[str, dict[str, Any]] = {
    "randbits": {"samples": 5000, "epochs": 90},
    "fashion-randbits": {"samples": 5000, "epochs": 90},
    # Six epochs do not train a new network; stages that go on from the last one have had 18 in the end.
    "trifeature": {"samples": 16_000, "epochs": 18, "start": "previous"},
    "dominoes": {"samples": 5000, "epochs": 90},
    "dominoes-side": {"samples": 5000, "epochs": 90},
    "emoji": {"samples": None, "epochs": 90},
    "emoji-captions": {"samples": None, "epochs": 90, **CLIP},
}


@dataclass(frozen=True)
class Settings:
    """A run. Two runs with equal settings give the same numbers on one machine.

    Attributes:
        data: `randbits-8`, `trifeature-64`, ...: a kind of data, perhaps with a number behind it.
        method: `simclr`, `moco`, ..., alone or after `mcl+`, `ensemble+` or `wide+`.
        seed: of the data's random parts, networks, views and clusterings.
        samples: that are trained on; None: all there are.
        epochs: of all stages, or of all members of an ensemble, together: every method sees the data equally often.
        stages: of MCL; members of an ensemble; how many times as wide a wide encoder is.
        clusters: K of each stage.
        clusters_per_batch: of MCL's batches, which hold few clusters with many samples each.
        batch_size: images, each in two views.
        temperature: of the loss; CLIP learns its own and starts from this one.
        learning_rate: the largest of a one-cycle schedule, anew in each stage.
        features: dimensions of an encoder's output.
        layer: what is clustered, the encoder's output (`backbone`) or the head's (`projection`). Probes read the
            encoder's output whatever is clustered.
        start: weights of a stage of MCL or a member of an ensemble: `fresh`, or those of the `previous` one.
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
    def of(cls, data: str, method: str, seed: int, **changes: Any) -> Settings:
        """The defaults of this data, but for `changes`."""
        settings = cls(data, method, seed, **DEFAULTS[kind_of(data)])
        if settings.encoders == 1:
            settings = replace(settings, start="fresh")  # there is nothing else
        return replace(settings, **changes)

    @property
    def regime(self) -> str | None:
        """What is done with the objective: "mcl", "ensemble", "wide", or None where it is used as it is."""
        regime, plus, _ = self.method.rpartition("+")
        return regime if plus else None

    @property
    def objective(self) -> str:
        return self.method.rpartition("+")[2]

    @property
    def encoders(self) -> int:
        return self.stages if self.regime in ("mcl", "ensemble") else 1

    def epochs_of(self, encoder: int) -> int:
        """The epochs are spread over the encoders, the first ones take what is left over."""
        return self.epochs // self.encoders + (encoder < self.epochs % self.encoders)

    @property
    def name(self) -> str:
        """The method, and what differs from the defaults: `mcl+simclr clusters=32`."""
        usual = asdict(Settings.of(self.data, self.method, self.seed))
        here = asdict(self)
        return " ".join(
            [self.method, *(f"{f.name}={here[f.name]}" for f in fields(self) if here[f.name] != usual[f.name])]
        )

    @property
    def file_name(self) -> str:
        return f"{self.name.replace(' ', ',')}-seed{self.seed}"


def kind_of(data: str) -> str:
    """`randbits` of `randbits-8`: the longest kind that the name begins with."""
    kinds = [kind for kind in DEFAULTS if data == kind or data.startswith(f"{kind}-")]
    if not kinds:
        raise ValueError(f"data must be one of {', '.join(DEFAULTS)}, as in `randbits-8`: got {data!r}")
    return max(kinds, key=len)
