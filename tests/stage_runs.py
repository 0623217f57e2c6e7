"""A small run of the stage runner, for the tests of it and of its files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mcl_kernels import MultistageRunner

N = 60


def embeddings(seed: int = 0, n: int = N) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def run(directory: Path | None = None, **options: object) -> MultistageRunner:
    runner = MultistageRunner(N, **{"n_clusters": 4, "directory": directory, **options})  # type: ignore[arg-type]
    for stage in runner:
        stage.finish(embeddings(stage.index), state={"stage": torch.tensor(stage.index)})
    return runner
