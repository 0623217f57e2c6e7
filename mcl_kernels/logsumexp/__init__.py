from mcl_kernels.logsumexp.api import count_negatives, masked_logsumexp

__all__ = ["count_negatives", "masked_logsumexp"]
