"""Losses of other libraries, over the fused ones: one file for each host, which only importing that file loads.

    from lightly.loss import NTXentLoss                             # before
    from mcl_kernels.integrations.lightly import NTXentLoss         # after

Each class is its host's own with the same arguments, and one more for the pseudo labels. Until that is given, value and
gradients are the host's, whatever labels the host is given; no N x N matrix is built either way.
"""
