"""The rows of the table: what was found, and whether it is good enough. Each row is written as soon as it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROWS_FILE = "rows.jsonl"


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        part: the part of the run.
        what: what was checked or measured.
        found: the result, with its unit.
        bar: what is required, or empty.
        verdict: "passed", "failed", "measured" (without a bar) or "open" (not known).
    """

    part: str
    what: str
    found: str
    bar: str = ""
    verdict: str = "measured"


def judged(part: str, what: str, value: float, bar: float, is_least: bool = False, unit: str = "x") -> Row:
    """Return a row for a number that must be at most `bar`, or at least. NaN fails."""
    is_good = value >= bar if is_least else value <= bar
    text = f"{'>=' if is_least else '<='} {bar:g}{unit}"
    return Row(part, what, f"{value:.3g}{unit}", text, "passed" if is_good else "failed")


class Writer:
    """Appends rows of a part to a file that survives the process.

    Args:
        folder: the folder of the run.
        part: name of the part.
    """

    def __init__(self, folder: Path, part: str):
        self.path, self.part = folder / ROWS_FILE, part

    def add(self, row: Row) -> None:
        """Write a row and print it."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(format_row(row), flush=True)

    def measured(self, what: str, found: str) -> None:
        """Add a row without a bar."""
        self.add(Row(self.part, what, found))

    def judged(self, what: str, value: float, bar: float, is_least: bool = False, unit: str = "x") -> None:
        """Add a row for a number that must be at most `bar`, or at least."""
        self.add(judged(self.part, what, value, bar, is_least, unit))

    def checked(self, what: str, is_good: bool, found: str, bar: str = "") -> None:
        """Add a row for a check that passes or fails."""
        self.add(Row(self.part, what, found, bar, "passed" if is_good else "failed"))

    def open(self, what: str, reason: str) -> None:
        """Add a row for something that could not be checked."""
        self.add(Row(self.part, what, reason, "", "open"))


def read(folder: Path) -> list[Row]:
    """Return the rows that were written so far. An incomplete last line is ignored."""
    path = folder / ROWS_FILE
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(Row(*json.loads(line)))
        except (ValueError, TypeError):
            continue
    return rows


def format_row(row: Row) -> str:
    """Format a row for the progress of the run."""
    return f"[{row.verdict}] {row.part}: {row.what}: {row.found}{f' (required: {row.bar})' if row.bar else ''}"


def format_table(rows: Iterable[Row]) -> str:
    """Format rows as a Markdown table."""
    lines = ["| part | what | found | required | verdict |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
