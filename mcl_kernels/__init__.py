"""Fast, exact contrastive learning with clusters.

`masked_info_nce`, `nt_xent`, `clip_loss` and `supcon_loss` are drop-in losses whose negatives come from the anchor's
own cluster; `KMeans` finds the clusters; `MultistageRunner` runs the stages.
"""

from mcl_kernels import objectives
from mcl_kernels.backends.table import capabilities
from mcl_kernels.distributed import ExchangePlan, plan_exchange
from mcl_kernels.kmeans import KMeans, assign_clusters
from mcl_kernels.logsumexp import count_negatives, masked_logsumexp
from mcl_kernels.losses import (
    ClipLoss,
    MaskedInfoNCE,
    NTXentLoss,
    SupConLoss,
    clip_loss,
    masked_info_nce,
    nt_xent,
    supcon_loss,
)
from mcl_kernels.losses.gradient_cache import cached_backward
from mcl_kernels.losses.labelled_queue import LabelledQueue
from mcl_kernels.losses.positive_ranks import positive_ranks
from mcl_kernels.stages.pseudo_labels import compose_labels
from mcl_kernels.stages.representation import ConcatEncoder, model_soup
from mcl_kernels.stages.runner import MultistageRunner
from mcl_kernels.stages.sampler import ClusterBatchSampler

__version__ = "0.2.0.dev0"

__all__ = [
    "ClipLoss",
    "ClusterBatchSampler",
    "ConcatEncoder",
    "ExchangePlan",
    "KMeans",
    "LabelledQueue",
    "MaskedInfoNCE",
    "MultistageRunner",
    "NTXentLoss",
    "SupConLoss",
    "assign_clusters",
    "cached_backward",
    "capabilities",
    "clip_loss",
    "compose_labels",
    "count_negatives",
    "masked_info_nce",
    "masked_logsumexp",
    "model_soup",
    "nt_xent",
    "objectives",
    "plan_exchange",
    "positive_ranks",
    "supcon_loss",
]
