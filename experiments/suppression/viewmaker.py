"""The adversary of feature dropout: a network that changes a view as its encoder likes least."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Viewmaker(nn.Module):
    """Adds to each view what raises the encoder's loss most, within a budget.

        d = tanh(net([x, noise])),    x' = clamp(x + budget d / mean|d|)

    The mean is that of an image, so that each is changed by `budget` a pixel and channel; views stay within the range
    of their batch. Gradients that come back from the encoder are turned round: one backward pass and one optimizer
    train the encoder to lower its loss and this network to raise it. Memory: the activations of a small residual
    network at half the resolution.

    Args:
        channels: of the views.
        budget: mean absolute change of a view.

    Source: Tamkin et al. 2021 (arXiv 2010.07432), section 3, and its use as feature dropout (arXiv 2212.08378).
    """

    def __init__(self, channels: int, budget: float = 0.05) -> None:
        super().__init__()
        self.budget = budget
        self.encode = _layer(nn.Conv2d(channels + 1, 32, 4, stride=2, padding=1))
        self.blocks = nn.ModuleList(nn.Sequential(_layer(_same(32, 32)), _same(32, 32)) for _ in range(2))
        self.decode = _same(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand_like(x[:, :1])
        hidden = self.encode(torch.cat((x, noise), dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        delta = torch.tanh(self.decode(F.interpolate(hidden, size=x.shape[2:])))
        delta = _TurnedRound.apply(
            delta * (self.budget / delta.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6))
        )
        return torch.clamp(x + delta, float(x.min()), float(x.max()))


class _TurnedRound(torch.autograd.Function):
    """The identity, whose gradient is that of the opponent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def _same(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=1)


def _layer(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.InstanceNorm2d(convolution.out_channels, affine=True), nn.ReLU())
