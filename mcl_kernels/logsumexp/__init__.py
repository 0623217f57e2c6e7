from mcl_kernels.logsumexp.api import capabilities, count_negatives, masked_logsumexp

__all__ = ["capabilities", "count_negatives", "masked_logsumexp"]
