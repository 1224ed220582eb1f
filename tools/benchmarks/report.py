"""Write results as a CSV in long format, with the machine and the versions in every row, and as a printed table."""

from __future__ import annotations

import csv
import platform
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch

import natten
from benchmarks.entry import Entry
from benchmarks.timing import Timing
from natten.profiler import SMALL_MATRIX_SIDE
from natzoo.checkpoints import write_table

# The names stay as they are, since plots read older tables: percent_of_floor is the percent of limit, cpu_model the GPU
# where there is one.
COLUMNS = (
    *("kind", "group", "case", "provider", "pass", "dtype", "threads", "device"),
    *("p20_ms", "p50_ms", "p80_ms", "n", "gflop", "percent_of_gemm", "percent_of_floor"),
    *("gemm_gflops", "small_gemm_gflops", "copy_gb_s", "peak_memory_mb", "images_per_s"),
    *("torch_version", "timm_version", "natten_version", "cpu_model", "date"),
)
Row = dict[str, Any]


def make_row(entry: Entry, timing: Timing, peak_memory_mb: float | None) -> Row:
    """Return a row of the table. Columns that do not apply to a measurement are empty."""
    subject, p50_ms = timing.subject, timing.timer.percentile(50)
    images_per_s = subject.batch / p50_ms * 1e3 if subject.batch else None
    words = dict(zip(COLUMNS[:5], (entry.kind, entry.group, entry.case, entry.provider, entry.pass_name), strict=True))
    figures = {
        "p20_ms": timing.timer.percentile(20),
        "p50_ms": p50_ms,
        "p80_ms": timing.timer.percentile(80),
        "n": len(timing.timer.samples_ms),
        "gflop": subject.work.gflop,
        "percent_of_gemm": timing.percent_of_matmul,
        "percent_of_floor": timing.percent_of_limit,
        "gemm_gflops": timing.limits.matmul_gflops,
        "small_gemm_gflops": timing.limits.small_matmul_gflops,
        "copy_gb_s": timing.limits.copy_gb_s,
        "peak_memory_mb": peak_memory_mb,
        "images_per_s": images_per_s,
    }
    return {**words, **entry.setting._asdict(), **figures, **_environment(entry.device)}


@cache
def _environment(device: torch.device) -> Row:
    return {
        "torch_version": torch.__version__,
        "timm_version": timm.__version__,
        "natten_version": natten.__version__,
        "cpu_model": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write all rows, replacing an older file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, COLUMNS, ({name: _format(row[name]) for name in COLUMNS} for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of an older file; none if there is no file.

    Raises:
        ValueError: if the file is not such a table.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    if any(tuple(row) != COLUMNS for row in rows):
        raise ValueError(f"{path} is not a table of this program; choose another file.")
    return rows


def is_same(row: Row, other: Row) -> bool:
    """Return whether two rows are measurements of the same thing, maybe at different times."""
    return all(str(row[name]) == str(other[name]) for name in COLUMNS[:8])


def _format(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


_TITLES = {
    "provider": "provider",
    "pass": "pass",
    "what": "case",
    "p50_ms": "ms",
    "spread": "p20-p80",
    "relative": "relative",
    "percent_of_gemm": "% matmul",
    "percent_of_floor": "% limit",
    "gemm_gflops": "matmul GFLOP/s",
    "small_gemm_gflops": f"n={SMALL_MATRIX_SIDE}",
    "peak_memory_mb": "peak MB",
    "images_per_s": "img/s",
}
_WORDS = ("provider", "pass", "what")


def format_table(rows: list[Row]) -> str:
    """Format rows as a table, by group. `relative` is the time over that of the first row of the group and pass."""
    first: dict[tuple[str, str], float] = {}
    lines = [_TITLES]
    for row in rows:
        base_ms = first.setdefault((row["group"], row["pass"]), row["p50_ms"])
        derived = {
            "what": f"{row['case']} {row['dtype']} {row['threads']} threads",
            "spread": f"{row['p20_ms']:.4g}-{row['p80_ms']:.4g}",
            "relative": f"{row['p50_ms'] / base_ms:.2f}",
        }
        lines.append({name: _short({**row, **derived}[name]) for name in _TITLES})
    used = [name for name in _TITLES if any(line[name] for line in lines[1:])]
    widths = {name: max(len(line[name]) for line in lines) for name in used}
    text = [_line(lines[0], widths)]
    for row, line, above in zip(rows, lines[1:], [None, *rows], strict=False):
        if above is None or row["group"] != above["group"]:
            text.append(f"-- {row['group']}")
        text.append(_line(line, widths))
    return "\n".join(text)


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(values: dict[str, str], widths: dict[str, int]) -> str:
    """Align words to the left and numbers to the right."""
    cells = (values[n].ljust(width) if n in _WORDS else values[n].rjust(width) for n, width in widths.items())
    return "  ".join(cells).rstrip()
