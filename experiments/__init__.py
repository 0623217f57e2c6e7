"""Studies that train models through the public API of mcl_kernels."""
