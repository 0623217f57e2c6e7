"""The runs of the report, the most informative first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.suppression.settings import RunSettings

SEEDS = (0, 1, 2)
CONTROLS = ("simclr", "mcl+simclr", "ensemble+simclr", "wide+simclr")
BASELINES = ("moco", "ifm", "ts", "fd", "dcl", "debiased", "hard", "isogclr")
# MCL on SimCLR with one setting changed at a time. The defaults are 3 stages, 16 clusters, 4 of them in a batch, the
# backbone clustered and fresh weights.
SWEEP_DATA = "randbits-8"
SWEEP: dict[str, tuple[Any, ...]] = {
    "clusters": (4, 8, 32, 64),
    "stages": (2, 4, 5),
    "clusters_per_batch": (1, 2, 8),
    "layer": ("projection",),
    "start": ("previous",),
}
SUITE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("randbits-8", CONTROLS),
    ("trifeature-64", CONTROLS),
    (SWEEP_DATA, ("sweep",)),
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


def runs_of(data: str, methods: tuple[str, ...], seeds: tuple[int, ...], **changes: Any) -> Iterator[RunSettings]:
    """Settings of the runs of these methods, seed after seed; `sweep` stands for every run of `SWEEP`."""
    for seed in seeds:
        for method in methods:
            if method != "sweep":
                yield RunSettings.of(data, method, seed, **changes)
                continue
            for name, values in SWEEP.items():
                for value in values:
                    yield RunSettings.of(data, "mcl+simclr", seed, **{**changes, name: value})
