"""Time operators, layers and models, and compare the times with the bars. tools/benchmark.py makes the tables."""

from __future__ import annotations

import benchmark
import torch
from benchmarks import gpu
from benchmarks.entry import Entry
from benchmarks.report import Row, write_csv

from gpu_checks.rows import Writer

_ROUNDS, _REHEARSAL_ROUNDS = 15, 1
_PATIENCE_S = 0.3

# The longest time, as a multiple of the shortest possible one; the aims are 1.2 and 1.8.
_FORWARD_BAR, _BACKWARD_BAR = 2.0, 2.5
_BIAS_BARS = {"forward": 1.05, "forward+backward": 1.10}  # with a bias over without
_LAYER_SPEED, _LAYER_MEMORY = 2.0, 0.6  # relative to timm's WindowAttention
_MODEL_SPEED = 1.2  # of nat_tiny relative to swin_tiny
_FLEX_SPEED = 1.0
# What NATTEN 0.21 publishes (docs/sample-outputs): microseconds of forward on an H100.
_PUBLISHED_US = {"b1_32768_h1_d128_k2048_norpb": 94.8}


def run(writer: Writer, is_rehearsal: bool) -> None:
    """Time the groups of the part; see `benchmarks.gpu.PARTS`."""
    device = "cpu" if is_rehearsal else "cuda:0"
    if writer.part == "ops" and not is_rehearsal:
        compiled, cached = gpu.first_call_s(device)
        writer.measured("first call", f"{compiled:.2f} s, from the kernel cache {cached * 1e3:.0f} ms")
    rows: list[Row] = []
    forward: dict[tuple[str, str], Row] = {}  # by case and dtype
    for entries in gpu.plan(writer.part, device, is_rehearsal):
        rounds = _REHEARSAL_ROUNDS if is_rehearsal else _ROUNDS
        done = benchmark.run_group(entries, rounds, _PATIENCE_S, entries[0].group)
        rows += done
        write_csv(writer.path.parent / f"{writer.part}.csv", rows)
        _judge(writer, done, forward)
        for entry in entries:
            if entry.provider in gpu.OURS and not _has(done, entry):
                writer.checked(
                    f"{entry.case} {entry.pass_name} {entry.setting.dtype}", False, "it did not run; see the log"
                )
        if not is_rehearsal:
            torch.cuda.empty_cache()
    if not rows:
        writer.open("everything", "nothing of this part runs in a rehearsal" if is_rehearsal else "nothing ran")


def _has(rows: list[Row], entry: Entry) -> bool:
    wanted = (entry.case, entry.provider, entry.pass_name, entry.setting.dtype)
    return any((row["case"], row["provider"], row["pass"], row["dtype"]) == wanted for row in rows)


def _judge(writer: Writer, rows: list[Row], forward: dict[tuple[str, str], Row]) -> None:
    """Add the rows of a group of measurements. The forward passes of all groups are kept in `forward`."""
    ours = [row for row in rows if row["provider"] in gpu.OURS]
    if writer.part == "ops":
        _judge_operator(writer, ours, forward)
        _judge_bias(writer, ours)
    for row in ours:
        rivals = [other for other in rows if other["pass"] == row["pass"] and other["provider"] not in gpu.OURS]
        for rival in rivals:
            _judge_against(writer, row, rival)


def _judge_operator(writer: Writer, rows: list[Row], forward: dict[tuple[str, str], Row]) -> None:
    """Compare the operator with the shortest possible time, and with published times."""
    for row in rows:
        name, limit_ms = f"{row['case']} {row['dtype']}", _limit_ms(row)
        if row["pass"] == "forward":
            forward[row["case"], row["dtype"]] = row
            writer.judged(f"{name}, forward, {row['p50_ms'] * 1e3:.0f} us", row["p50_ms"] / limit_ms, _FORWARD_BAR)
            if row["case"] in _PUBLISHED_US:
                ratio = row["p50_ms"] * 1e3 / _PUBLISHED_US[row["case"]]
                writer.measured(f"{name}, forward, over NATTEN 0.21 on an H100", f"{ratio:.2f}x")
            continue
        first = forward.get((row["case"], row["dtype"]))
        if first is not None:
            ms, limit_ms = row["p50_ms"] - first["p50_ms"], limit_ms - _limit_ms(first)
            writer.judged(f"{name}, backward, {ms * 1e3:.0f} us", ms / limit_ms, _BACKWARD_BAR)
        else:
            ratio = row["p50_ms"] / limit_ms
            writer.measured(
                f"{name}, forward+backward, {row['p50_ms'] * 1e3:.0f} us", f"{ratio:.2f}x the shortest time"
            )


def _judge_bias(writer: Writer, rows: list[Row]) -> None:
    """Compare the time of the operator with its time without a bias, in one group."""
    for row in rows:
        without = [
            other for other in rows if other["case"] == f"{row['case']}_norpb" and other["dtype"] == row["dtype"]
        ]
        if row["group"] == gpu.BIAS_AND_DTYPE and without:
            ratio = row["p50_ms"] / without[0]["p50_ms"]
            writer.judged(f"{row['case']}, {row['pass']}, bias on/off", ratio, _BIAS_BARS[row["pass"]])


def _limit_ms(row: Row) -> float:
    return row["p50_ms"] * row["percent_of_floor"] / 100


def _judge_against(writer: Writer, row: Row, rival: Row) -> None:
    bar = {"layers": _LAYER_SPEED, "models": _MODEL_SPEED}.get(row["kind"], _FLEX_SPEED)
    what = f"{row['case']} {row['pass']}, {row['provider']} against {rival['provider']}"
    detail = f"{row['p50_ms']:.3g} and {rival['p50_ms']:.3g} ms"
    if row["images_per_s"]:
        detail += f", {row['images_per_s']:.0f} and {rival['images_per_s']:.0f} img/s"
    writer.judged(f"{what}, speed ({detail})", rival["p50_ms"] / row["p50_ms"], bar, is_least=True)
    if row["kind"] == "layers" and row["peak_memory_mb"] and rival["peak_memory_mb"]:
        writer.judged(f"{what}, peak memory", row["peak_memory_mb"] / rival["peak_memory_mb"], _LAYER_MEMORY)
