"""Losses of other libraries (hosts), computed by the fused kernels. Each host has a module, which alone imports it.

    from lightly.loss import NTXentLoss                             # before
    from mcl_kernels.integrations.lightly import NTXentLoss         # after

Each class subclasses the host's class of the same name and adds an argument for the pseudo labels. Without them, value
and gradients equal the host's, unless the class documents a difference. No N x N matrix is built.

Importing a module raises an ImportError, with the command that installs the host, if the host is missing or too old.
"""
