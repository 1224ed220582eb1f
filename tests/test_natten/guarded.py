"""Tensors next to memory that nobody may read. A read beyond a tensor ends the process."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from emulation.launcher import emulated_gpu
from torch import Tensor

from natten import backends
from natten.backends.cuda import nvrtc
from natten.checks import make_axes

_libc, _page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
_areas: list[mmap.mmap] = []  # live as long as the process


def guarded(shape: tuple[int, ...], at_end: bool) -> Tensor:
    """Return a random bfloat16 tensor that ends directly before an unreadable page, or begins directly after one."""
    size = 2 * torch.Size(shape).numel()
    area = mmap.mmap(-1, -(-size // _page) * _page + 2 * _page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    end = start + len(area)
    for edge in (start, end - _page):
        if _libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(_page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    first = end - _page - size if at_end else start + _page
    x = torch.frombuffer((ctypes.c_char * size).from_address(first), dtype=torch.bfloat16).view(shape)
    _areas.append(area)
    return x.copy_(torch.randn(shape))


class GuardedProblem(NamedTuple):
    """A problem in bfloat16 without a bias, for the kernels of fused or unfused attention, run by tests/emulation."""

    space: tuple[int, ...]
    kernel_size: int
    dilation: int = 1
    dim: int = 32
    is_fused: bool = False
    shared_kib: int = 60


def run(problem: GuardedProblem, at_end: bool) -> None:
    """Run all kernels of a problem with guarded tensors."""
    space, dim = problem.space, problem.dim
    axes = make_axes(space, problem.kernel_size, 1, problem.dilation)
    with emulated_gpu(shared_bytes=problem.shared_kib << 10):
        if problem.is_fused:
            q, k, v, grad = (guarded((1, *space, 2, dim), at_end) for _ in range(4))
            module = backends.choose(q, "cuda")
            out, lse = module.attention(q, k, v, None, axes, 1.0)
            module.attention_backward(grad, None, q, k, v, None, out, lse, axes, 1.0)
        else:
            q, k, grad = (guarded((1, 2, *space, dim), at_end) for _ in range(3))
            weights, sent = (guarded((1, 2, *space, problem.kernel_size ** len(space)), at_end) for _ in range(2))
            module = backends.choose(q, "cuda")
            module.query_key(q, k, None, axes)
            module.query_key_backward(sent, q, k, None, axes)
            module.weight_value(weights, k, axes)
            module.weight_value_backward(grad, weights, k, axes)


def has_read_beyond_tensors(problems: Iterable[GuardedProblem], sources: Path = nvrtc.SOURCES) -> bool:
    """Run problems in another process, with guarded tensors. Return whether a kernel reads beyond a tensor.

    Args:
        sources: the folder of the kernels.

    Raises:
        AssertionError: with the end of the process's errors, if it fails for another reason.
    """
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "test_natten.guarded", str(sources), json.dumps(list(problems))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode not in (0, -signal.SIGSEGV):
        raise AssertionError(done.stderr[-2000:])
    return done.returncode != 0


def main() -> None:
    with mock.patch.object(nvrtc, "SOURCES", Path(sys.argv[1])):
        for fields in json.loads(sys.argv[2]):
            for at_end in (True, False):
                run(GuardedProblem(*fields), at_end)


if __name__ == "__main__":
    main()
