"""The adversary of feature dropout: a network that changes views to raise the loss of their encoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Viewmaker(nn.Module):
    """Adds a change to each view that raises the encoder's loss, within a budget.

        d = tanh(net([x, noise])),    x' = clamp(x + budget d / mean|d|)

    The mean is over an image: each image changes by `budget` per pixel and channel. Views stay within the range of
    their batch. Gradients from the encoder are negated, so that one backward pass and one optimizer train the encoder
    to lower the loss and this network to raise it. Memory: the activations of a small residual network at half the
    resolution.

    Args:
        channels: channels of the views.
        budget: mean absolute change of a view.

    Source: Tamkin et al. 2021 (arXiv 2010.07432), section 3, and its use as feature dropout (arXiv 2212.08378).
    """

    def __init__(self, channels: int, budget: float = 0.05) -> None:
        super().__init__()
        self.budget = budget
        self.encode = _layer(nn.Conv2d(channels + 1, 32, 4, stride=2, padding=1))
        self.blocks = nn.ModuleList(nn.Sequential(_layer(_conv3x3(32, 32)), _conv3x3(32, 32)) for _ in range(2))
        self.decode = _conv3x3(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand_like(x[:, :1])
        hidden = self.encode(torch.cat((x, noise), dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        delta = torch.tanh(self.decode(F.interpolate(hidden, size=x.shape[2:])))
        mean = delta.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
        delta = _NegatedGradient.apply(delta * (self.budget / mean))
        return torch.clamp(x + delta, float(x.min()), float(x.max()))


class _NegatedGradient(torch.autograd.Function):
    """The identity, with a negated gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def _conv3x3(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=1)


def _layer(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.InstanceNorm2d(convolution.out_channels, affine=True), nn.ReLU())
