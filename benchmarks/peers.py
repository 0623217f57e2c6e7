"""Peers: losses that users write or install instead of `mcl_kernels`, with the same value at another cost."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl_kernels.backends import cuda

TEMPERATURE = 0.2  # between SimCLR's 0.1 and 0.5; costs do not depend on it
SCALE = 1 / TEMPERATURE


@dataclass(frozen=True)
class Contender:
    """An implementation of the loss of a case. `missing` returns the reason why it cannot run here, or None."""

    name: str
    loss: Callable[..., Tensor]
    missing: Callable[[], str | None] = lambda: None
    dtype: torch.dtype | None = None  # of its embeddings; None: that of the case
    threads: int | None = None  # None: all
    largest: int | None = None  # samples; a larger step is too slow or does not fit
    exact: bool = False  # must have the same bits as ours
    compiled: bool = False
    impl: str = "auto"  # of our own contenders

    @property
    def own(self) -> bool:
        return self.name.startswith(("ours", "own"))


def dense_nt_xent(view_a: Tensor, view_b: Tensor, labels: Tensor | None = None) -> Tensor:
    """Loss by the usual code: all logits, a mask, cross entropy."""
    n = len(view_a)
    z = F.normalize(torch.cat((view_a, view_b)), dim=1)
    logits = z @ z.T / TEMPERATURE
    if labels is not None:
        both = labels.repeat(2)
        logits = logits.masked_fill_(both[:, None] != both, -math.inf)
    return F.cross_entropy(logits.fill_diagonal_(-math.inf), torch.arange(2 * n, device=z.device).roll(n))


def loop_nt_xent(view_a: Tensor, view_b: Tensor, labels: Tensor) -> Tensor:
    """Loss by the fastest plain PyTorch: sorts once, then computes the dense loss of each cluster."""
    order, sizes = labels.argsort(), labels.unique(return_counts=True)[1].tolist()
    total = view_a.new_zeros(())
    for a, b in zip(view_a[order].split(sizes), view_b[order].split(sizes), strict=True):
        total = total + dense_nt_xent(a, b) * len(a)
    return total / len(view_a)


def loop_logsumexp(rows: Tensor, labels: Tensor) -> Tensor:
    """Mean of `masked_logsumexp` in its self form, one cluster at a time."""
    parts = rows[labels.argsort()].split(labels.unique(return_counts=True)[1].tolist())
    logits = ((SCALE * part @ part.T).fill_diagonal_(-math.inf) for part in parts)
    return torch.cat([s.logsumexp(1) for s in logits]).mean()


@functools.cache
def _compiled_nt_xent() -> Callable[..., Tensor]:
    # Static shapes, as in a training loop: faster than code for all sizes.
    return torch.compile(dense_nt_xent, fullgraph=True, dynamic=False)


def compiled_nt_xent(view_a: Tensor, view_b: Tensor, labels: Tensor) -> Tensor:
    return _compiled_nt_xent()(view_a, view_b, labels)


def lightly_nt_xent(view_a: Tensor, view_b: Tensor) -> Tensor:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)(view_a, view_b)


def metric_learning_nt_xent(view_a: Tensor, view_b: Tensor, labels: Tensor) -> Tensor:
    """Loss of the pairs that the mask keeps; the library compares every positive pair with every negative pair."""
    from pytorch_metric_learning.losses import NTXentLoss

    sample, both = torch.arange(len(view_a), device=labels.device).repeat(2), labels.repeat(2)
    same_sample = sample[:, None] == sample
    negative = torch.where((both[:, None] == both) & ~same_sample)
    positive = torch.where(same_sample.fill_diagonal_(False))
    return NTXentLoss(temperature=TEMPERATURE)(torch.cat((view_a, view_b)), indices_tuple=(*positive, *negative))


def dense_supcon(rows: Tensor, targets: Tensor) -> Tensor:
    """Loss by SupContrast's formula: a matrix of equal targets, the logits, and the mean of each row's positives."""
    z, n = F.normalize(rows, dim=1), len(rows)
    alike = (targets[:, None] == targets).to(z.dtype)
    logits = z @ z.T / TEMPERATURE
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = torch.ones_like(alike).fill_diagonal_(0)
    alike = alike * others
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    positives = alike.sum(1)
    return -((alike * log_prob).sum(1) / torch.where(positives < 1, 1, positives)).sum() / n


def metric_learning_supcon(rows: Tensor, targets: Tensor) -> Tensor:
    """Loss of the library; its mean is that of the losses above 0, which are all where each row has a positive."""
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TEMPERATURE)(rows, targets)


def dense_moco(query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    """Loss by MoCo's code; positive and queue are normalised already."""
    query = F.normalize(query, dim=1)
    positive_logit = (query * positive).sum(1, keepdim=True)
    logits = torch.cat((positive_logit, query @ queue.T), dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def dense_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Loss by open_clip's code: two cross entropies of one product."""
    logits, target = logit_scale * image @ text.T, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def dense_clip_fixed(image: Tensor, text: Tensor) -> Tensor:
    return dense_clip(image, text, torch.full((), SCALE, device=image.device))


def inf_cl(image: Tensor, text: Tensor) -> Tensor:
    from inf_cl.flash import cal_flash_loss

    directions = ((image, text), (text, image))
    return sum(cal_flash_loss(a, b, scale=SCALE).mean() for a, b in directions) / 2


def memeff(image: Tensor, text: Tensor) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)(image, text)


def own_cuda(loss: Callable[..., Tensor]) -> Contender:
    """Our loss in CUDA C++, if the installation has built it."""
    return Contender(
        "own, CUDA C++",
        functools.partial(loss, impl="cuda"),
        missing=lambda: cuda.unavailable_reason(torch.device("cuda")),
        impl="cuda",
    )


def _package(name: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
            return f"{name} cannot be imported ({error}); it comes with the bench extra"
        return None

    return missing


def _no_compiler() -> str | None:
    view, labels = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    try:
        compiled_nt_xent(view, view, labels)
    except Exception as error:  # each part of the compiler raises its own type
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
    return None


DENSE = Contender("eager, dense mask", dense_nt_xent)
LOOP = Contender("eager, loop over clusters", loop_nt_xent)
COMPILED = Contender("torch.compile, dense mask", compiled_nt_xent, missing=_no_compiler, compiled=True)
LIGHTLY = Contender("lightly", lightly_nt_xent, missing=_package("lightly.loss"))
METRIC_LEARNING = Contender(
    "pytorch-metric-learning", metric_learning_nt_xent, missing=_package("pytorch_metric_learning.losses")
)
SUPCONTRAST = Contender("SupContrast, eager", dense_supcon)
METRIC_LEARNING_SUPCON = Contender(
    "pytorch-metric-learning", metric_learning_supcon, missing=_package("pytorch_metric_learning.losses")
)
LOOP_LOGSUMEXP = Contender("eager, loop over clusters", loop_logsumexp)
MOCO = Contender("eager, dense", dense_moco)
CLIP = Contender("eager, dense", dense_clip)
CLIP_FIXED = Contender("eager, dense", dense_clip_fixed, largest=32_768)  # larger logits do not fit
INF_CL = Contender("inf-cl", inf_cl, missing=_package("inf_cl"))
MEMEFF = Contender("memeff", memeff, missing=_package("memeff"))
