"""Figures drawn by tools/plot.py and tools/visualize.py."""
