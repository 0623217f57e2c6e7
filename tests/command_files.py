"""Writes features for the tests of the commands into files of the current directory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mcl_kernels.cli.main import main

N, D = 300, 6


def features(seed: int = 0) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def save_features() -> None:
    """Writes f0.npy, f1.npy and f2.npy."""
    for seed in range(3):
        np.save(f"f{seed}.npy", features(seed).numpy())


def cluster(*arguments: object) -> int:
    """Runs `mcl-kernels cluster`; returns its exit status."""
    return main(["cluster", *map(str, arguments)])
