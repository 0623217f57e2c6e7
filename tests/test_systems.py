"""Other systems, emulated by taking from `os` what they lack."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mcl_kernels import KMeans
from mcl_kernels.kmeans import sources


def test_files_are_read_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, and macOS before 11."""
    for name in ("pread", "preadv"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1 << 16)
    x = torch.randn(9000, 24, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for batch_size in (None, 700):
        of_file, of_memory = (KMeans(5, max_iter=5, batch_size=batch_size).fit(rows) for rows in (mapped, x))
        assert torch.equal(of_file.cluster_centers_, of_memory.cluster_centers_)
        assert torch.equal(of_file.labels_, of_memory.labels_)
