"""Losses of other libraries, computed by the fused kernels. Each host library has a file, and is imported only by it.

    from lightly.loss import NTXentLoss                             # before
    from mcl_kernels.integrations.lightly import NTXentLoss         # after

Each class subclasses the host's class of the same name, with the same arguments and one more for the pseudo labels.
Without pseudo labels, value and gradients equal the host's, for any other labels passed. No N x N matrix is built.
"""
