"""`benchmark.py tiles` without a GPU: what it would time, and that all such tiles compute the same."""

from __future__ import annotations

import benchmark
import pytest
import torch
from benchmarks import ops, tiles
from emulation.launcher import emulated_gpu

from natten.backends import cuda
from natten.backends.cuda.tiles import KERNELS
from natten.profiler import find_gpu


def test_the_chosen_tile_comes_first(capsys):
    name = "b128_56x56_h2_d32_k7"
    benchmark.main(["tiles", name, "--dry-run", "--most", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(name)] == [f"{name} {kernel}" for kernel in KERNELS]
    assert len(lines) == len(KERNELS) * (1 + 3)
    query = torch.empty(128, 56, 56, 2, 32, dtype=torch.bfloat16, device="meta")
    (step,) = cuda.launches("attention", query, ops.parse(name).axes, True, find_gpu("9.0"))
    words = dict(text.split("=") for text in step.kernel.definitions)
    tile, _ = tiles.likely_tiles(ops.parse(name), "forward", find_gpu("9.0"), 3)[0]
    assert list(map(str, tile.size)) == [words[f"TILE_{axis}"] for axis in "ZYX"]
    assert (str(tile.warps), str(tile.min_blocks)) == (words["WARPS"], words["MIN_BLOCKS"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [("b1_7x7 --dry-run", "b1_7x7"), ("b1_7x7_h1_d8_k3 --dry-run --capability 1", "--capability")],
)
def test_mistakes_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        benchmark.main(["tiles", *arguments.split()])


@pytest.mark.slow  # compiles many kernels
@pytest.mark.parametrize("name", ["b1_13x20_h1_d16_k5", "b1_5x6x9_h1_d8_k3", "b1_70_h1_d8_k9"])
def test_all_tiles_compute_the_same(name):
    torch.manual_seed(0)
    case = ops.parse(name)
    q, k, v, grad = (torch.randn(1, *case.space, 1, case.head_dim).bfloat16() for _ in range(4))
    rpb = torch.randn(1, *(2 * axis.kernel_size - 1 for axis in case.axes))

    def run():
        out, lse = cuda.attention(q, k, v, rpb, case.axes, 1.0)
        return out, lse, *cuda.attention_backward(grad, None, q, k, v, rpb, out, lse, case.axes, 1.0)

    with emulated_gpu():
        expected = run()
    for kernel in KERNELS:
        for tile, _ in tiles.likely_tiles(case, kernel, find_gpu("9.0"), 6):
            with emulated_gpu(), tiles.using(kernel, tile):
                for x, y in zip(run(), expected, strict=True):
                    torch.testing.assert_close(x, y, atol=0.05, rtol=0.05, msg=lambda text: f"{kernel} {tile}: {text}")  # noqa: B023
