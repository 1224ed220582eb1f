"""Check and measure the CUDA kernels on the GPU of this machine; tools/gpu_check.sh runs all of it.

- __main__.py runs the parts one after another, each in its own process, and prints the table.
- parts.py lists the parts with their time limits.
- rows.py: a row of the table, its bar and its verdict.
- smoke.py, compiling.py, random_problems.py, sanitizer.py, speed.py and counters.py are the parts.
- problems.py: the problems and precisions that the parts and tests/gpu share.
"""
