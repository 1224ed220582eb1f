"""Write the table of all classifiers in README.md from natzoo/zoo.yaml and assets/benchmarks/classifiers.csv.

    python tools/results_table.py

Parameters are counted, MACs and accuracies are published, and images per second are measured: one image at a time on
one CPU core, at the resolution of the model. docs/measuring.md has the commands that measure them again.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from natzoo import command_line
from natzoo.checkpoints import ZooEntry, write_atomically, zoo_entries

ROOT = Path(__file__).resolve().parents[1]
README, SPEEDS = ROOT / "README.md", ROOT / "assets" / "benchmarks" / "classifiers.csv"
BEGIN, END = "<!-- classifiers: tools/results_table.py -->", "<!-- end of classifiers -->"
_HEADER = ("model", "size", "parameters", "MACs", "top-1", "images/s", "weights", "recipe")


def speeds(path: Path = SPEEDS) -> dict[tuple[str, int], float]:
    """Return the measured images per second by model and image size."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["pass"] == "inference"]
    return {(row["provider"], int(row["case"].split("_")[2])): float(row["images_per_s"]) for row in rows}


def table() -> str:
    """Return the table in Markdown: one row per published classifier."""
    measured = speeds()
    lines = ["| " + " | ".join(_HEADER) + " |", "|---" * len(_HEADER) + "|"]
    lines += [_row(entry, measured) for entry in zoo_entries().values() if entry.task == "classification"]
    return "\n".join(lines)


def _row(entry: ZooEntry, measured: dict[tuple[str, int], float]) -> str:
    size = entry.facts.get("size", 224)
    speed = measured.get((entry.name, size))
    recipe = f"configs/classification/{entry.name}.yml"
    hub = f", [hub](https://huggingface.co/{entry.hub})" if entry.hub else ""
    macs, top1 = entry.facts.get("macs"), entry.facts.get("top1")
    cells = [
        f"`{entry.name}`",
        str(size),
        f"{entry.facts['parameters'] / 1e6:.1f} M",
        "-" if macs is None else f"{macs} G",
        "-" if top1 is None else str(top1),
        "-" if speed is None else f"{speed:.3g}",
        f"[file]({entry.url}){hub}",
        f"[yml]({recipe})" if (ROOT / recipe).is_file() else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def update(text: str) -> str:
    """Return the text of README.md with the current table.

    Raises:
        ValueError: if it lacks the comments that surround the table.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no lines {BEGIN} and {END}; restore them.")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    text = update(README.read_text())
    write_atomically(README, lambda file: file.write(text.encode()))
    print(f"wrote {README}")


if __name__ == "__main__":
    command_line.run(main)
