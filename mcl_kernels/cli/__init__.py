"""The command `mcl-kernels`."""
