"""Helpers for the tests of all hosts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]


def views(n: int = 40, d: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views of n samples, different enough that no loss is near 0."""
    x, noise = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(), (x + 1.5 * noise).detach().requires_grad_()


def assert_same(got: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Asserts equal values and gradients, in fp64, where only a wrong formula differs, and in fp32, as hosts train."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        for a, b in zip(*(_value_and_gradients(f, inputs, dtype) for f in (got, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance * float(b.abs().max()))


def _value_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def within_clusters(loss: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """Computes the host's loss of each cluster separately, weighted by its anchors: the expected mean over anchors."""
    clusters = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    return torch.stack([loss(index) * len(index) for index in clusters]).sum() / len(labels)


def peak_of(code: str) -> int:
    """Peak of the additional memory that a new process uses in `step()`, defined by `code`; in bytes."""
    script = f"""
import torch
from benchmarks.measure import peak_of
{code}
print("peak", peak_of(step))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split("peak ")[-1])


def normalized(*tensors: Tensor) -> list[Tensor]:
    """Rows scaled to length 1."""
    return [F.normalize(x) for x in tensors]


def train(parameters: Any, step: Callable[[], Tensor], steps: int = 8, lr: float = 1e-2) -> list[float]:
    """Losses of a few steps of AdamW."""
    optimizer, losses = torch.optim.AdamW(list(parameters), lr=lr), []
    for _ in range(steps):
        loss = step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
