"""The parts of tools/benchmark.py.

- entry.py: what a measurement is (`Entry`) and the code it runs (`Subject`);
- ops.py, layers.py, models.py: the measurements; rivals.py: other implementations of the operator;
- timing.py, memory.py, report.py: how they are timed, how memory is measured, how results are written;
- gpu.py, tiles.py, training.py: the subcommands of these names.
"""
