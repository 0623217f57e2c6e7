"""Settings of experiments/suppression, and the runs of its report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.suppression.methods import METHODS
from experiments.suppression.settings import RunSettings, kind_of, number_in
from experiments.suppression.suite import SEEDS, SUITE, SWEEP, runs_of
from tests.suppression_tiny import SETTINGS


def test_a_name_has_the_settings_that_differ_from_the_defaults():
    settings = RunSettings.of("trifeature-64", "mcl+simclr", 1)
    assert (settings.samples, settings.name, settings.file_name) == (16_000, "mcl+simclr", "mcl+simclr-seed1")
    assert (settings.start, RunSettings.of("trifeature-64", "wide+simclr", 1).start) == ("previous", "fresh")
    changed = RunSettings.of("trifeature-64", "mcl+simclr", 1, clusters=32, layer="projection")
    assert changed.file_name == "mcl+simclr,clusters=32,layer=projection-seed1"


def test_kind_and_number_of_a_data_set():
    names = ("randbits-8", "fashion-randbits-0", "dominoes-side", "dominoes")
    assert [kind_of(data) for data in names] == ["randbits", "fashion-randbits", "dominoes-side", "dominoes"]
    assert [number_in(data) for data in names] == [8, 0, 0, 0]
    with pytest.raises(ValueError, match="data must be one of randbits,"):
        kind_of("cifar")


def test_epochs_are_shared_by_the_encoders():
    assert [replace(SETTINGS, method="mcl+dcl", epochs=8, stages=3).epochs_of(i) for i in range(3)] == [3, 3, 2]
    assert replace(SETTINGS, method="wide+dcl").encoders == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 1, "method": "mcl+simclr"}, "epochs must be at least 1 for each of 2 encoders: got 1"),
        ({"layer": "head"}, "layer must be one of backbone, projection: got 'head'"),
        ({"clusters": 0}, "clusters must be at least 1: got 0"),
        ({"method": "mcl+foo+simclr"}, "method must be an objective, alone or after one of"),
        ({"clusters_per_batch": 3}, "clusters_per_batch must divide batch_size = 16: got 3"),
        ({"temperature": 0.0}, "temperature must be positive: got 0.0"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_the_suite_has_distinct_runs_of_known_methods():
    runs = [settings for data, methods in SUITE for settings in runs_of(data, methods, SEEDS)]
    assert len({(settings.data, settings.file_name) for settings in runs}) == len(runs)
    assert {settings.objective for settings in runs} <= METHODS.keys()
    assert sum("=" in settings.name for settings in runs) == len(SEEDS) * sum(map(len, SWEEP.values()))
