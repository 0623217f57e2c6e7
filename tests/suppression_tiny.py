"""Tiny data and settings for experiments/suppression: every method trains on them in a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from experiments.suppression import runs
from experiments.suppression.data.dataset import Dataset
from experiments.suppression.details import Details, read_details
from experiments.suppression.results import RunResult, read_results
from experiments.suppression.settings import DEFAULTS, RunSettings

SETTINGS = RunSettings(
    "tiny", "simclr", samples=48, epochs=4, stages=2, clusters=3, clusters_per_batch=2, batch_size=16, features=8
)
ONE_LABEL = torch.zeros(48, dtype=torch.int64)


class TinyDataset(Dataset):
    """Two channels of 8 x 8: the first is bright in one of three places, the second has one of three brightnesses."""

    def __init__(self, n: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        place = torch.arange(n) % 3
        brightness = torch.randint(0, 2, (n, 2), generator=generator)
        images = torch.zeros(n, 2, 8, 8)
        for index in range(n):
            images[index, 0, 2 * place[index] : 2 * place[index] + 2] = 1
            images[index, 1] = brightness[index].float().mean()
        self.images = images
        self.captions = torch.stack((place, 3 + brightness[:, 0], torch.full_like(place, -1)), dim=1)
        self.vocabulary = 5
        order = torch.randperm(n, generator=generator)
        train, test = order[:48].sort().values, order[48:].sort().values
        super().__init__("tiny", {"place": place, "bright": brightness}, train, test, (2, 8, 8))

    def _view(self, index: Tensor, *, augmented: bool) -> Tensor:
        return self.images[index] + 0.1 * augmented * torch.randn(len(index), 2, 8, 8)

    def picture(self, index: int) -> np.ndarray:
        return (self.images[index].mean(0) * 255).byte().numpy()[:, :, None].repeat(3, axis=2)


@contextmanager
def tiny_data() -> Iterator[None]:
    """Makes `tiny` a kind of data with `SETTINGS` as its defaults."""
    defaults = {name: value for name, value in asdict(SETTINGS).items() if name not in ("data", "method", "seed")}
    with patch.object(runs, "open_dataset", lambda name, **_: TinyDataset()), patch.dict(DEFAULTS, tiny=defaults):
        yield


def run_tiny(settings: RunSettings, directory: Path) -> tuple[RunResult, Details]:
    """Trains and measures on the tiny data; returns what was written into results.csv and runs/ of the directory."""
    with tiny_data():
        runs.run(settings, directory / "results.csv", directory / "runs")
        (result,) = (row for row in read_results(directory / "results.csv") if row.settings == settings)
        details = read_details(settings, directory / "runs")
    assert details is not None
    return result, details
