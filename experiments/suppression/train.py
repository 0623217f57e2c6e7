"""Training of one encoder: a stage of MCL, a member of an ensemble, or the only one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.suppression.data.dataset import Dataset
from experiments.suppression.methods import METHODS, SimCLR
from experiments.suppression.settings import Settings
from mcl_kernels import ClusterBatchSampler
from mcl_kernels._durable import replaced_file

SAVED_EVERY = 60.0  # seconds


@dataclass
class Training:
    """What an encoder cost and how its loss went; kept with the weights of one that is not finished."""

    curve: list[float] = field(default_factory=list)  # mean loss of each epoch
    seconds: float = 0.0
    loss_seconds: float = 0.0  # of the loss alone, its backward pass included


def train(
    data: Dataset, settings: Settings, encoder: int, labels: Tensor, start: Mapping[str, Any] | None, checkpoint: Path
) -> tuple[SimCLR, Training]:
    """Trains encoder number `encoder` by these pseudo labels, int64 [len(data.train)].

    Args:
        start: weights to start from; None: new ones.
        checkpoint: where an interrupted training left off; written every minute.
    """
    torch.manual_seed(1000 * settings.seed + encoder)
    model = METHODS[settings.objective](data, settings)
    if start is not None:
        model.load_state_dict(start)
        model.new_stage()
    # Weights decay, temperatures and biases do not.
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim <= 1]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    epochs = settings.epochs_of(encoder)
    batches = ClusterBatchSampler(
        labels, settings.batch_size, clusters_per_batch=settings.clusters_per_batch, seed=settings.seed + encoder
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=epochs * len(batches), pct_start=0.1, cycle_momentum=False
    )
    training = _resume(checkpoint, encoder, model, optimizer, schedule)
    model.train()
    saved = time.perf_counter()
    while len(training.curve) < epochs:
        epoch = len(training.curve)
        batches.set_epoch(epoch)
        started, total = time.perf_counter(), 0.0
        for step, batch in enumerate(batches):
            position = torch.tensor(batch)
            index = data.train[position]
            embeddings = model(data.views(index), index)
            progress = (epoch + step / len(batches)) / epochs
            optimizer.zero_grad()
            loss_started = time.perf_counter()
            # Cut off, so that the loss's own backward pass can be timed.
            cut = tuple(z.detach().requires_grad_(z.requires_grad) for z in embeddings)
            loss = model.loss(cut, index, labels[position], progress)
            torch.autograd.backward(loss)
            training.loss_seconds += time.perf_counter() - loss_started
            learned = [(z, part.grad) for z, part in zip(embeddings, cut, strict=True) if z.requires_grad]
            torch.autograd.backward(*zip(*learned, strict=True))
            optimizer.step()
            schedule.step()
            model.after_step()
            total += loss.item()
        training.curve.append(total / len(batches))
        training.seconds += time.perf_counter() - started
        if time.perf_counter() - saved > SAVED_EVERY:
            _save(checkpoint, encoder, model, optimizer, schedule, training)
            saved = time.perf_counter()
    return model.eval(), training


def _save(checkpoint: Path, encoder: int, model: SimCLR, optimizer: Any, schedule: Any, training: Training) -> None:
    content = {
        "encoder": encoder, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(), "generator": torch.get_rng_state(), "training": vars(training),
    }  # fmt: skip
    with replaced_file(checkpoint) as file:
        torch.save(content, file)


def _resume(checkpoint: Path, encoder: int, model: SimCLR, optimizer: Any, schedule: Any) -> Training:
    """What `_save` kept of this encoder; one of an earlier encoder is finished and of no more use."""
    if not checkpoint.exists():
        return Training()
    content = torch.load(checkpoint, weights_only=True)
    if content["encoder"] != encoder:
        return Training()
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    torch.set_rng_state(content["generator"])
    return Training(**content["training"])
