"""The losses, as functions and as modules."""

from mcl_kernels.losses.functional import clip_loss, masked_info_nce, nt_xent
from mcl_kernels.losses.modules import ClipLoss, MaskedInfoNCE, NTXentLoss

__all__ = ["ClipLoss", "MaskedInfoNCE", "NTXentLoss", "clip_loss", "masked_info_nce", "nt_xent"]
