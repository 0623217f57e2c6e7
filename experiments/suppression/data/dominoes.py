"""Dominoes: a sample is an MNIST digit and a Fashion-MNIST garment with independent labels.

The paper's CIFAR-MNIST is of this kind. Its construction is not public, and dominoes do not replace it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from experiments.suppression.data.dataset import Dataset, stratified
from experiments.suppression.data.sources import Labelled
from mcl_kernels.cli.demo import random_affine

SAMPLES, TEST_SAMPLES = 5000, 2000


class Dominoes(Dataset):
    """Images in [0, 1], [N, 2, 28, 28] or side by side [N, 1, 28, 56]; the seed decides which garment joins a digit.

    Training samples are from both training sets, held-out ones from both test sets. Digit and garment each have a
    `random_affine` of their own.
    """

    def __init__(
        self,
        name: str,
        digits: tuple[Labelled, Labelled],
        garments: tuple[Labelled, Labelled],
        *,
        side_by_side: bool,
        seed: int,
        samples: int | None = None,
    ) -> None:
        generator = np.random.default_rng(seed)
        counts = (SAMPLES if samples is None else samples, min(TEST_SAMPLES, len(digits[1].labels)))
        pixels, labels = [], []
        for digit, garment, count in zip(digits, garments, counts, strict=True):
            digits_chosen = stratified(digit.labels, count)
            garments_chosen = generator.permutation(stratified(garment.labels, count))
            pixels.append(np.stack((digit.images[digits_chosen], garment.images[garments_chosen]), axis=1))
            labels.append(np.stack((digit.labels[digits_chosen], garment.labels[garments_chosen])))
        self.pixels = torch.from_numpy(np.concatenate(pixels))  # uint8 [N, 2, 28, 28]
        self.side_by_side = side_by_side
        digit_labels, garment_labels = torch.from_numpy(np.concatenate(labels, axis=1)).long()
        train, test = torch.arange(sum(counts)).split(counts)
        size = self.pixels.shape[-1]
        shape = (1, size, 2 * size) if side_by_side else (2, size, size)
        super().__init__(name, {"digit": digit_labels, "garment": garment_labels}, train, test, shape)

    def _view(self, index: Tensor, *, augmented: bool) -> Tensor:
        halves = self.pixels[index].float().div(255)
        if augmented:
            halves = random_affine(halves.flatten(0, 1).unsqueeze(1)).view_as(halves)
        return torch.cat(halves.split(1, dim=1), dim=3) if self.side_by_side else halves

    def picture(self, index: int) -> np.ndarray:
        """Digit and garment side by side, also if the encoder has them in two channels."""
        return np.concatenate(tuple(self.pixels[index].numpy()), axis=1)[:, :, None].repeat(3, axis=2)
