"""Times the tiles that a CUDA kernel may take, to see whether natten/backends/cuda/tiles.py chooses well.

    python tools/gpu_tiles.py b128_56x56_h2_d32_k7 b128_14x14_h8_d32_k7 --most 12
    python tools/gpu_tiles.py b128_56x56_h2_d32_k7 --dry-run --capability 9.0

Of each kernel of a problem (shapes as tools/benchmark.py writes them, in bfloat16) the likeliest tiles are timed while
the other kernels take theirs: those of least cost, and for each number of warps that a multiprocessor then holds the
one of least cost. The first row of a kernel is the tile that is chosen. `--dry-run` times nothing and needs no GPU.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
from benchmarks import ops  # noqa: E402
from gpu_checks.check import Check, kernels_of  # noqa: E402
from gpu_checks.operators import operator_calls  # noqa: E402

from natten.backends import cuda  # noqa: E402
from natten.backends.cuda import driver  # noqa: E402
from natten.backends.cuda.tiles import KINDS, Tile, tiles_and_costs  # noqa: E402
from natten.profiler import find_gpu  # noqa: E402


def likely_tiles(case: ops.Case, kind: str, gpu, most: int) -> list[tuple[Tile, float]]:
    """The tiles to be timed, the chosen one first."""
    axes = (*(cuda._NO_AXIS,) * (3 - len(case.axes)), *case.axes)
    limits = (gpu.multi_processor_count, gpu.shared_memory_per_block_optin, False)
    found = tiles_and_costs(kind, axes, case.head_dim, case.batch * case.heads, case.has_rpb, *limits)
    ranked = sorted(found, key=lambda tile_and_cost: tile_and_cost[1])
    by_warps: dict[int, tuple[Tile, float]] = {}
    for tile, cost in ranked:
        by_warps.setdefault(tile.warps * tile.min_blocks, (tile, cost))
    others = [found for found in (*by_warps.values(), *ranked) if found != ranked[0]]
    return [ranked[0], *dict.fromkeys(others)][:most]


@contextmanager
def taking(kind: str, tile: Tile) -> Iterator[None]:
    """Lets kernels of a kind take a tile."""
    choose = cuda.choose_tile

    def choose_or_take(asked: str, *arguments, **named):
        return tile if asked == kind else choose(asked, *arguments, **named)

    with (
        mock.patch.object(cuda, "choose_tile", choose_or_take),
        mock.patch.object(cuda, "_plan", inspect.unwrap(cuda._plan)),
    ):
        yield


def describe(tile: Tile) -> str:
    size = "x".join(map(str, tile.size))
    words = [f"{size}, {tile.warps} warps x {tile.min_blocks} blocks, {tile.chunk_rows} rows"]
    words += [f"stages of {tile.stage_rows}"] * tile.is_staged + ["segments"] * tile.is_segmented
    words += ["bias in fragments"] * tile.has_bias_fragments + ["its gradient too"] * tile.has_gradient_fragments
    return ", ".join(words) + f", {tile.shared_bytes >> 10} KiB"


def compile_all(case: ops.Case, kind: str, tiles: list[Tile], gpu) -> None:
    query = torch.empty(case.batch, *case.space, case.heads, case.head_dim, dtype=torch.bfloat16, device="meta")
    kernels = set()
    for tile in tiles:
        with taking(kind, tile):
            kernels |= kernels_of(query, case.axes, case.has_rpb, gpu)
    driver.machine_codes(kernels, (gpu.major, gpu.minor))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", metavar="SHAPE", help="such as b128_56x56_h2_d32_k7")
    parser.add_argument("--most", type=int, default=10, metavar="N", help="tiles of a kernel (default: 10)")
    parser.add_argument("--dry-run", action="store_true", help="print the tiles, and time nothing")
    parser.add_argument("--capability", default="9.0", help="the GPU of a dry run (default: 9.0)")
    args = parser.parse_args(argv)
    try:
        cases = {name: ops.parse(name) for name in args.shapes}
        gpu = find_gpu(args.capability) if args.dry_run else None
    except ValueError as error:
        parser.error(str(error))
    if not args.dry_run:
        if not torch.cuda.is_available():
            parser.error("there is no CUDA device here: --dry-run needs none")
        gpu = torch.cuda.get_device_properties(0)
    check = Check(600, None, rehearse=False)
    for name, case in cases.items():
        forward, backward = ([], []) if args.dry_run else operator_calls(check, case, torch.bfloat16)
        for kind in KINDS:
            calls = forward if kind == "forward" else backward
            found = likely_tiles(case, kind, gpu, args.most)
            print(f"{name} {kind}")
            if not args.dry_run:
                compile_all(case, kind, [tile for tile, _ in found], gpu)
            for tile, cost in found:
                time = ""
                if not args.dry_run:
                    with taking(kind, tile):
                        time = f"{check.milliseconds(calls) * 1e3:8.1f} us, "
                print(f"  {time}cost {cost / found[0][1]:.2f}: {describe(tile)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
