"""The losses under one signature, and two views of the same samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mcl_kernels import clip_loss, masked_info_nce, nt_xent

LOSSES: dict[str, Callable[..., Tensor]] = {
    "masked_info_nce": lambda x, y, labels=None, **options: masked_info_nce(x, y, labels, **options),
    "nt_xent": lambda x, y, labels=None, **options: nt_xent(x, y, labels, **options),
    "clip_loss": lambda x, y, labels=None, **options: clip_loss(
        x, y, labels, logit_scale=1 / options.pop("temperature", 0.5), **{"normalize": True, **options}
    ),
}


def pair(n: int, d: int = 16, seed: int = 0, **options) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Two views of the same n samples, the same on every device."""
    x, noise = torch.randn(2, n, d, generator=torch.Generator("cpu").manual_seed(seed), device="cpu", **options)
    x, noise = (z.to(torch.get_default_device()) for z in (x, noise))
    return x, x + 0.5 * noise
