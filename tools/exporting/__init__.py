"""The parts of tools/export.py: formats.py writes, loads and quantizes programs, measure.py compares and times them."""
