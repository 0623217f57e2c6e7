"""Batches that people train with, their losses by the library and by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import one_cluster, own_clip_fixed, own_moco, own_nt_xent, ten_clusters, zipf_clusters
from benchmarks.measure import Step
from benchmarks.peers import SCALE, TEMPERATURE, dense_clip_fixed, dense_moco, dense_nt_xent
from mcl_kernels import masked_info_nce

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LARGEST_DENSE = 1 << 28  # pairs for which plain PyTorch, which stores them several times, is tried with labels


class Batch(NamedTuple):
    """Arguments of a loss: those with a gradient, and the others."""

    leaves: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]


class Workload(NamedTuple):
    name: str
    loss: str  # a key of LOSSES
    n: int  # samples: rows of each input with a gradient
    m: int  # other rows: of the queue, or all captions
    d: int
    make_labels: Callable[[int], Tensor] | None = None

    @property
    def pairs(self) -> int:
        return 4 * self.n * self.n if self.loss == "nt_xent" else self.n * (self.m or self.n)

    def has_eager(self) -> bool:
        return self.make_labels is None or self.pairs <= LARGEST_DENSE

    def tiny(self) -> Workload:
        """Returns the same loss of a few rows."""
        return self._replace(n=min(self.n, 40), m=min(self.m, 70), d=min(self.d, 32))

    def batch(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Batch:
        generator = torch.Generator(device).manual_seed(seed)

        def rows(size: int) -> Tensor:
            x = torch.randn(size, self.d, generator=generator, device=device)
            return F.normalize(x, dim=1).to(dtype)

        queries = rows(self.n).requires_grad_()
        if self.loss == "queue":
            return Batch((queries,), (rows(self.n), rows(self.m)))
        others = rows(self.m or self.n).requires_grad_()
        labels = () if self.make_labels is None else (self.make_labels(self.n).to(device),)
        return Batch((queries, others), labels)

    def step(self, batch: Batch, contender: str) -> Step:
        """Returns a function that computes the loss and its gradients.

        Contenders are "ours", "ours, CUDA C++", with other words behind the comma ours in other tiles, "eager" and
        "compiled".
        """
        own, dense = LOSSES[self.loss]
        device, dtype = batch.leaves[0].device.type, batch.leaves[0].dtype
        impl = "cuda" if contender == "ours, CUDA C++" else "triton"
        if contender == "compiled":
            dense = torch.compile(dense, dynamic=False)

        def ours() -> tuple[Tensor, ...]:
            loss = own(*batch.leaves, *batch.fixed, impl=impl)
            return loss.detach(), *torch.autograd.grad(loss, batch.leaves)

        def theirs() -> tuple[Tensor, ...]:
            # As a user of 16-bit rows: softmax and cross entropy in fp32.
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
                loss = dense(*batch.leaves, *batch.fixed)
            return loss.detach(), *torch.autograd.grad(loss, batch.leaves)

        return ours if contender.startswith("ours") else theirs


def own_local_rows(image: Tensor, text: Tensor, impl: str) -> Tensor:
    return masked_info_nce(image, text, temperature=TEMPERATURE, normalize=False, impl=impl)


def dense_local_rows(image: Tensor, text: Tensor) -> Tensor:
    """Loss by open_clip's code with local_loss: a rank's images against all captions."""
    return F.cross_entropy(SCALE * image @ text.T, torch.arange(len(image), device=image.device))


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "nt_xent": (own_nt_xent, dense_nt_xent),
    "queue": (own_moco, dense_moco),
    "rows": (own_local_rows, dense_local_rows),
    "clip": (own_clip_fixed, dense_clip_fixed),
}

SIMCLR = tuple(Workload(f"simclr {2 * n}", "nt_xent", n, 0, 128) for n in (512, 1024, 2048, 4096, 8192))
MOCO = Workload("moco 256 x 65536", "queue", 256, 65_536, 128)
LOCAL_CLIP = tuple(
    Workload(f"local clip {n} x {m}", "rows", n, m, 512) for n, m in ((256, 8192), (512, 32_768), (1024, 65_536))
)
CLIP = tuple(Workload(f"clip {n}", "clip", n, 0, 512) for n in (1024, 4096, 16_384))
MCL = (
    Workload("mcl 4096, 10 equal", "nt_xent", 2048, 0, 128, ten_clusters),
    Workload("mcl 16384, 10 equal", "nt_xent", 8192, 0, 128, ten_clusters),
    Workload("mcl 131072, 1000 zipf", "nt_xent", 65_536, 0, 128, zipf_clusters),
)
# Those that decide first: a measurement may end early.
WORKLOADS = (
    MOCO, SIMCLR[1], SIMCLR[3], LOCAL_CLIP[0], CLIP[1], MCL[1], SIMCLR[0], SIMCLR[2], LOCAL_CLIP[1], CLIP[0], MCL[2],
    SIMCLR[4], LOCAL_CLIP[2], CLIP[2], MCL[0],
)  # fmt: skip
WIDE = Workload("simclr 8192, D = 512", "nt_xent", 4096, 0, 512, one_cluster)
