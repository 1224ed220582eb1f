"""Measure neighborhood attention against other implementations and against the limits of this machine.

    python tools/benchmark.py ops --out assets/benchmarks/ops.csv
    python tools/benchmark.py layers
    python tools/benchmark.py models
    python tools/benchmark.py models --device cuda --dtype bfloat16 --case inference_b128_224 step_b128_224
    python tools/benchmark.py ops --case b8_56x56_h2_d32_k7 --provider natten-cpu gather
    python tools/benchmark.py ops --provider natten-cpu sdpa
    python tools/benchmark.py ops --list
    python tools/benchmark.py timm-tables assets/benchmarks/models.csv --case inference_b8_224 step_b8_224
    python tools/benchmark.py gpu
    python tools/benchmark.py tiles b128_56x56_h2_d32_k7 --dry-run --capability 9.0
    python tools/benchmark.py training --help

Compared implementations are timed in turns, round after round, together with a large matrix product and a large copy.
The table shows the median, the 20th and 80th percentile, and two percentages, as natten/profiler.py defines them:
"% matmul" is the rate of the minimal arithmetic over that of the matrix product, "% limit" the shortest possible time
on this machine over the measured time: the arithmetic at the rate of the product, or the traffic at the rate of the
copy, whichever takes longer. On a CPU a smaller product is measured as well, to show whether the rate depends on size.
Compilation and the construction of reusable masks and indices do not count.
Results of the operator are compared with the reference before they are timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from benchmarks import gpu, layers, models, ops
from benchmarks.entry import DTYPES, Entry, Setting, positive
from benchmarks.memory import gpu_peak_mb, keep_freed_memory, peak_mb, peak_mb_in_new_process
from benchmarks.report import Row, format_table, is_same, make_row, read_rows, write_csv
from benchmarks.timing import time_group
from tqdm import tqdm

from natzoo import command_line

KINDS = {"ops": ops, "layers": layers, "models": models}
_HELP = {
    "ops": "time the operator",
    "layers": "time the attention layer and timm's WindowAttention, with peak memory",
    "models": "time whole models, with peak memory",
}
_ROUNDS = {"ops": 25, "layers": 25, "models": 10}
_PATIENCE_S = {"ops": 0.3, "layers": 0.3, "models": 4.0}
_GPU_ROUNDS = 15
_TILES = """Time the tiles that a CUDA kernel could use, to check the choice of natten/backends/cuda/tiles.py.

For each kernel of a problem, the most promising tiles are timed while the other kernels keep theirs: the tiles of least
cost, and for each number of warps per multiprocessor the tile of least cost. The first row of a kernel is the chosen
tile. Shapes are written as for `ops`; the dtype is bfloat16.
"""


def run(args: argparse.Namespace) -> None:
    """Time the requested groups. The CSV is rewritten after each group.

    Raises:
        ValueError: if a name is unknown, or nothing could be timed.
    """
    module = KINDS[args.kind]
    _check_out(args.out)
    keep_freed_memory()
    groups = args.case or module.GROUPS
    plans = [module.plan(group, args.provider, setting_of(args)) for group in dict.fromkeys(groups)]
    rows: list[Row] = []
    kept = read_rows(args.out) if args.append else []
    for number, entries in enumerate(plans, start=1):
        title = f"{number}/{len(plans)} {entries[0].group}"
        needs_memory = args.kind != "ops" and not args.no_memory
        rows += run_group(entries, args.repeats, args.patience, title, needs_memory)
        if rows:
            kept = [row for row in kept if not any(is_same(row, new) for new in rows)]
            write_csv(args.out, [*kept, *rows])
    if not rows:
        raise ValueError("--case and --provider leave nothing to time; the reasons are printed above.")
    print(format_table(rows))
    print(f"wrote {args.out}")
    if args.kind == "models" and args.timm_tables:
        write_timm_tables(args.timm_tables, [*kept, *rows])


def write_timm_tables(folder: Path, rows: list[Row]) -> None:
    """Write timm's tables from the rows of a table of models."""
    from benchmarks import timm_tables

    for path in timm_tables.write(folder, rows):
        print(f"wrote {path}")


def convert_to_timm_tables(args: argparse.Namespace) -> None:
    """Write timm's tables from a table that was measured before.

    Raises:
        ValueError: if the table cannot be read or has no such rows.
    """
    if not args.table.is_file():
        raise FileNotFoundError(f"{args.table} does not exist; name a table of `benchmark.py models`.")
    rows = [row for row in read_rows(args.table) if row["kind"] == "models"]
    rows = [row for row in rows if not args.case or row["case"] in args.case]
    if not rows:
        raise ValueError(f"{args.table} has no rows of models{' for ' + ', '.join(args.case) if args.case else ''}.")
    write_timm_tables(args.out, rows)


def run_gpu(args: argparse.Namespace) -> int:
    """Time the fixed set of measurements for a GPU; return 1 if a measurement of natten failed.

    Raises:
        ValueError: if a part is unknown, or there is no GPU.
    """
    _check_out(args.out)
    unknown = set(args.parts) - set(gpu.PARTS)
    if unknown:
        raise ValueError(f"PART {min(unknown)!r} is unknown; use {', '.join(gpu.PARTS)}.")
    if not args.rehearse and not torch.cuda.is_available():
        raise ValueError("gpu needs a CUDA device; --rehearse runs tiny shapes on the CPU.")
    device, end = "cpu" if args.rehearse else "cuda:0", time.monotonic() + args.seconds
    if not args.rehearse:
        compiled, cached = gpu.first_call_s(device)
        print(f"first call: {compiled:.2f} s; from the kernel cache: {cached * 1e3:.0f} ms")
    rows: list[Row] = []
    failed = False
    for part in args.parts or gpu.PARTS:
        for entries in gpu.plan(part, device, args.rehearse):
            if time.monotonic() + gpu.PARTS[part] > end:
                print(f"skipped: {part} {entries[0].group}: --seconds {args.seconds:g} are over", file=sys.stderr)
                continue
            done = run_group(entries, args.repeats, _PATIENCE_S[entries[0].kind], f"{part} {entries[0].group}")
            failed |= sum(row["provider"] in gpu.OURS for row in done) < sum(e.provider in gpu.OURS for e in entries)
            rows += done
            if rows:
                write_csv(args.out, rows)
            if not args.rehearse:
                torch.cuda.empty_cache()
    if rows:
        print(format_table(rows))
        print(f"wrote {args.out}")
    return int(failed)


def run_group(entries: list[Entry], rounds: int, patience_s: float, title: str, needs_memory: bool = True) -> list[Row]:
    """Time one group and, for layers and models, measure peak memory if it is needed."""
    kind = entries[0].kind
    timings = time_group(entries, KINDS[kind].make, rounds, patience_s, title, leave_out)
    peaks: dict[Entry, float | None] = dict.fromkeys(timings)
    if kind != "ops" and needs_memory:
        for entry in tqdm(timings, desc=f"{title}, memory", unit="process", disable=None):
            try:
                if entry.device.type == "cuda":
                    peaks[entry] = gpu_peak_mb(entry, timings[entry].subject)
                else:
                    peaks[entry] = peak_mb_in_new_process(entry, __file__)
            except RuntimeError as error:
                leave_out(entry, str(error))
    return [make_row(entry, timing, peaks[entry]) for entry, timing in timings.items()]


def leave_out(entry: Entry, reason: str) -> None:
    tqdm.write(f"left out: {entry}: {reason}", file=sys.stderr)


def show_memory(args: argparse.Namespace) -> None:
    """Print the peak memory of one call in this process."""
    entry = Entry(args.of, args.case, args.case, args.provider, args.pass_name, setting_of(args))
    if entry not in KINDS[args.of].plan(args.case, [args.provider], setting_of(args)):
        raise ValueError(f"pass {args.pass_name!r} does not exist for {args.of} {args.case}.")
    print(f"peak memory {peak_mb(entry, KINDS[args.of].make):.1f} MB")


def show_list(kind: str) -> None:
    """Print the cases and providers of a kind."""
    print("cases:", *KINDS[kind].GROUPS, sep="\n  ")
    print("providers:", *KINDS[kind].PROVIDERS, sep="\n  ")
    print(KINDS[kind].__doc__.strip().split("\n\n")[-1])


def setting_of(args: argparse.Namespace) -> Setting:
    """Return the setting that the options describe.

    Raises:
        ValueError: if the device is not available, or does not support the dtype.
    """
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {args.device!r} is not available: {str(error).splitlines()[0]}") from error
    if args.dtype == "tf32" and args.device == "cpu":
        raise ValueError("--dtype tf32 requires a GPU.")
    return Setting(args.dtype, args.threads, args.device)


def _check_out(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder; name a file.")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="kind", required=True)
    setting = argparse.ArgumentParser(add_help=False)
    add, threads = setting.add_argument, torch.get_num_threads()
    add("--dtype", choices=DTYPES, default="float32", help="tf32 rounds the products of float32 (default: float32)")
    add("--threads", type=positive, default=threads, metavar="N", help=f"CPU threads (default: {threads})")
    add("--device", default="cpu", help="cpu, or a GPU such as cuda or cuda:1 (default: cpu)")

    for kind, text in _HELP.items():
        notation = KINDS[kind].__doc__
        command = commands.add_parser(kind, help=text, description=notation, parents=[setting], formatter_class=raw)
        _add_output(command, kind, _ROUNDS[kind])
        add, patience = command.add_argument, _PATIENCE_S[kind]
        add("--case", nargs="+", metavar="NAME", help="cases (default: all that --list prints)")
        add("--provider", nargs="+", metavar="NAME", help="implementations (default: all for the device)")
        text = f"calls slower than this run in fewer rounds, at least 3 (default: {patience})"
        add("--patience", type=float, default=patience, metavar="SECONDS", help=text)
        add("--list", action="store_true", help="list cases and providers and exit")
        add("--append", action="store_true", help="keep the rows of --out that are not measured again")
        if kind != "ops":
            add("--no-memory", action="store_true", help="do not measure peak memory, which takes a process per row")
        if kind == "models":
            text = "also write timm's tables benchmark-infer-*.csv and benchmark-train-*.csv into this folder"
            add("--timm-tables", type=Path, metavar="FOLDER", help=text)

    text = "write timm's tables from a table of models, without measuring"
    tables = commands.add_parser("timm-tables", help=text, description=f"{text.capitalize()}.")
    add = tables.add_argument
    add("table", type=Path, metavar="CSV", help="table of `benchmark.py models`")
    add("--case", nargs="+", metavar="NAME", help="cases (default: all)")
    folder = Path("output", "benchmarks")
    add("--out", type=Path, default=folder, metavar="FOLDER", help=f"folder of the tables (default: {folder})")

    text = "print the peak memory of one call"
    memory = commands.add_parser("memory", help=text, description=f"{text.capitalize()}.", parents=[setting])
    memory.add_argument("of", choices=KINDS, help="kind of call")
    memory.add_argument("case", help="a case of that kind")
    memory.add_argument("provider", help="a provider of that kind")
    memory.add_argument("pass_name", metavar="pass", help="forward, forward+backward, inference or step")

    text = "time operator, layer and nat_tiny on a GPU, in about 6 minutes"
    fixed = commands.add_parser("gpu", help=text, description=f"T{text[1:]}.")
    _add_output(fixed, "gpu", _GPU_ROUNDS)
    add = fixed.add_argument
    add("parts", nargs="*", metavar="PART", default=[], help=f"{', '.join(gpu.PARTS)} (default: all)")
    add("--seconds", type=float, default=360.0, help="time limit; the remaining groups are skipped (default: 360)")
    add("--rehearse", action="store_true", help="run tiny shapes on the CPU, to check that everything runs")

    text = "time the tiles that a CUDA kernel could use"
    tiles = commands.add_parser("tiles", help=text, description=_TILES, formatter_class=raw)
    add = tiles.add_argument
    add("shapes", nargs="+", metavar="SHAPE", help="for instance b128_56x56_h2_d32_k7")
    add("--most", type=positive, default=10, metavar="N", help="tiles per kernel (default: 10)")
    add("--dry-run", action="store_true", help="list the tiles without timing them; needs no GPU")
    add("--capability", default="9.0", metavar="X.Y", help="GPU of the dry run (default: 9.0)")

    commands.add_parser("training", help="time the training loop against its parts", add_help=False)
    return parser.parse_args(argv)


def _add_output(command: argparse.ArgumentParser, name: str, rounds: int) -> None:
    out = Path("output", "benchmarks", f"{name}.csv")
    command.add_argument("--out", type=Path, default=out, metavar="CSV", help=f"table to write (default: {out})")
    text = f"rounds, each with one sample (default: {rounds})"
    command.add_argument("--repeats", type=positive, default=rounds, metavar="N", help=text)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["training"]:  # takes all options of train.py, which that parses
        from benchmarks import training

        training.main(argv[1:])
        return
    args = parse(argv)
    if args.kind == "memory":
        show_memory(args)
    elif args.kind == "gpu":
        sys.exit(run_gpu(args))
    elif args.kind == "tiles":
        from benchmarks import tiles

        tiles.run(args.shapes, args.most, args.dry_run, args.capability)
    elif args.kind == "timm-tables":
        convert_to_timm_tables(args)
    elif args.list:
        show_list(args.kind)
    else:
        run(args)


if __name__ == "__main__":
    command_line.run(main)
