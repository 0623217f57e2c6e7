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
from experiments.suppression.settings import RunSettings
from mcl_kernels import ClusterBatchSampler
from mcl_kernels._durable import replaced_file

CHECKPOINT_SECONDS = 60.0


@dataclass
class Training:
    """Cost and loss of an encoder's training so far."""

    curve: list[float] = field(default_factory=list)  # mean loss of each epoch
    seconds: float = 0.0
    loss_seconds: float = 0.0  # the loss alone, with its backward pass


def train(
    data: Dataset,
    settings: RunSettings,
    encoder: int,
    labels: Tensor,
    start: Mapping[str, Any] | None,
    checkpoint: Path,
) -> tuple[SimCLR, Training]:
    """Trains one encoder of a run.

    Args:
        encoder: index of the stage, or of the member of an ensemble.
        labels: pseudo labels, int64 [len(data.train)].
        start: initial weights; None: random ones.
        checkpoint: file from which an interrupted training resumes; written every minute.
    """
    torch.manual_seed(1000 * settings.seed + encoder)
    model = METHODS[settings.objective](data, settings)
    if start is not None:
        model.load_state_dict(start)
        model.new_stage()
    optimizer = _optimizer(model)
    epochs = settings.epochs_of(encoder)
    batches = ClusterBatchSampler(
        labels, settings.batch_size, clusters_per_batch=settings.clusters_per_batch, seed=settings.seed + encoder
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=epochs * len(batches), pct_start=0.1, cycle_momentum=False
    )
    training = _load_checkpoint(checkpoint, encoder, model, optimizer, schedule)
    model.train()
    last_save = time.perf_counter()
    while len(training.curve) < epochs:
        epoch = len(training.curve)
        batches.set_epoch(epoch)
        started, total = time.perf_counter(), 0.0
        for step, batch in enumerate(batches):
            position = torch.tensor(batch)
            progress = (epoch + step / len(batches)) / epochs
            loss, loss_seconds = _train_step(model, optimizer, data, position, labels[position], progress)
            schedule.step()
            model.after_step()
            total += loss
            training.loss_seconds += loss_seconds
        training.curve.append(total / len(batches))
        training.seconds += time.perf_counter() - started
        if time.perf_counter() - last_save > CHECKPOINT_SECONDS:
            _save_checkpoint(checkpoint, encoder, model, optimizer, schedule, training)
            last_save = time.perf_counter()
    return model.eval(), training


def _optimizer(model: SimCLR) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices only, not for biases and temperatures."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], weight_decay=1e-4)


def _train_step(
    model: SimCLR, optimizer: torch.optim.Optimizer, data: Dataset, position: Tensor, labels: Tensor, progress: float
) -> tuple[float, float]:
    """Updates the weights for one batch; returns its loss and the seconds of the loss and its backward pass."""
    index = data.train[position]
    embeddings = model(data.views(index), index)
    optimizer.zero_grad()
    started = time.perf_counter()
    # The graph is cut at the embeddings, so that the backward pass of the loss is timed apart from the encoder's.
    leaves = tuple(z.detach().requires_grad_(z.requires_grad) for z in embeddings)
    loss = model.loss(leaves, index, labels, progress)
    torch.autograd.backward(loss)
    loss_seconds = time.perf_counter() - started
    trained = [(z, leaf.grad) for z, leaf in zip(embeddings, leaves, strict=True) if z.requires_grad]
    torch.autograd.backward(*zip(*trained, strict=True))
    optimizer.step()
    return loss.item(), loss_seconds


def _save_checkpoint(
    checkpoint: Path, encoder: int, model: SimCLR, optimizer: Any, schedule: Any, training: Training
) -> None:
    content = {
        "encoder": encoder, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(), "generator": torch.get_rng_state(), "training": vars(training),
    }  # fmt: skip
    with replaced_file(checkpoint) as file:
        torch.save(content, file)


def _load_checkpoint(checkpoint: Path, encoder: int, model: SimCLR, optimizer: Any, schedule: Any) -> Training:
    """Restores the state of this encoder. A checkpoint of an earlier encoder is ignored: that encoder is finished."""
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
