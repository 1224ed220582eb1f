"""Run the parts one after another, each in its own process, within one time limit; always end with the table.

    bash tools/gpu_check.sh                      # everything, in at most 540 s
    bash tools/gpu_check.sh --seconds 200 smoke random
    bash tools/gpu_check.sh --rehearse           # without a GPU: tiny problems on the CPU

A part that crashes or takes too long does not end the run, but a failed smoke test does. Rows are written when they are
measured; the folder also has the output of each part, and the compiled kernels, which another run reuses.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu_checks import rows
from gpu_checks.parts import PARTS, Part
from gpu_checks.rows import Writer

SECONDS = 540.0
RESERVE_S = 8.0  # for ending a part and printing the table
GRACE_S = 3.0  # for a part to end after a signal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a row failed, else 0."""
    args = _parse(argv)
    if args.only:
        _run_here(args.only, args.out, args.rehearse)
        return 0
    return run_all(args.parts, args.out, args.seconds, lambda part: _command(part, args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools/gpu_check.sh", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("names", nargs="*", metavar="PART", help=f"{', '.join(part.name for part in PARTS)} (default: all)")
    add("--seconds", type=float, default=SECONDS, help=f"time limit of the run (default: {SECONDS:g})")
    add("--out", type=Path, default=Path("output/gpu_check"), metavar="DIR", help="folder (default: output/gpu_check)")
    add("--rehearse", action="store_true", help="run tiny problems on the CPU, to check that everything runs")
    add("--only", help=argparse.SUPPRESS)  # a part, run in this process
    args = parser.parse_args(argv)
    known = {part.name: part for part in PARTS}
    for name in (*args.names, *([args.only] if args.only else ())):
        if name not in known:
            parser.error(f"PART {name!r} is unknown; use {', '.join(known)}")
    args.parts = [known[name] for name in args.names] or list(PARTS)
    args.only = known.get(args.only)
    return args


def _command(part: Part, args: argparse.Namespace) -> list[str]:
    options = ["--rehearse"] if args.rehearse else []
    return [sys.executable, "-m", "gpu_checks", "--only", part.name, "--out", str(args.out), *options]


def _run_here(part: Part, folder: Path, is_rehearsal: bool) -> None:
    importlib.import_module(f"gpu_checks.{part.module}").run(Writer(folder, part.name), is_rehearsal)


def run_all(parts: Sequence[Part], folder: Path, seconds: float, command: Callable[[Part], list[str]]) -> int:
    """Run parts within a time limit, and print and write the table of all rows, however the run ends.

    Args:
        command: returns the command of a part; it writes rows to `folder`.

    Returns:
        1 if a row failed or a required part has no row that passed, else 0.
    """
    end = time.monotonic() + seconds - RESERVE_S
    folder.mkdir(parents=True, exist_ok=True)
    (folder / rows.ROWS_FILE).unlink(missing_ok=True)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    waiting = list(parts)
    reason = "the run was interrupted"
    try:
        while waiting:
            part = waiting[0]
            left = end - time.monotonic()
            if left < part.least_s:
                Writer(folder, part.name).open(
                    "everything", f"no time: {max(left, 0):.0f} s of {seconds:g} s were left"
                )
            else:
                _run_part(part, folder, min(part.limit_s, left), command(part))
            waiting.pop(0)
            if part.is_required and not _has_passed(part, folder):
                reason = f"the part {part.name} failed"
                break
    except KeyboardInterrupt:
        pass
    finally:
        for part in waiting:
            Writer(folder, part.name).open("everything", reason)
        signal.signal(signal.SIGTERM, previous)
        found = rows.read(folder)
        (folder / "table.md").write_text(rows.format_table(found) + "\n")
        print(rows.format_table(found))
        counts = [(v, sum(row.verdict == v for row in found)) for v in ("passed", "failed", "measured", "open")]
        print(", ".join(f"{count} {verdict}" for verdict, count in counts), flush=True)
    return int(any(row.verdict == "failed" for row in found))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _has_passed(part: Part, folder: Path) -> bool:
    verdicts = {row.verdict for row in rows.read(folder) if row.part == part.name}
    return "passed" in verdicts and not verdicts & {"failed", "open"}


def _run_part(part: Part, folder: Path, limit_s: float, command: list[str]) -> None:
    """Run a part in its own process; add a row if it does not end well."""
    print(f"== {part.name}, at most {limit_s:.0f} s", flush=True)
    started, log = time.monotonic(), folder / f"{part.name}.log"
    environment = os.environ | {"NATTEN_CACHE_DIR": os.environ.get("NATTEN_CACHE_DIR") or str(_cache(folder))}
    environment["GPU_CHECK_SECONDS"] = (
        f"{limit_s - 2:.1f}"  # parts with a variable number of problems end by themselves
    )
    # The reference must not take the place of a kernel unnoticed.
    environment |= {"NATTEN_SELF_CHECK": "0", "PYTHONWARNINGS": "error:natten falls back:RuntimeWarning"}
    writer = Writer(folder, part.name)
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            writer.open("the rest", f"stopped after {limit_s:.0f} s; see {log.name}")
            status = 0
        finally:
            _end(child)
    if status:
        writer.checked("the part itself", False, f"ended with status {status}: {_last_line(log)}")
    found = [row for row in rows.read(folder) if row.part == part.name]
    if not found:
        writer.open("everything", "the part wrote no row")
    for row in found:
        print(rows.format_row(row))
    print(f"   {part.name} took {time.monotonic() - started:.0f} s", flush=True)


def _cache(folder: Path) -> Path:
    return folder.absolute() / "cache"


def _end(child: subprocess.Popen) -> None:
    """End a part and everything that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


if __name__ == "__main__":
    sys.exit(main())
