"""What every data set is to those who train and probe encoders on it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor


class Dataset(ABC):
    """N samples: images, augmented views of them, and the features that a representation may hold or suppress.

    features[name]  int64 [N], or [N, b], of which the mean accuracy over the columns counts; -1 where it is not known.
    train           int64: the samples that are trained on and clustered, and that probes are fitted to.
    test            int64: held out of both.
    shape           channels, height and width of what the encoder sees.
    captions        words of each sample as ids from 0 to vocabulary - 1, int64 [N, T], -1 after the last; None without.
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
        """Float [B, C, H, W], channels last, not augmented."""
        return self._view(index, augmented=False).contiguous(memory_format=torch.channels_last)

    def views(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Two augmented views of each sample, by torch's global generator."""
        both = self._view(index.repeat(2), augmented=True).contiguous(memory_format=torch.channels_last)
        view_a, view_b = both.chunk(2)
        return view_a, view_b

    @abstractmethod
    def _view(self, index: Tensor, *, augmented: bool) -> Tensor:
        """Float [B, C, H, W]."""

    @abstractmethod
    def picture(self, index: int) -> np.ndarray:
        """What a person should see of a sample: uint8 [h, w, 3]."""


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` positions, in which every class keeps its share; more of them begin with fewer of them.

    The same for every seed of a run, so that runs differ in nothing but their own randomness.
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
