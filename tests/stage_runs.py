"""Small runs of the stage runner, for its tests."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mcl_kernels import MultistageRunner
from mcl_kernels.stages import files as stage_files

N = 60


def embeddings(seed: int = 0, n: int = N) -> Tensor:
    """Random embeddings, [n, 8]."""
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def run(directory: Path | None = None, **options: object) -> MultistageRunner:
    """Finishes all stages of a run; the state of each holds its index."""
    runner = MultistageRunner(N, **{"n_clusters": 4, "directory": directory, **options})  # type: ignore[arg-type]
    for stage in runner:
        stage.finish(embeddings(stage.index), state={"stage": torch.tensor(stage.index)})
    return runner


def replace_in_stage(directory: Path, name: str, content: bytes) -> None:
    """Replaces a file of a stage, and its checksum in the description."""
    (directory / name).write_bytes(content)
    description = stage_files._read_description(directory / "stage.json")
    description["files"][name] = stage_files._sha256(content)
    (directory / "stage.json").write_bytes(stage_files._description_bytes(description))
