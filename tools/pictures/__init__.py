"""What tools/visualize.py draws: one file a command, and what they share (style.py, models.py, overlay.py)."""
