"""RandBits: MNIST or Fashion-MNIST images with b constant channels that hold a fixed random code.

The code is never augmented and identifies the image: a contrastive loss that has learned it does not need the image.
After google-research/simclr, "intriguing properties".
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from experiments.suppression.data.dataset import Dataset, stratified
from experiments.suppression.data.sources import Labelled
from mcl_kernels.cli.demo import random_affine

SAMPLES, TEST_SAMPLES = 5000, 2000
# In a picture: colours of the cells of a code, and its height in pixels.
ON, OFF = (244, 178, 62), (58, 62, 70)
CELL = 6


class RandBits(Dataset):
    """Images [N, 1 + bits, 28, 28] in [0, 1]. The seed decides the codes, but not which images are chosen."""

    def __init__(
        self,
        name: str,
        feature: str,
        source: tuple[Labelled, Labelled],
        *,
        bits: int,
        seed: int,
        samples: int | None = None,
    ) -> None:
        train, test = source
        chosen = stratified(train.labels, SAMPLES if samples is None else samples)
        held_out = stratified(test.labels, min(TEST_SAMPLES, len(test.labels)))
        n, size = len(chosen) + len(held_out), train.images.shape[1]
        self.pixels = torch.from_numpy(np.concatenate((train.images[chosen], test.images[held_out]))).unsqueeze(1)
        labels = np.concatenate((train.labels[chosen], test.labels[held_out]))
        self.codes = torch.randint(0, 2, (n, bits), generator=torch.Generator().manual_seed(seed))
        features = {feature: torch.from_numpy(labels).long()}
        if bits:
            features["bits"] = self.codes
        train_index, test_index = torch.arange(n).split([len(chosen), len(held_out)])
        super().__init__(name, features, train_index, test_index, (1 + bits, size, size))

    def _view(self, index: Tensor, *, augmented: bool) -> Tensor:
        images = self.pixels[index].float().div(255)
        if augmented:
            images = random_affine(images)
        code = self.codes[index].float()[:, :, None, None].expand(-1, -1, *images.shape[2:])
        return torch.cat((images, code), dim=1)

    def picture(self, index: int) -> np.ndarray:
        """The image at twice its size, above the code as a row of cells."""
        image = self.pixels[index, 0].numpy().repeat(2, axis=0).repeat(2, axis=1)[:, :, None].repeat(3, axis=2)
        code = self.codes[index].numpy()
        if not len(code):
            return image
        width = image.shape[1]
        bit = np.arange(width) * len(code) // width  # shown in each column
        cells = np.where(code[bit, None] == 1, ON, OFF).astype(np.uint8)
        cells[1:][bit[1:] != bit[:-1]] = 0  # a line between cells
        return np.concatenate((image, np.zeros((2, width, 3), np.uint8), np.repeat(cells[None], CELL, axis=0)))
