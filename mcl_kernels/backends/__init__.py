"""Table of the backends, with the reasons where one does not run, and the compiled libraries behind them."""
