"""Data sets that show feature suppression, each with several features that a contrastive loss could learn."""

from __future__ import annotations

import re
from pathlib import Path

from experiments.suppression.data.dataset import Dataset
from experiments.suppression.data.dominoes import Dominoes
from experiments.suppression.data.emoji import EmojiCaptions, EmojiPairs
from experiments.suppression.data.randbits import RandBits
from experiments.suppression.data.sources import fashion_mnist, mnist
from experiments.suppression.data.trifeature import Trifeature

DATASETS = {
    "randbits-B": "MNIST digits with a random code of B constant channels, B from 0 to 16",
    "fashion-randbits-B": "Fashion-MNIST garments with a code of B channels",
    "trifeature-S": "10 shapes x 10 textures x 10 colours, S pixels wide, S from 16 to 224",
    "dominoes": "MNIST digits and Fashion-MNIST garments in two channels",
    "dominoes-side": "MNIST digits and Fashion-MNIST garments side by side",
    "emoji": "emoji, with Google's and Twitter's pictures as the two views",
    "emoji-captions": "Google's pictures of emoji and their captions",
}

__all__ = ["DATASETS", "Dataset", "open_dataset"]


def open_dataset(
    name: str, *, samples: int | None = None, seed: int = 0, directory: Path = Path("runs/data")
) -> Dataset:
    """Opens a data set by its name, one of `DATASETS` with a number in place of the capital letter.

    Args:
        samples: number of training samples; None: the default of its kind.
        seed: seed of the random parts of the data themselves.
        directory: directory of the archives; expensive arrays are cached in its `cache`.
    """
    if match := re.fullmatch(r"(fashion-)?randbits-(\d|1[0-6])", name):
        source, feature = (fashion_mnist(), "garment") if match[1] else (mnist(directory), "digit")
        return RandBits(name, feature, source, bits=int(match[2]), seed=seed, samples=samples)
    if name in ("dominoes", "dominoes-side"):
        side_by_side = name == "dominoes-side"
        return Dominoes(name, mnist(directory), fashion_mnist(), side_by_side=side_by_side, seed=seed, samples=samples)
    if name in ("emoji", "emoji-captions"):
        return (EmojiPairs if name == "emoji" else EmojiCaptions)(name, directory=directory, samples=samples)
    if (match := re.fullmatch(r"trifeature-(\d+)", name)) and 16 <= int(match[1]) <= 224:
        return Trifeature(name, size=int(match[1]), seed=seed, directory=directory, samples=samples)
    raise ValueError(f"no data set {name!r}: expected one of {', '.join(DATASETS)}")
