"""Losses of other libraries, over the fused ones: one file for each host, which only importing that file loads.

    from lightly.loss import NTXentLoss                             # before
    from mcl_kernels.integrations.lightly import NTXentLoss         # after

Each class is its host's own with the same arguments, and one more in `forward`: the pseudo labels. Without them value
and gradients are the host's; no N x N matrix is built either way.
"""
