"""Where each implementation runs, and the compiled libraries behind them."""
