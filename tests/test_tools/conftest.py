"""Makes the scripts importable, and prints what the tests of the pages counted."""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


def pytest_terminal_summary(terminalreporter):
    counts = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "pages":
                counts[value[0]] += value[1]
    if counts:
        terminalreporter.write_line("pages: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
