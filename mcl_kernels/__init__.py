"""Fast, exact contrastive learning with clusters.

`masked_info_nce`, `nt_xent` and `clip_loss` are drop-in losses whose negatives come from the anchor's own
cluster; `KMeans` finds the clusters; `MultistageRunner` runs the stages.
"""

from mcl_kernels import objectives
from mcl_kernels.logsumexp import capabilities, count_negatives, masked_logsumexp
from mcl_kernels.losses import ClipLoss, MaskedInfoNCE, NTXentLoss, clip_loss, masked_info_nce, nt_xent
from mcl_kernels.ranks import positive_ranks

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "MaskedInfoNCE",
    "NTXentLoss",
    "capabilities",
    "clip_loss",
    "count_negatives",
    "masked_info_nce",
    "masked_logsumexp",
    "nt_xent",
    "objectives",
    "positive_ranks",
]
