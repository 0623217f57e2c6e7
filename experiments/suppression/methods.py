"""The contrastive methods, each a few lines over the library.

A method holds its networks and defines two functions: `forward` computes the embeddings of a batch, `loss` the loss of
these embeddings and their pseudo labels. One label for all samples gives the method as published, the labels of a stage
give MCL on that method.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.suppression.data.dataset import Dataset
from experiments.suppression.settings import RunSettings
from experiments.suppression.viewmaker import Viewmaker
from mcl_kernels import LabelledQueue, clip_loss, masked_info_nce, nt_xent
from mcl_kernels.cli.demo import make_backbone, make_head
from mcl_kernels.objectives import Objective, debiased, decoupled, hard_negative, ifm, info_nce


class SimCLR(nn.Module):
    """SimCLR: two views of each image, all other views are negatives. Other objectives make it IFM, DCL and others.

    Probes read the output of the backbone. The head is for the loss.
    """

    def __init__(self, data: Dataset, settings: RunSettings, objective: Objective = info_nce) -> None:
        super().__init__()
        self.settings = settings
        self.objective = objective
        self.width = settings.features * (settings.stages if settings.regime == "wide" else 1)
        self.backbone = make_backbone(*data.shape, self.width)
        self.head = make_head(self.width)

    def features(self, images: Tensor, layer: str) -> Tensor:
        """Features [B, width] of the backbone, or [B, 64] of the projection."""
        features = self.backbone(images)
        return features if layer == "backbone" else self.head(features)

    def forward(self, views: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, ...]:
        """Computes the embeddings that the loss compares; `index`: samples of the views, int64 [B]."""
        return self.head(self.backbone(torch.cat(views))).chunk(2)

    def loss(self, embeddings: tuple[Tensor, ...], index: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Computes the loss of these samples and pseudo labels; `progress`, in [0, 1], is that of the stage."""
        return nt_xent(*embeddings, labels, temperature=self.settings.temperature, objective=self.objective)

    def after_step(self) -> None:
        """Updates the tensors that the optimizer does not train."""

    def new_stage(self) -> None:
        """Clears the tensors that depend on the pseudo labels of the previous stage."""


class TemperatureSchedule(SimCLR):
    """SimCLR with a temperature that oscillates between 0.1 and 1, five times a stage.

        t = 0.1 + 0.9 (1 + cos(2 pi 5 progress)) / 2

    The paper has the same number of oscillations: a period of 400 in 2,000 epochs.

    Source: Kukleva et al. 2023 (arXiv 2303.13664), equation 5.
    """

    def loss(self, embeddings: tuple[Tensor, ...], index: Tensor, labels: Tensor, progress: float) -> Tensor:
        temperature = 0.1 + 0.9 * (1 + math.cos(2 * math.pi * 5 * progress)) / 2
        return nt_xent(*embeddings, labels, temperature=temperature)


@dataclass(frozen=True)
class robust_global:  # noqa: N801, as in mcl_kernels.objectives
    """Objective of iSogCLR over embeddings and temperatures: t (log mean_j e^(s_j - a) + rho), s and a divided by t.

    A large rho makes temperatures small. The mean is over the batch; the paper has a running mean.

    Source: Qiu et al. 2023 (arXiv 2305.11965), equation 5.
    """

    rho: float = 0.3
    counts: ClassVar[bool] = True

    def __call__(self, a: Tensor, b: Tensor, n: Tensor, scale: Tensor) -> Tensor:
        return (b - n.log() - a + self.rho) / scale


class SampleTemperatures(SimCLR):
    """iSogCLR: a temperature for each sample, learned with the embeddings, between 0.05 and 1."""

    def __init__(self, data: Dataset, settings: RunSettings) -> None:
        super().__init__(data, settings, robust_global())
        self.temperatures = nn.Parameter(torch.full((int(data.train.max()) + 1,), settings.temperature))

    def loss(self, embeddings: tuple[Tensor, ...], index: Tensor, labels: Tensor, progress: float) -> Tensor:
        temperature = self.temperatures[index].repeat(2)
        return nt_xent(*embeddings, labels, temperature=temperature, objective=self.objective)

    @torch.no_grad()
    def after_step(self) -> None:
        self.temperatures.clamp_(0.05, 1.0)


class FeatureDropout(SimCLR):
    """SimCLR on views changed by an adversary; see `Viewmaker`."""

    def __init__(self, data: Dataset, settings: RunSettings) -> None:
        super().__init__(data, settings)
        self.viewmaker = Viewmaker(data.shape[0])

    def forward(self, views: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, ...]:
        return super().forward((self.viewmaker(views[0]), self.viewmaker(views[1])), index)


class MoCo(SimCLR):
    """MoCo-v2: one view against the other's momentum embedding and a queue of 2,048, momentum 0.99.

    The published 65,536 and 0.999 are for a million images; the queue here holds 16 batches. Batch normalisation sees
    a batch in four parts, and keys are shuffled before: otherwise a query and its positive would share their batch
    statistics, which identifies the positive among the keys (He et al. 2020, section 3.3, with a part on each GPU).
    """

    QUEUE, MOMENTUM, PARTS = 2048, 0.99, 4

    def __init__(self, data: Dataset, settings: RunSettings) -> None:
        super().__init__(data, settings)
        self.momentum_encoder = copy.deepcopy(nn.Sequential(self.backbone, self.head)).requires_grad_(False)
        self.queue = LabelledQueue(self.QUEUE, 64)

    def forward(self, views: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, ...]:
        query = torch.cat([self.head(self.backbone(part)) for part in views[0].chunk(self.PARTS)])
        with torch.no_grad():
            shuffled = torch.randperm(len(index))
            key = torch.cat([self.momentum_encoder(part) for part in views[1][shuffled].chunk(self.PARTS)])
            key = F.normalize(key[shuffled.argsort()], dim=1)
        return query, key

    def loss(self, embeddings: tuple[Tensor, ...], index: Tensor, labels: Tensor, progress: float) -> Tensor:
        query, key = embeddings
        loss = masked_info_nce(
            query,
            self.queue.embeddings,
            labels,
            self.queue.labels,
            temperature=self.settings.temperature,
            positive=key,
            ids=index,
            key_ids=self.queue.ids,
        )
        self.queue.enqueue(key, labels, index)
        return loss

    @torch.no_grad()
    def after_step(self) -> None:
        trained = (*self.backbone.parameters(), *self.head.parameters())
        for average, current in zip(self.momentum_encoder.parameters(), trained, strict=True):
            average.lerp_(current, 1 - self.MOMENTUM)

    def new_stage(self) -> None:
        self.queue.labels.fill_(-1)  # marks every slot as empty


class CLIP(SimCLR):
    """CLIP: images against captions, which are bags of words through two layers; a learned temperature.

    Features of both are [B, 64].
    """

    def __init__(self, data: Dataset, settings: RunSettings) -> None:
        super().__init__(data, settings)
        if data.captions is None:
            raise ValueError(f"clip needs data with captions, such as emoji-captions: got {data.name}")
        self.captions = data.captions
        self.words = nn.EmbeddingBag(data.vocabulary + 1, 128, padding_idx=data.vocabulary)
        self.text_head = nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(settings.temperature)))

    def text_features(self, index: Tensor) -> Tensor:
        """Features of the captions of these samples, [B, 64]."""
        words = self.captions[index]
        return self.text_head(self.words(torch.where(words < 0, self.words.padding_idx, words)))

    def forward(self, views: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.backbone(views[0])), self.text_features(index)

    def loss(self, embeddings: tuple[Tensor, ...], index: Tensor, labels: Tensor, progress: float) -> Tensor:
        return clip_loss(*embeddings, labels, logit_scale=self.log_scale.exp(), normalize=True)

    @torch.no_grad()
    def after_step(self) -> None:
        self.log_scale.clamp_(max=math.log(100))  # as in CLIP


def _simclr_with(objective: Objective) -> Callable[[Dataset, RunSettings], SimCLR]:
    return lambda data, settings: SimCLR(data, settings, objective)


METHODS: dict[str, Callable[[Dataset, RunSettings], SimCLR]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "clip": CLIP,
    "ifm": _simclr_with(ifm()),
    "ts": TemperatureSchedule,
    "fd": FeatureDropout,
    "dcl": _simclr_with(decoupled),
    "debiased": _simclr_with(debiased()),
    "hard": _simclr_with(hard_negative()),
    "isogclr": SampleTemperatures,
}
