"""What `tools/benchmark.py` is made of.

entry.py says what a row of the table is and what stands behind it; ops.py, layers.py and models.py make both, with the
other implementations of the operator in rivals.py; timing.py and memory.py measure; report.py writes.
"""
