"""Which runs make up the report, the most telling first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.suppression.settings import Settings

SEEDS = (0, 1, 2)
CONTROLS = ("simclr", "mcl+simclr", "ensemble+simclr", "wide+simclr")
BASELINES = ("moco", "ifm", "ts", "fd", "dcl", "debiased", "hard", "isogclr")
# One setting at a time away from 3 stages, 16 clusters, 4 of them in a batch, the backbone clustered, fresh weights.
SWEPT = "randbits-8"
SWEEP: dict[str, tuple[Any, ...]] = {
    "clusters": (4, 8, 32, 64),
    "stages": (2, 4, 5),
    "clusters_per_batch": (1, 2, 8),
    "layer": ("projection",),
    "start": ("previous",),
}
EXPERIMENTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("randbits-8", CONTROLS),
    ("trifeature-64", CONTROLS),
    (SWEPT, ("sweep",)),
    ("emoji-captions", ("clip", "mcl+clip", "ensemble+clip", "wide+clip")),
    ("randbits-8", BASELINES),
    ("dominoes", CONTROLS),
    *((f"randbits-{bits}", CONTROLS[:3]) for bits in (0, 2, 4, 6, 12)),
    ("emoji", CONTROLS),
    ("dominoes-side", CONTROLS),
    ("trifeature-64", BASELINES),
    *((f"fashion-randbits-{bits}", CONTROLS[:3]) for bits in (0, 2, 4, 6, 8, 12)),
    ("randbits-8", tuple(f"mcl+{method}" for method in BASELINES)),
)


def settings_of(data: str, methods: tuple[str, ...], seeds: tuple[int, ...], **changes: Any) -> Iterator[Settings]:
    """The runs of these methods, seed after seed; `sweep` stands for all of the sweep on MCL over SimCLR."""
    for seed in seeds:
        for method in methods:
            if method != "sweep":
                yield Settings.of(data, method, seed, **changes)
                continue
            for name, values in SWEEP.items():
                for value in values:
                    yield Settings.of(data, "mcl+simclr", seed, **{**changes, name: value})
