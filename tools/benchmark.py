"""Time neighborhood attention against what else there is, and against what the machine can do.

    python tools/benchmark.py ops --out assets/benchmarks/ops.csv
    python tools/benchmark.py layers
    python tools/benchmark.py models
    python tools/benchmark.py ops --case b8_56x56_h2_d32_k7 --provider natten-cpu gather
    python tools/benchmark.py ops --list

What is compared is timed in turns, round after round, together with a matrix product and a large copy; a row gives
percentiles over the rounds. "% GEMM" is the least work of the operator (4 B H N K d floating-point operations forward,
14 forward and backward, K keys a query) over the time, as a part of the float32 rate of the matrix product;
"% floor" is the time that this work at that rate or the least traffic at the copy's rate takes, whichever is longer,
over the time. Left out of the times: compiling, the making of masks and indices that a program can keep, and the
fetching of memory that the call before gave back.
Before it is timed, each result of an operator is compared with the reference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import layers, models, ops
from benchmarks.entry import DTYPES, Entry, Setting
from benchmarks.memory import keep_freed_memory, peak_mb, peak_mb_in_fresh_process
from benchmarks.report import Row, format_table, make_row, write_csv
from benchmarks.timing import time_group

from natzoo import command_line

KINDS = {"ops": ops, "layers": layers, "models": models}
_HELP = {
    "ops": "the operator, by every implementation",
    "layers": "the attention layer against timm's WindowAttention, with peak memory",
    "models": "whole models against timm's, with peak memory",
}
_ROUNDS = {"ops": 25, "layers": 25, "models": 10}
_PATIENCE_S = {"ops": 0.3, "layers": 0.3, "models": 4.0}


def run(args: argparse.Namespace) -> None:
    """Times all groups asked for; the CSV is complete up to the last group at any time.

    Raises:
        ValueError: on unknown names, or if nothing could be timed.
    """
    module = KINDS[args.kind]
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: name the table to write in it.")
    keep_freed_memory()
    groups = args.case or module.GROUPS
    plans = [module.plan(group, args.provider, setting_of(args)) for group in dict.fromkeys(groups)]
    rows: list[Row] = []
    for number, entries in enumerate(plans, start=1):
        title = f"{number}/{len(plans)} {entries[0].group}"
        rows += run_group(entries, args.repeats, args.patience, title)
        if rows:
            write_csv(args.out, rows)
    if not rows:
        raise ValueError("nothing could be timed: all that was asked for was left out, for the reasons above.")
    print(format_table(rows))
    print(f"wrote {args.out}")


def run_group(entries: list[Entry], rounds: int, patience_s: float, title: str) -> list[Row]:
    """Times one group, then measures memory where that is of interest."""
    kind = entries[0].kind
    timings = time_group(entries, KINDS[kind].make, rounds, patience_s, title, leave_out)
    peaks = dict.fromkeys(timings)
    if kind != "ops":
        for entry in tqdm(timings, desc=f"{title}, memory", unit="process", disable=None):
            try:
                peaks[entry] = peak_mb_in_fresh_process(entry, __file__)
            except RuntimeError as error:
                leave_out(entry, str(error))
    return [make_row(entry, timing, peaks[entry]) for entry, timing in timings.items()]


def leave_out(entry: Entry, reason: str) -> None:
    tqdm.write(f"left out: {entry}: {reason}", file=sys.stderr)


def show_memory(args: argparse.Namespace) -> None:
    """Prints the peak memory of one call, in this process."""
    entry = Entry(args.of, args.case, args.case, args.provider, args.pass_name, setting_of(args))
    if entry not in KINDS[args.of].plan(args.case, [args.provider], setting_of(args)):
        raise ValueError(f"{args.of} has no pass {args.pass_name!r} for case {args.case!r}.")
    print(f"peak memory {peak_mb(entry, KINDS[args.of].make):.1f} MB")


def show_list(kind: str) -> None:
    print("cases:", *KINDS[kind].GROUPS, sep="\n  ")
    print("providers:", *KINDS[kind].PROVIDERS, sep="\n  ")
    print(KINDS[kind].__doc__.strip().split("\n\n")[-1])


def setting_of(args: argparse.Namespace) -> Setting:
    """Raises ValueError if the device is not one that works here."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {args.device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return Setting(args.dtype, args.threads, args.device)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="kind", required=True)
    setting = argparse.ArgumentParser(add_help=False)
    setting.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    setting.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of PyTorch")
    setting.add_argument("--device", default="cpu", help="cpu, or cuda as torch.device reads it")
    for kind, text in _HELP.items():
        command = commands.add_parser(
            kind, help=text, parents=[setting], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument("--case", nargs="+", metavar="NAME", help="all of --list unless given")
        command.add_argument("--provider", nargs="+", metavar="NAME", help="all of --list unless given")
        command.add_argument("--repeats", type=positive, default=_ROUNDS[kind], help="rounds, and samples of each")
        command.add_argument(
            "--patience",
            type=float,
            default=_PATIENCE_S[kind],
            metavar="SECONDS",
            help="calls that take longer are sampled in fewer rounds, at least 3",
        )
        out = Path("output", "benchmarks", f"{kind}.csv")
        command.add_argument("--out", type=Path, default=out, metavar="CSV", help="table to write")
        command.add_argument("--list", action="store_true", help="show cases and providers, and time nothing")
    memory = commands.add_parser("memory", help="peak memory of one call, as the others measure it", parents=[setting])
    memory.add_argument("of", choices=KINDS, help="what kind of call")
    memory.add_argument("case")
    memory.add_argument("provider")
    memory.add_argument("pass_name", metavar="pass", help="forward, forward+backward, inference or step")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.kind == "memory":
        show_memory(args)
    elif args.list:
        show_list(args.kind)
    else:
        run(args)


if __name__ == "__main__":
    command_line.run(main)
