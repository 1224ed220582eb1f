"""Random inputs of 1000 problems per rank: the errors are those of PyTorch's own arithmetic in the same precision.

The windows and head_dims are few, so that few kernels are compiled; maps, batch sizes and numbers differ.
"""

from __future__ import annotations

import os
import time

import torch

from gpu_checks.problems import FUSED, PRECISIONS, Machine, errors, is_good, kernels_of, machine
from gpu_checks.rows import Writer
from natten.backends.cuda.driver import Kernel

PROBLEMS = 1000  # per rank

# By rank: a window (kernel_size, stride, dilation, is_causal), map sizes, and head_dim.
WINDOWS = {
    1: (
        ((7, 1, 1, False), ((64,), (33,)), 32),
        ((9, 2, 3, True), ((40,), (61,)), 24),
        ((130, 1, 1, False), ((300,),), 64),
    ),
    2: (
        ((7, 1, 1, False), ((7, 7), (20, 17), (56, 31)), 32),
        (((5, 4), (1, 2), (2, 1), (False, True)), ((23, 19), (12, 40)), 16),
        ((13, 1, 1, False), ((26, 29),), 64),
        ((3, 3, 2, True), ((9, 14),), 128),
    ),
    3: (((3, 1, 1, False), ((6, 7, 9),), 32), (((2, 4, 3), 1, (1, 2, 1), (True, False, False)), ((5, 11, 10),), 40)),
}
BATCHES = ((1, 4), (2, 2), (4, 1))  # batch and heads


def cases(rank: int) -> list[tuple]:
    """Return window, map, head_dim and has_rpb of all cases of a rank."""
    return [
        (window, space, dim, has_rpb)
        for window, spaces, dim in WINDOWS[rank]
        for space in spaces
        for has_rpb in (True, False)
    ]


def each_case_once(rank: int) -> int:
    """Return the number of problems in which each case appears once in each precision."""
    return len(PRECISIONS) * len(cases(rank))


def kernels(gpu) -> set[Kernel]:
    """Return the kernels of all problems on a GPU."""
    found = set()
    for rank in WINDOWS:
        for window, space, dim, has_rpb in cases(rank):
            batch, heads = BATCHES[0]
            for dtype, _, products in PRECISIONS.values():
                found |= kernels_of(FUSED, (batch, *space, heads, dim), window, dtype, products, has_rpb, gpu)
    return found


def problem(rank: int, index: int) -> tuple[str, tuple, tuple, bool]:
    """Return precision, shape, window and has_rpb of a problem. All precisions and cases take turns."""
    names, known = tuple(PRECISIONS), cases(rank)
    window, space, dim, has_rpb = known[index // len(names) % len(known)]
    batch, heads = BATCHES[index // len(names) // len(known) % len(BATCHES)]
    return names[index % len(names)], (batch, space, heads, dim), window, has_rpb


def check_rank(writer: Writer, where: Machine, rank: int, count: int, until: float) -> None:
    """Check problems of a rank, and add a row per precision. A precision without a problem fails."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PRECISIONS}
    wrong = dict.fromkeys(PRECISIONS, 0)
    done = dict.fromkeys(PRECISIONS, 0)
    for index in range(count):
        if time.monotonic() > until:
            break
        precision, shape, window, has_rpb = problem(rank, index)
        pairs = errors(where, precision, shape, window, index, has_rpb)
        found[precision] += pairs
        wrong[precision] += not all(is_good(*pair) for pair in pairs)
        done[precision] += 1
    for precision, pairs in found.items():
        what = f"{rank}-D, {precision}"
        if not pairs:
            writer.checked(what, False, "no problem ran")
            continue
        error, peer_error = torch.tensor(pairs, dtype=torch.float64).square().mean(0).sqrt().tolist()
        text = f"{done[precision]} problems, {wrong[precision]} wrong, {error:.2f} roundings, PyTorch {peer_error:.2f}"
        writer.checked(what, not wrong[precision] and error <= 2 * peer_error, text, "error <= 2x PyTorch's")
    if sum(done.values()) < count:
        writer.open(f"{rank}-D", f"only {sum(done.values())} of {count} problems ran in time")


def run(writer: Writer, is_rehearsal: bool) -> None:
    """Check all ranks, each in a third of the time that is left."""
    end = time.monotonic() + float(os.environ.get("GPU_CHECK_SECONDS", "60")) - 12  # importing PyTorch took some
    for number, rank in enumerate(WINDOWS):
        until = time.monotonic() + (end - time.monotonic()) / (len(WINDOWS) - number)
        count = each_case_once(rank) if is_rehearsal else PROBLEMS
        check_rank(writer, machine(is_rehearsal), rank, count, until)
