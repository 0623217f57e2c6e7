"""Interface of the data sets, for training and probing encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor


class Dataset(ABC):
    """N samples: images, augmented views of them, and the features that a representation may hold or suppress.

    Attributes:
        features: by name int64 [N], or [N, b] for a feature whose accuracy is the mean over columns; -1 if unknown.
        train: samples for training, clustering and fitting probes, int64.
        test: held-out samples, int64.
        shape: channels, height and width of the encoder's input.
        captions: words of each sample as ids below `vocabulary`, int64 [N, T], padded with -1; None without captions.
    """

    captions: Tensor | None = None
    vocabulary = 0

    def __init__(
        self, name: str, features: dict[str, Tensor], train: Tensor, test: Tensor, shape: tuple[int, int, int]
    ) -> None:
        self.name = name
        self.features = features
        self.train = train
        self.test = test
        self.shape = shape

    def plain(self, index: Tensor) -> Tensor:
        """Images without augmentation, float [B, C, H, W] in channels-last memory."""
        return self._view(index, augmented=False).contiguous(memory_format=torch.channels_last)

    def views(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Two augmented views of each sample, drawn from torch's global generator."""
        both = self._view(index.repeat(2), augmented=True).contiguous(memory_format=torch.channels_last)
        view_a, view_b = both.chunk(2)
        return view_a, view_b

    @abstractmethod
    def _view(self, index: Tensor, *, augmented: bool) -> Tensor:
        """Encoder input of these samples, float [B, C, H, W]."""

    @abstractmethod
    def picture(self, index: int) -> np.ndarray:
        """Picture of a sample for a reader, uint8 [h, w, 3]."""


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` positions in which every class keeps its share. A larger count begins with the same positions.

    The positions are the same for every seed of a run: runs differ in their own randomness only.
    """
    if not 0 < count <= len(labels):
        raise ValueError(f"samples must be 1 to {len(labels)}: got {count}")
    generator = np.random.default_rng(0)
    order = generator.permutation(len(labels))
    quantile = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        quantile[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(quantile, kind="stable")[:count]
