"""The named cases: inputs, losses, peers, and the reason for each case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import (
    CLIP,
    CLIP_FIXED,
    COMPILED,
    DENSE,
    INF_CL,
    LIGHTLY,
    LOOP,
    LOOP_LOGSUMEXP,
    MEMEFF,
    METRIC_LEARNING,
    METRIC_LEARNING_SUPCON,
    MOCO,
    SCALE,
    SUPCONTRAST,
    TEMPERATURE,
    Contender,
    own_cuda,
)
from mcl_kernels import clip_loss, masked_info_nce, masked_logsumexp, nt_xent, supcon_loss


@dataclass(frozen=True)
class LossInputs:
    """Arguments of a loss: `leaves` get a gradient and come first; `operations` is the minimum of both passes."""

    leaves: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]
    clusters: int
    operations: float

    def to(self, device: torch.device) -> LossInputs:
        leaves, fixed = (tuple(x.to(device) for x in inputs) for inputs in (self.leaves, self.fixed))
        return replace(self, leaves=leaves, fixed=fixed)


@dataclass(frozen=True)
class Case:
    name: str
    reason: str
    target: str
    sizes: tuple[int, ...]  # N: samples, or rows of masked_logsumexp
    make: Callable[[int], LossInputs]
    ours: Callable[..., Tensor]
    peers: tuple[Contender, ...] = ()
    dtype: torch.dtype = torch.float32
    once: bool = False  # a single pass, to measure its memory
    cap_bytes: int | None = None  # N doubles until the only peer exceeds this peak
    gpu_sizes: tuple[int, ...] | None = None  # sizes on a GPU, if they differ; (): not measured there

    def sizes_on(self, device: torch.device) -> tuple[int, ...]:
        return self.sizes if device.type == "cpu" or self.gpu_sizes is None else self.gpu_sizes

    def runs_on(self, device: torch.device) -> bool:
        return bool(self.sizes_on(device)) or (self.cap_bytes is not None and device.type == "cpu")

    def contenders_on(self, device: torch.device) -> tuple[Contender, ...]:
        """Contenders, ours first. On a GPU "ours" is Triton, and the kernels in CUDA C++ are the second contender."""
        cuda = (own_cuda(self.ours),) if device.type == "cuda" else ()
        return (Contender("ours", self.ours), *cuda, *self.peers)


def own_nt_xent(view_a: Tensor, view_b: Tensor, labels: Tensor | None = None, impl: str = "auto") -> Tensor:
    return nt_xent(view_a, view_b, labels, temperature=TEMPERATURE, impl=impl)


def own_logsumexp(rows: Tensor, labels: Tensor | None = None, impl: str = "auto") -> Tensor:
    return masked_logsumexp(rows, labels=labels, scale=SCALE, impl=impl).mean()


def own_supcon(rows: Tensor, targets: Tensor, impl: str = "auto") -> Tensor:
    return supcon_loss(rows, targets, temperature=TEMPERATURE, impl=impl)


def own_moco(query: Tensor, positive: Tensor, queue: Tensor, impl: str = "auto") -> Tensor:
    query = F.normalize(query, dim=1)
    return masked_info_nce(query, queue, positive=positive, temperature=TEMPERATURE, normalize=False, impl=impl)


def own_clip(image: Tensor, text: Tensor, logit_scale: Tensor, impl: str = "auto") -> Tensor:
    return clip_loss(image, text, logit_scale=logit_scale, impl=impl)


def own_clip_fixed(image: Tensor, text: Tensor, impl: str = "auto") -> Tensor:
    return clip_loss(image, text, logit_scale=SCALE, impl=impl)


def one_cluster(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


def ten_clusters(n: int) -> Tensor:
    return torch.randint(0, 10, (n,), generator=_generator())


def clusters_of_512(n: int) -> Tensor:
    return torch.randperm(n, generator=_generator()) // 512


def zipf_clusters(n: int) -> Tensor:
    """1000 clusters with sizes proportional to 1, 1/2, 1/3, ...; fewer for small n, to avoid clusters of one sample."""
    share = 1 / torch.arange(1, min(1000, n // 32) + 1)
    sizes = (n * share / share.sum()).long()
    sizes[0] += n - sizes.sum()
    return torch.arange(len(sizes)).repeat_interleave(sizes)[torch.randperm(n, generator=_generator())]


def two_views(n: int, d: int = 128, make_labels: Callable[[int], Tensor] = one_cluster) -> LossInputs:
    view_a, view_b = (_normal(n, d, seed) for seed in (0, 1))
    labels = make_labels(n)
    return LossInputs((view_a, view_b), _label_arguments(labels), *_minimal_work(labels.repeat(2), d))


def unit_rows(n: int, d: int = 128, make_labels: Callable[[int], Tensor] = one_cluster) -> LossInputs:
    labels = make_labels(n)
    return LossInputs((F.normalize(_normal(n, d, 0), dim=1),), _label_arguments(labels), *_minimal_work(labels, d))


def rows_of_classes(n: int) -> LossInputs:
    """100 classes, and all rows of other classes as negatives."""
    return LossInputs((_normal(n, 128, 0),), (torch.arange(n) % 100,), *_minimal_work(one_cluster(n), 128))


def moco_queue(n: int) -> LossInputs:
    """256 keys for each query. Positive and queue are from the momentum encoder: normalised and without gradient."""
    queue = F.normalize(_normal(256 * n, 128, 2), dim=1)
    # Three products: logits in the forward pass, logits and the gradient of the queries in the backward pass.
    operations = 3 * 2 * n * len(queue) * 128
    return LossInputs((_normal(n, 128, 0),), (F.normalize(_normal(n, 128, 1), dim=1), queue), 1, operations)


def image_text(n: int) -> LossInputs:
    image, text = (F.normalize(_normal(n, 512, seed), dim=1) for seed in (0, 1))
    # Four products: one in the forward pass, three in the backward pass. The logit scale is a leaf: CLIP learns it.
    return LossInputs((image, text, torch.tensor(100.0)), (), 1, 4 * 2 * n * n * 512)


def image_text_fixed(n: int) -> LossInputs:
    """Inputs with a fixed logit scale, for peers that cannot learn it."""
    inputs = image_text(n)
    return replace(inputs, leaves=inputs.leaves[:2])


def _normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=_generator(seed))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _label_arguments(labels: Tensor) -> tuple[Tensor, ...]:
    """The labels, or no argument for a single cluster: a user without clusters passes none."""
    return (labels,) if labels.any() else ()


def _minimal_work(labels: Tensor, d: int) -> tuple[int, float]:
    """Number of clusters, and operations of the self form: half a product of the kept pairs forward, 1.5 backward."""
    sizes = labels.unique(return_counts=True)[1]
    return len(sizes), 2 * 2 * float(sizes.square().sum()) * d


def _only_one_thread() -> str | None:
    return None if torch.get_num_threads() > 1 else "needs a second thread: torch.get_num_threads() is 1"


_LIMIT = "at least 0.75 of the limit"


def _limit(name: str, d: int, make_labels: Callable[[int], Tensor], reason: str) -> Case:
    make = partial(unit_rows, d=d, make_labels=make_labels)
    return Case(name, reason, _LIMIT, (8192,), make, own_logsumexp, gpu_sizes=(65536,))


def _small(suffix: str, d: int, sizes: tuple[int, ...], make_labels: Callable[[int], Tensor], reason: str) -> Case:
    make = partial(two_views, d=d, make_labels=make_labels)
    peers = (DENSE,) if make_labels is one_cluster else (DENSE, LOOP)
    return Case(f"small-batches{suffix}", reason, "none: it shows where the gain ends", sizes, make, own_nt_xent, peers)


def _half(case: Case, reason: str) -> Case:
    fp32 = Contender("own, fp32", own_logsumexp, dtype=torch.float32)
    name = case.name.replace("limit", "bf16")
    target = "1.5x over own fp32"
    return replace(case, name=name, reason=reason, target=target, peers=(fp32,), dtype=torch.bfloat16)


LIMITS = (
    _limit("limit-d128-k1", 128, one_cluster, "SimCLR's and MoCo's width, one cluster: most exponentials per product"),
    _limit("limit-d128-k10", 128, ten_clusters, "the same within clusters: adds the cost of sorting and ragged tiles"),
    _limit("limit-d512-k1", 512, one_cluster, "the width of CLIP and of a ResNet-18: the product dominates"),
    _limit("limit-d512-k10", 512, ten_clusters, "wide and clustered: few rows per cluster, long rows"),
)

CASES = (
    Case(
        "clusters-10", "training with MCL", "60x over the dense mask, 3.5x over the loop, 30x over torch.compile",
        (4096,), partial(two_views, make_labels=ten_clusters), own_nt_xent, (DENSE, LOOP, COMPILED), gpu_sizes=(16384,),
    ),
    Case(
        "plain-nt-xent", "a drop-in replacement without clusters", "10x over lightly",
        (2048,), two_views, own_nt_xent, (LIGHTLY, DENSE), gpu_sizes=(8192,),
    ),
    *LIMITS,
    _half(LIMITS[1], "mixed precision training, half the bytes: narrow and clustered"),
    _half(LIMITS[2], "mixed precision training where the product dominates"),
    Case(
        "growth", "a data set grows, its clusters do not: linear time", "time per row at most 1.15x from first to last",
        (16384, 32768, 65536, 131072), partial(unit_rows, make_labels=clusters_of_512), own_logsumexp,
    ),
    Case(
        "zipf", "real pseudo labels are uneven, and a loop pays for every small cluster", "10x over the loop",
        (32768,), partial(unit_rows, make_labels=zipf_clusters), own_logsumexp, (LOOP_LOGSUMEXP,),
    ),
    Case(
        "threads", "all cores share one cluster, with identical bits", "1.8x over own 1 thread",
        (8192,), unit_rows, own_logsumexp,
        (Contender("own, 1 thread", own_logsumexp, missing=_only_one_thread, threads=1, exact=True),), gpu_sizes=(),
    ),
    Case(
        "memory-1m", "a whole data set in one call", "peak at most 3 x N x D fp32 (1536 MiB), gradients included",
        (1_048_576,), partial(unit_rows, make_labels=clusters_of_512), own_logsumexp, once=True,
    ),
    Case(
        "memory-nt-xent", "the same for two views, normalised inside", "peak at most 5 x 2N x D fp32 (640 MiB)",
        (131_072,), partial(two_views, make_labels=clusters_of_512), own_nt_xent, once=True,
    ),
    # From the smallest usual batch of SimCLR, 256, to one that is impractical with a dense mask, 16,384.
    Case(
        "batch-size", "the figure: the cost of a larger batch", "below every peer at every size",
        (256, 512, 1024, 2048, 4096, 8192, 16384), partial(two_views, make_labels=ten_clusters), own_nt_xent,
        (replace(DENSE, largest=8192), LOOP),  # at 16,384 a dense step takes most of a minute and 16 GiB
        gpu_sizes=(256, 1024, 4096, 16384, 65536),
    ),
    # Below the smallest usual batch, and with the width of a ResNet-50.
    _small("", 128, (16, 32, 64, 128, 256, 512), one_cluster, "small batches: the cost of a call counts"),
    _small("-k10", 128, (16, 32, 64, 128, 256, 512), ten_clusters, "the same within clusters of a few samples"),
    _small("-wide", 2048, (32, 256), one_cluster, "wide rows, few of them: the time of plain PyTorch is in products"),
    _small("-wide-k10", 2048, (32, 256), ten_clusters, "the same within clusters of a few samples"),
    Case(
        "cubic-memory", "pytorch-metric-learning's largest batch in 4 GiB", "none: it shows the limit of the peer",
        (), partial(two_views, make_labels=ten_clusters), own_nt_xent, (METRIC_LEARNING,), cap_bytes=4 << 30,
    ),
    Case(
        "supcon", "several positives: 100 classes", "10x over SupContrast, 1/20 of its memory; 20x over the library",
        (1024, 2048, 4096, 8192), rows_of_classes, own_supcon, (SUPCONTRAST, METRIC_LEARNING_SUPCON),
    ),
    Case(
        "queue", "MoCo: 256 queries against 65,536 keys", "faster than the dense product",
        (256,), moco_queue, own_moco, (MOCO,),
    ),
    Case(
        "clip", "CLIP: both directions, logit_scale 100", "faster than two cross entropies",
        (4096,), image_text, own_clip, (CLIP,), gpu_sizes=(16384,),
    ),
    Case(
        "clip-bf16", "CLIP's large batches, against kernels written for them", "faster than every peer",
        (), image_text_fixed, own_clip_fixed, (CLIP_FIXED, MEMEFF, INF_CL), torch.bfloat16, gpu_sizes=(16384, 65536),
    ),
)  # fmt: skip
