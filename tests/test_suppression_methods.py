"""Methods of experiments/suppression: each is the published formula, and MCL with the pseudo labels of a stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from experiments.suppression.data.dataset import Dataset
from experiments.suppression.methods import (
    CLIP,
    MoCo,
    SimCLR,
    TemperatureSchedule,
    robust_global,
)
from experiments.suppression.train import train
from experiments.suppression.viewmaker import Viewmaker
from mcl_kernels import ClusterBatchSampler, nt_xent
from tests.suppression_tiny import ONE_LABEL, SETTINGS, TinyDataset

NO_CHECKPOINT = Path("none")


@pytest.fixture
def data() -> Dataset:
    return TinyDataset()


def test_the_gradient_of_a_timed_step_is_that_of_the_loss(data):
    """Training cuts the graph at the embeddings to time the loss apart from the encoder."""
    settings = replace(SETTINGS, epochs=1, batch_size=48, clusters_per_batch=1)
    model, training = train(data, settings, 0, ONE_LABEL, None, NO_CHECKPOINT)
    torch.manual_seed(0)
    plain = SimCLR(data, settings)
    batches = ClusterBatchSampler(ONE_LABEL, settings.batch_size, clusters_per_batch=1, seed=0)
    index = data.train[torch.tensor(next(iter(batches)))]
    loss = nt_xent(*plain(data.views(index), index), temperature=settings.temperature)
    loss.backward()
    assert training.curve == [pytest.approx(loss.item(), rel=1e-6)]
    for trained, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_temperatures_oscillate_between_their_ends(data):
    model = TemperatureSchedule(data, SETTINGS)
    views = F.normalize(torch.randn(2, 6, 4), dim=2).unbind(0)
    labels = torch.zeros(6, dtype=torch.int64)
    for progress, temperature in ((0.0, 1.0), (0.1, 0.1), (0.2, 1.0), (0.05, 0.55)):
        loss = model.loss(views, torch.arange(6), labels, progress)
        torch.testing.assert_close(loss, nt_xent(*views, temperature=temperature))


def test_temperatures_oscillate_during_training(data):
    recorded = []
    with patch.object(TemperatureSchedule, "loss", autospec=True) as loss:
        loss.side_effect = lambda model, z, i, y, progress: (
            recorded.append(progress) or SimCLR.loss(model, z, i, y, progress)
        )
        train(data, replace(SETTINGS, method="ts"), 0, ONE_LABEL, None, NO_CHECKPOINT)
    assert recorded == pytest.approx([step / 12 for step in range(12)])


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


def test_sample_temperatures_are_learned_within_their_range(data):
    settings = replace(SETTINGS, method="isogclr", epochs=6)
    model, _ = train(data, settings, 0, ONE_LABEL, None, NO_CHECKPOINT)
    trained = model.temperatures[data.train]
    assert bool((trained != settings.temperature).all())
    assert len(trained.unique()) > 1
    with torch.no_grad():
        model.temperatures[:2] = torch.tensor([-1.0, 7.0])
    model.after_step()
    assert model.temperatures[:2].tolist() == [pytest.approx(0.05), 1.0]


def test_the_momentum_encoder_is_an_average(data):
    model = MoCo(data, SETTINGS)
    assert all(not p.requires_grad for p in model.momentum_encoder.parameters())
    before = [p.clone() for p in model.momentum_encoder.parameters()]
    with torch.no_grad():
        for p in [*model.backbone.parameters(), *model.head.parameters()]:
            p += 1
    model.after_step()
    for old, new in zip(before, model.momentum_encoder.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.01)


def test_the_queue_has_the_labels_of_its_keys_until_the_stage_ends(data):
    model = MoCo(data, SETTINGS)
    index, labels = torch.arange(8), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    model.loss(model(data.views(index), index), index, labels, 0.0)
    assert model.queue.labels[:9].tolist() == [*labels.tolist(), -1]
    assert model.queue.ids[:8].tolist() == index.tolist()
    model.new_stage()
    assert model.queue.labels.unique().tolist() == [-1]
    other = MoCo(data, SETTINGS)
    other.load_state_dict(model.state_dict())
    with patch.object(MoCo, "new_stage") as new_stage:
        train(data, replace(SETTINGS, method="moco", epochs=1), 1, ONE_LABEL, other.state_dict(), NO_CHECKPOINT)
    new_stage.assert_called_once()


def test_moco_keys_are_not_normalised_with_their_queries(data):
    """Batch statistics in common with its query would identify the positive among the keys."""
    torch.manual_seed(0)  # for an order in which no part of the keys is also a part of the queries
    model, index = MoCo(data, SETTINGS).train(), torch.arange(16)
    recorded = []
    for name, encoder in (("query", model.backbone), ("key", model.momentum_encoder)):
        encoder.register_forward_pre_hook(lambda _, inputs, name=name: recorded.append((name, inputs[0])))
    images = torch.rand(16, *data.shape)
    model((images, images), index)
    parts = {
        name: [
            {int((images == x).flatten(1).all(1).nonzero()) for x in part}
            for encoder_name, part in recorded
            if encoder_name == name
        ]
        for name in ("query", "key")
    }
    assert parts["query"] == [set(range(first, first + 4)) for first in (0, 4, 8, 12)]
    assert set().union(*parts["key"]) == set(range(16))
    assert not any(part in parts["query"] for part in parts["key"])
    # Keys are back in the order of the queries: row i of both is image i.
    query, key = MoCo(data, SETTINGS).eval()((images, images), index)
    torch.testing.assert_close(key, torch.nn.functional.normalize(query, dim=1))


def test_the_viewmaker_raises_the_loss_within_its_budget():
    torch.manual_seed(0)
    viewmaker = Viewmaker(2, budget=0.05)
    x = torch.rand(6, 2, 9, 12)  # odd sizes are halved, too
    with torch.no_grad():
        y = viewmaker(x)
    assert y.shape == x.shape
    assert float(y.min()) >= float(x.min())
    assert float(y.max()) <= float(x.max())
    inside = torch.rand(6, 2, 9, 12) * 0.2 + 0.4
    inside[0, 0, 0, :2] = torch.tensor([-9.0, 9.0])  # a wide range: no other pixel is clamped
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
    assert losses[-1] > losses[0] * 1.02  # gradient descent raises the loss


def test_clip_ignores_the_padding_of_captions(data):
    model = CLIP(data, replace(SETTINGS, method="clip")).eval()
    index = torch.arange(6)
    before = model.text_features(index)
    model.captions = torch.cat((model.captions, torch.full((len(model.captions), 4), -1)), dim=1)
    torch.testing.assert_close(model.text_features(index), before)
    data.captions = None
    with pytest.raises(ValueError, match="clip needs data with captions"):
        CLIP(data, SETTINGS)
