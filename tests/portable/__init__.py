"""Run the compiled CPU kernels without Python, for other architectures under emulation and other systems.

`recorder.py` writes problems and their results to a file, `harness.cpp` runs a library on them, and `launcher.py`
compiles and runs both. `faults.cpp` is a library that makes mistakes, which the harness must find.
"""
