"""Faults planted in the CUDA kernels, which the emulated tests must catch.

python tests/test_natten/test_cuda_faults.py [words]    # print what catches each fault, or those with a name like this
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import unittest
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from unittest import mock

import pytest
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
from emulation.launcher import EmulationError

from natten.backends import cuda
from natten.backends.cuda import nvrtc
from test_natten import test_cuda
from test_natten.guarded import GuardedProblem, has_read_beyond_tensors
from test_natten.test_cpu import fused, unfused
from test_natten.test_cuda import TF32_EPS, few_warps, problem, tile_limits


class Case(NamedTuple):
    """A problem that test_cuda.py or test_cuda_unfused.py has, too."""

    problem: test_cuda.Problem
    dtype: torch.dtype = torch.bfloat16
    eps: float | None = None
    gpu: Mapping[str, int] = MappingProxyType({})
    patches: Callable[[], tuple] = lambda: ()
    compute: Callable = fused


def _has_one_part() -> tuple:
    return (mock.patch.object(cuda._Planner, "_parts", lambda *arguments: 1),)


def _without_fragments() -> tuple:
    return (tile_limits(False, 1 << 16, False, 1 << 15),)


def _with_two_warps() -> tuple:
    return (few_warps(2),)


def _with_tf32() -> tuple:
    return (mock.patch.object(cuda, "allows_tf32", lambda: True),)


CASES: dict[str, Case | GuardedProblem] = {
    "tiles": Case(problem((9, 20), (4, 5), (1, 2), (2, 1), (False, True))),
    "map": Case(problem((20, 19), 5)),
    "window": Case(problem((7, 7), 7)),
    "rest": Case(problem((9, 20), 5, dim=24)),
    "no pieces": Case(problem((9, 11), 3, dim=20)),
    "stages": Case(problem((22, 35), 9, dim=64), gpu={"shared_bytes": 40 << 10, "processors": 1}),
    "parts": Case(problem((20, 19), 5, 1, 2), patches=_has_one_part),
    "tables": Case(problem((5, 6, 9), 3, dim=8), patches=_without_fragments),
    "tf32": Case(problem((9, 20), 5, dim=24), torch.float32, TF32_EPS, patches=_with_tf32),
    "plain": Case(problem((9, 20), (4, 5), (1, 2), (2, 1), (False, True), dim=24), torch.float32),
    "weights": Case(problem((20, 19), 5), compute=unfused),
    "units": Case(
        problem((40, 40), 3, 1, 1, (False, True), dim=8, heads=1),
        gpu={"processors": 1},
        patches=_with_two_warps,
        compute=unfused,
    ),
    "guarded": GuardedProblem((11, 21), 5, 2, dim=8),
    "causal": Case(problem((9, 20), (3, 5), 1, (1, 2), (False, True)), torch.float16, compute=unfused),
}


def _without_scale(found: re.Match) -> str:
    return found[0].replace("p.scale", "1.f")


class Fault(NamedTuple):
    """A change of the sources: all matches of a pattern in the first file that has any are replaced."""

    name: str
    case: str
    pattern: str
    replacement: str | Callable[[re.Match], str]
    file: str = "*"


_SYNC, _WARP = r"\n *__syncthreads\(\);", r"\n *__syncwarp\(\);"
FAULTS = (
    # Synchronization
    Fault("no barrier after the base addresses", "map", r"(find_bases\(p, tile, shared\);)" + _SYNC, r"\1"),
    Fault("no barrier before columns are read", "map", r"(\n  wait_copies<0>\(\);)" + _SYNC, r"\1"),
    Fault("no wait for copies", "map", r"\n  wait_copies<0>\(\);", ""),
    Fault("stages: no barrier before columns are read", "stages", r"(wait_copies<0>\(\);\n    })" + _SYNC, r"\1"),
    Fault("stages: no barrier before they are overwritten", "stages", _SYNC + r"(\n  }\n  if \(has_unit\))", r"\1"),
    Fault("stages: no wait for copies", "stages", r"\n *wait_copies<1>\(\);", ""),
    Fault("stages: a wait for earlier copies only", "stages", "wait_copies<1>", "wait_copies<2>"),
    Fault(
        "no barrier between tiles of a block", "parts", _SYNC + r"(\n  }\n  if \(slice)", r"\1", "grad_query_tiles.cu"
    ),
    Fault("results: no __syncwarp before reading", "map", _WARP + r"(\n  const int end_y = min\(tile)", r"\1"),
    Fault("diagonals: no __syncwarp before reading", "tables", _WARP + r"(\n#pragma.*\n    for \(int first)", r"\1"),
    Fault("diagonals: no __syncwarp after reading", "tables", _WARP + r"(\n  }\n\n private:\n  float \*table_)", r"\1"),
    Fault("sum of parts: no barrier", "map", r"(sums\[threadIdx.x\] = sum;)" + _SYNC, r"\1"),
    # Stages and tiles
    Fault("stages: the other buffer is read", "stages", r"row, shared \+ buffer", "row, shared + (buffer ^ 1)"),
    Fault("stages: the buffer in use is overwritten", "stages", r"\(buffer \^ 1\) \* BUFFER", "buffer * BUFFER"),
    Fault("stages: buffers do not alternate", "stages", r"buffer \^= 1", "buffer ^= 0"),
    Fault("stages: the last one is missing", "stages", r"first_row < (tile\.rows;)", r"first_row + STAGE_ROWS < \1"),
    Fault("the last tile of a part is missing", "parts", r"piece < end;", "piece < end - 1;", "grad_query_tiles.cu"),
    Fault("the last row of a unit's columns is missing", "map", r"(segment_span\.end - 1\}\)) \+ 1", r"\1"),
    Fault("columns: off by one", "map", r"at\[2\] - REACH", "at[2] - REACH + 1"),
    Fault("a unit's columns: the next 8", "map", r"first_x\) / 8 \* 8", "first_x) / 8 * 8 + 8"),
    Fault("columns: not swizzled", "map", r"place_of<PITCH>\(column, piece\)", "column * PITCH + piece", "tiles.h"),
    Fault("columns: the words of half a step", "rest", r"words \+ rest - 1", "words", "products.h"),
    Fault("results: not swizzled", "map", r"\[place_of<SLICE>\(row, piece\)\]", "[row * SLICE + piece]"),
    Fault("results: beyond head_dim", "no pieces", r"if \(element < SIZE\) (\*reinterpret)", r"\1", "tiles.h"),
    Fault("regular units: the last rows are missing", "map", r"(if constexpr \(ROW \+) CHUNK", r"\1 2 * CHUNK"),
    Fault("regular units: windows one row longer", "map", r"row_of_unit\(r\) < line", "row_of_unit(r) <= line"),
    Fault("statistics of the next query", "map", r"(statistics\((?:0, )?r\)(?:\[| \+ ))", r"\g<1>1 + "),
    # Windows, masks and bias
    Fault("windows: one key more", "plain", r"start\(s, n\) \+ K;", "start(s, n) + K + 1;"),
    Fault("windows: not shifted at the end", "plain", r", 0\), n - K\)", ", 0), n - 1)"),
    Fault("bias: no mask of columns", "map", r" && columns\.holds\(x \+ column\)", ""),
    Fault("bias: no mask of rows", "map", r"chunk\.is_seen\(r, \w+\) \? fragment", "true ? fragment"),
    Fault("bias: rows in the wrong direction", "map", r"row - SIGN \* (\w+) : 0", r"row + SIGN * \1 : 0"),
    Fault("bias: the second matrix has that of the row before", "map", r"chunk\.row_of_unit\(r\) % 2, r", "0, r"),
    Fault("bias: columns in the wrong direction", "map", r"row\[SIGN \* column\]", "row[column]"),
    Fault("bias: not divided by the scale", "map", r"(row\[SIGN \* column\]) \* factor", r"\1"),
    Fault("plain: the bias of the next key", "plain", r"bias\[x\]", "bias[x + 1]", "attention.cu"),
    # Arithmetic
    Fault("softmax: the maximum of half a row", "map", r"\n *(\w+) = max\(\1, __shfl_xor_sync\(~0u, \1, 2\)\);", ""),
    Fault("softmax: the sum of half a row", "map", r"\n *total\S+ \+= __shfl_xor_sync\(~0u, total\S+, 2\);", ""),
    Fault("softmax: the base is never raised", "map", r"__any_sync\(~0u, exceeds\)", "false"),
    Fault("logsumexp: in base 2", "map", r"(log2_fast\(total\[\w+\]\)\)) \* LN_2", r"\1"),
    Fault("TF32: operands are not rounded", "tf32", r"\n *round_operand\(\w+\);", ""),
    Fault("gradients of queries: no scale", "map", r"= p\.scale;|{p\.scale.*?}", _without_scale, "grad_query_tiles.cu"),
    Fault("delta: the gradient of logsumexp is added", "map", r"(delta\[\w+\]) -= \*grad_lse", r"\1 += *grad_lse"),
    Fault("gradients of keys: no delta", "map", r"-query\[i\]\.y|delta\.x", "0.f", "grad_key_value_tiles.cu"),
    Fault("gradient of the bias: the next row", "map", r"(line, row - 1|sum, row - line), corner", r"\1 + 1, corner"),
    Fault("gradient of the bias: the last rows are missing", "window", r"gradient\.flush\(\)", ""),
    Fault("gradient of the bias: the next diagonal", "tables", r"diagonal \+ 1 \+ token", "diagonal + token"),
    # Unfused attention
    Fault("weights: no __syncwarp before writing", "weights", _WARP + r"(\n    slots\.write)", r"\1"),
    Fault("several units: no __syncwarp after filling", "units", r"(fill\(outside\(\)\);)" + _WARP, r"\1"),
    Fault("several units: no wait for weights", "units", r"\n    wait_copies<0>\(\);(\n    __syncwarp)", r"\1"),
    Fault("weights: slots before the map are not set", "causal", r"\n    slots\.fill\(outside\(\)\);", ""),
    Fault("weights: the ends of lines are not written", "weights", r"if \(!has_ends\) return", "return"),
    Fault(
        "weights: the last slot of a token is not written",
        "causal",
        r"slots\[line\]\[WINDOW - 1\] = from",
        "(void)from",
    ),
    Fault("weights: the last one is not copied", "weights", r"min\(bytes, 16\)", "min(bytes - 2, 16)", "slots.h"),
    Fault("weights: those of absent tokens are copied", "guarded", r"first < end && ", "", "slots.h"),
    Fault("weights: of the next column", "weights", r"\bmax\(slot \+ 1, 0\)", "max(slot, 0)", "gather_tiles.cu"),
    Fault("weights: outside the window", "weights", r"takes_high \? 0x5400u : 0x3200u", "0x5400u"),
    Fault("scatter: weights for too few keys", "weights", r"start, WINDOWS\[axis\]\)", "start - 1, WINDOWS[axis])"),
    Fault("scatter: rows at the wrong distance", "weights", r"\+ low\) & 15", ") & 15", "scatter_tiles.cu"),
)


def plant(fault: Fault, folder: Path) -> None:
    """Copy the sources to a folder, with the fault.

    Raises:
        LookupError: if the pattern has no match.
    """
    shutil.copytree(nvrtc.SOURCES, folder)
    for path in sorted(folder.glob(fault.file)):
        replaced, number = re.subn(fault.pattern, fault.replacement, path.read_text())
        if number:
            path.write_text(replaced)
            return
    raise LookupError(f"{fault.name}: the pattern has no match")


def caught_by(fault: Fault | None, case: Case | GuardedProblem) -> str | None:
    """Run a case with a fault, or without. Return what catches it, or None.

    Raises:
        AssertionError: with the compiler's message, if the fault does not compile.
    """
    test = test_cuda.EmulatedTestCase()
    test.setUp()
    with tempfile.TemporaryDirectory() as parent, ExitStack() as stack:
        if fault is not None:
            plant(fault, Path(parent, "cuda"))
            stack.enter_context(mock.patch.object(nvrtc, "SOURCES", Path(parent, "cuda")))
        if isinstance(case, GuardedProblem):
            return "a read beyond a tensor" if has_read_beyond_tensors([case], nvrtc.SOURCES) else None
        for patch in case.patches():
            stack.enter_context(patch)
        try:
            test.check(case.problem, case.dtype, case.compute, case.eps, **case.gpu)
        except EmulationError as error:
            return re.sub(r"^block \d+, thread \d+: ", "", str(error).split(" (Kernel")[0])
        except AssertionError as error:
            if "result" not in str(error):  # the fault does not compile
                raise
            return "results differ"
    return None


@pytest.mark.slow
class FaultsTest(unittest.TestCase):
    def test_each_fault_is_caught(self):
        for fault in FAULTS:
            with self.subTest(fault.name):
                self.assertIsNotNone(caught_by(fault, CASES[fault.case]))

    def test_a_missing_barrier_is_caught_whatever_the_order_of_threads(self):
        fault = next(fault for fault in FAULTS if fault.name == "stages: no barrier before they are overwritten")
        case = CASES[fault.case]
        assert isinstance(case, Case)
        for seed in range(5):
            found = caught_by(fault, case._replace(problem=case.problem._replace(seed=seed)))
            self.assertIsNotNone(found, seed)

    def test_without_faults_nothing_is_caught(self):
        for name, case in CASES.items():
            with self.subTest(name):
                self.assertIsNone(caught_by(None, case))


def main() -> None:
    print("| fault | problem | caught by |\n|---|---|---|")
    for fault in FAULTS:
        if all(word in fault.name for word in sys.argv[1:]):
            print(f"| {fault.name} | {fault.case} | {caught_by(fault, CASES[fault.case])} |", flush=True)


if __name__ == "__main__":
    main()
