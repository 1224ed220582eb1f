"""What tools/plot.py draws: diagrams, plots of published figures, plots of what assets/benchmarks holds."""
