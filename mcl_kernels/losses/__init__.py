"""The losses, as functions and as modules."""

from mcl_kernels.losses.clip import ClipLoss, clip_loss
from mcl_kernels.losses.info_nce import MaskedInfoNCE, masked_info_nce
from mcl_kernels.losses.nt_xent import NTXentLoss, nt_xent
from mcl_kernels.losses.supcon import SupConLoss, supcon_loss

__all__ = [
    "ClipLoss",
    "MaskedInfoNCE",
    "NTXentLoss",
    "SupConLoss",
    "clip_loss",
    "masked_info_nce",
    "nt_xent",
    "supcon_loss",
]
