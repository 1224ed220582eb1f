"""Count the wavefronts of shared memory that the CUDA kernels take, without a GPU.

    python tests/emulation/wavefronts.py "stage 1"          # bfloat16, with a bias, forward and backward
    python tests/emulation/wavefronts.py "d 24" --kernel attention_tiles --capability 8.0 --tf32

The problems are those of tests/test_natten/test_cuda_compile.py, with one image. The tiles are those of a large batch.
All numbers are per unit of 16 tokens. `fewest` are the wavefronts without bank conflicts. nvcc may merge or move the
accesses of the source: sass.py shows what it makes of them. In a test:

    with emulated_gpu(counts=True) as emulator:
        ...
    print(table(emulator.accesses, units))
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch

from emulation.launcher import Access, emulated_gpu
from natten import backends
from natten.backends import cuda
from natten.checks import make_axes


def count(
    space, heads, dim, kernel_size, dilation, *, capability=(9, 0), uses_tf32=False, has_rpb=True, unfused=False
) -> list[Access]:
    """Run a forward and a backward pass on one image, fused or unfused, and return the accesses to shared memory."""
    axes = make_axes(space, kernel_size, 1, dilation)
    dtype = torch.float32 if uses_tf32 else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, *space, heads, dim, generator=generator).to(dtype)
    rpb = torch.zeros(heads, *(2 * axis.kernel_size - 1 for axis in axes)) if has_rpb else None
    with (
        mock.patch.object(cuda, "allows_tf32", lambda: uses_tf32),
        emulated_gpu(capability, processors=1, counts=True) as emulator,
    ):
        module = backends.choose(q, "cuda")
        if unfused:
            q, k, v, grad = (x.movedim(-2, 1).contiguous() for x in (q, k, v, grad))
            attn = module.query_key(q, k, rpb, axes)
            module.query_key_backward(attn, q, k, rpb, axes)
            module.weight_value(attn, v, axes)
            module.weight_value_backward(grad, attn, v, axes)
            return emulator.accesses
        out, lse = module.attention(q, k, v, rpb, axes, dim**-0.5)
        module.attention_backward(grad, None, q, k, v, rpb, out, lse, axes, dim**-0.5)
    return emulator.accesses


def table(accesses: Sequence[Access], units: float) -> str:
    """Return a table of the accesses of each kernel, by place and with their sums.

    Args:
        units: the number of units that all the kernels process; the numbers in the table are per unit.
    """
    lines = []
    for kernel in dict.fromkeys(access.kernel for access in accesses):
        lines += ["", f"{kernel:53s} bytes  instructions  wavefronts    fewest"]
        found = sorted((a for a in accesses if a.kernel == kernel), key=lambda access: -access.wavefronts)
        for a in found:
            numbers = "".join(f"{n / units:12.1f}" for n in (a.instructions, a.wavefronts, a.fewest))
            lines.append(f"{a.kind:7s} {a.place:27s} {a.function.split(' < ')[0]:17.17s} {a.bytes:5d}{numbers}")
        sums = "".join(f"{sum(a[i] for a in found) / units:12.1f}" for i in (5, 6, 7))
        lines.append(f"{'all':58s}{sums}")
    return "\n".join(lines)


def main() -> None:
    from test_natten.test_cuda_compile import OTHERS, TUNED

    problems = TUNED | OTHERS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=problems)
    parser.add_argument("--capability", default="9.0", help="compute capability; default: 9.0")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--tf32", action="store_true", help="float32 with TF32 instead of bfloat16")
    parser.add_argument("--no-bias", action="store_true", help="without a bias")
    parser.add_argument("--unfused", action="store_true", help="the unfused operators and their gradients")
    args = parser.parse_args()
    capability = tuple(map(int, args.capability.split(".")))
    problem = problems[args.problem]
    options = {"uses_tf32": args.tf32, "has_rpb": not args.no_bias, "unfused": args.unfused}
    accesses = count(*problem, capability=capability, **options)
    print(table([a for a in accesses if args.kernel in a.kernel], prod(problem[0]) * problem[1] / 16))


if __name__ == "__main__":
    main()
