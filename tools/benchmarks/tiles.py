"""The subcommand `tiles`: other tiles of a CUDA kernel next to the chosen one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from unittest import mock

import torch

from benchmarks import ops
from natten.backends import cuda
from natten.backends.cuda import driver
from natten.backends.cuda.tiles import KERNELS, Tile, tiles_and_costs
from natten.geometry import Axis
from natten.profiler import Timer, find_gpu, input_sets


def run(shapes: Sequence[str], most: int, is_dry_run: bool, capability: str) -> None:
    """Print the tiles of each kernel of some shapes, with their times unless it is a dry run.

    Raises:
        ValueError: if a shape or the capability is unknown, or there is no GPU.
    """
    cases = {name: ops.parse_plain(name) for name in shapes}
    if is_dry_run:
        gpu = find_gpu(capability)
    elif torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
    else:
        raise ValueError("tiles needs a CUDA device; use --dry-run to list the tiles without one.")
    for name, case in cases.items():
        forward, backward = ([], []) if is_dry_run else _operator_calls(case)
        for kernel in KERNELS:
            print(f"{name} {kernel}")
            found = likely_tiles(case, kernel, gpu, most)
            if not is_dry_run:
                _compile_all(case, kernel, [tile for tile, _ in found], gpu)
            for tile, cost in found:
                time = ""
                if not is_dry_run:
                    call, *others = forward if kernel == "forward" else backward
                    with using(kernel, tile):
                        time = f"{Timer(call, torch.device('cuda:0'), others).median_ms() * 1e3:8.1f} us, "
                print(f"  {time}cost {cost / found[0][1]:.2f}: {describe(tile)}", flush=True)


def likely_tiles(case: ops.Case, kernel: str, gpu, most: int) -> list[tuple[Tile, float]]:
    """Return the tiles to time with their costs, the chosen tile first.

    Args:
        case: the problem.
        kernel: one of KERNELS.
        gpu: properties of the GPU.
        most: number of tiles.
    """
    axes = (*(Axis(1, 1, 1, 1, False),) * (3 - len(case.axes)), *case.axes)
    limits = (gpu.multi_processor_count, gpu.shared_memory_per_block_optin)
    found = tiles_and_costs(kernel, axes, case.head_dim, case.batch * case.heads, case.has_rpb, *limits)
    ranked = sorted(found, key=lambda tile_and_cost: tile_and_cost[1])
    by_warps: dict[int, tuple[Tile, float]] = {}
    for tile, cost in ranked:
        by_warps.setdefault(tile.warps * tile.min_blocks, (tile, cost))
    others = [found for found in (*by_warps.values(), *ranked) if found != ranked[0]]
    return [ranked[0], *dict.fromkeys(others)][:most]


@contextmanager
def using(kernel: str, tile: Tile) -> Iterator[None]:
    """Make a kernel use a tile."""
    choose = cuda.choose_tile

    def choose_or_use(requested: str, *arguments, **named):
        return tile if requested == kernel else choose(requested, *arguments, **named)

    with (
        mock.patch.object(cuda, "choose_tile", choose_or_use),
        mock.patch.object(cuda, "_plan", inspect.unwrap(cuda._plan)),  # without its cache
    ):
        yield


def describe(tile: Tile) -> str:
    size = "x".join(map(str, tile.size))
    words = [f"{size}, {tile.warps} warps x {tile.min_blocks} blocks, {tile.chunk_rows} rows"]
    words += [f"stages of {tile.stage_rows}"] * tile.is_staged + ["segments"] * tile.is_segmented
    words += ["bias fragments"] * tile.has_bias_fragments + ["gradient fragments"] * tile.has_gradient_fragments
    return ", ".join(words) + f", {tile.shared_bytes >> 10} KiB"


def _compile_all(case: ops.Case, kernel: str, tiles: list[Tile], gpu) -> None:
    """Compile the kernels of all tiles on all cores."""
    query = torch.empty(case.batch, *case.space, case.heads, case.head_dim, dtype=torch.bfloat16, device="meta")
    kernels = set()
    for tile in tiles:
        with using(kernel, tile):
            for op in ("attention", "attention_backward"):
                kernels |= {step.kernel for step in cuda.launches(op, query, case.axes, case.has_rpb, gpu)}
    driver.machine_codes(kernels, (gpu.major, gpu.minor))


def _operator_calls(case: ops.Case) -> tuple[list[Callable[[], object]], list[Callable[[], object]]]:
    """Return forward and backward passes of the backend on inputs that together exceed the L2 cache."""
    device, maps = torch.device("cuda:0"), (case.heads, case.head_dim)
    gbytes = 3e-9 * case.batch * prod(case.space) * prod(maps) * 2
    scale, forward, backward = case.head_dim**-0.5, [], []
    for _ in range(max(2, input_sets(gbytes, device))):
        qkv = torch.randn(case.batch, *case.space, 3, *maps, device=device).bfloat16()
        table = (case.heads, *(2 * axis.kernel_size - 1 for axis in case.axes))
        inputs = (*qkv.unbind(-3), torch.randn(table, device=device) if case.has_rpb else None)
        out, lse = cuda.attention(*inputs, case.axes, scale)
        forward.append(lambda inputs=inputs: cuda.attention(*inputs, case.axes, scale))
        saved = (torch.randn_like(out), None, *inputs, out, lse)
        backward.append(lambda saved=saved: cuda.attention_backward(*saved, case.axes, scale))
    return forward, backward
