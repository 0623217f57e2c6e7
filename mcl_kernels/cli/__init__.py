"""The command `mcl-kernels`: one file per subcommand, dispatched by `main`."""
