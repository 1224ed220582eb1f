"""The machine code of the CUDA kernels, which NVRTC compiles and nvdisasm disassembles without a GPU."""

from __future__ import annotations

import unittest

import pytest
import sass
import torch
from emulation.launcher import SHARED_KIB

from natten.backends import cuda
from natten.backends.cuda import nvrtc
from natten.backends.cuda.driver import Kernel
from test_natten.test_cuda_compile import FUSED, OTHERS, TUNED, UNFUSED, has_nvrtc, kernels

PROBLEMS = TUNED | OTHERS
# Instructions of local memory, of memory whose kind the compiler does not know, and atomic additions by comparing.
SPILLED = {"LDL", "STL"}
SLOW = SPILLED | {"LD", "ST", "ATOM", "ATOMS", "ATOMG", "RED"}
NUMBER_OF_TILED = {FUSED: 3, UNFUSED: 6}  # kernels with matrix instructions, of all ops


def skip_reason() -> str | None:
    """Return why machine code cannot be examined here, or None."""
    if not has_nvrtc():
        return "NVRTC is not installed; it comes with PyTorch for CUDA"
    return None if sass.find_nvdisasm() else "nvdisasm is not installed; it comes with CUDA and with Triton"


def instructions_per_chunk(kernel: Kernel) -> dict[str, int]:
    """Return how many instructions of some kinds a warp needs for a chunk of columns, by natten/csrc/cuda/products.h.

    Only for tiles with fragments of the bias and of its gradient, and without slices.
    """
    given = dict(text.split("=") for text in kernel.definitions)
    matrices, rows, columns = (int(given[n]) for n in ("MATRICES", "CHUNK_ROWS", "UNIT_COLUMNS"))
    dim = -(-max(int(given["HEAD_DIM"]), int(given["VALUE_DIM"])) // 8) * 8  # in shared memory
    is_tf32, name = given["ELEMENT"] == "3", kernel.name.removeprefix("natten_").removesuffix("_tiles")
    blocks, results, pieces = rows * columns // 8, dim // 8, dim // (4 if is_tf32 else 8)
    # Products with sums over head_dim, and over columns; statistics per query.
    kinds = {"attention": (1, 1, 0), "grad_query": (2, 1, 0), "grad_key_value": (2, 2, 2)}
    over_dim, over_columns, statistics = kinds[name]
    counts = {"HMMA": over_dim * matrices * blocks * -(-pieces // 2), "LDSM": 0}
    counts["LDS"] = (2 * matrices + statistics) * blocks  # with the bias of each line
    if pieces % 4 == 0 or pieces == 2:
        counts["LDS"] += over_dim * blocks * -(-pieces // 4)
    else:
        counts["LDSM"] += over_dim * blocks * (pieces // 4 + pieces % 4 // 2 + pieces % 2)
    if is_tf32:
        counts["HMMA"] += over_columns * matrices * blocks * results
        counts["LDS"] += over_columns * 2 * blocks * results
    else:
        counts["HMMA"] += over_columns * matrices * -(-blocks // 2) * results
        counts["LDSM"] += over_columns * -(-blocks // 2) * -(-results // 2)
    if name == "grad_query":  # a row of the gradient of the bias per line
        counts["LDS"] += 2 * matrices * rows * -(-columns // 16)
    return counts


class SassTestCase(unittest.TestCase):
    def setUp(self):
        if reason := skip_reason():
            self.skipTest(reason)

    def check(self, kernel: Kernel, capability: tuple[int, int], may_spill: bool = False) -> list[sass.Loop]:
        """Check what holds for all kernels. Return the loops.

        Args:
            may_spill: whether a few registers may be in local memory, outside the loop over chunks.
        """
        self.assertLessEqual(kernel.shared_bytes, SHARED_KIB[capability] << 10)
        code, labels = sass.disassemble(sass.compile_kernel(kernel, capability), kernel.name)
        self.assertIn("EXIT", {instruction.opcode for instruction in code})
        found = [instruction for instruction in code if instruction.opcode.split(".")[0] in SLOW]
        spilled = [instruction for instruction in found if instruction.opcode.split(".")[0] in SPILLED]
        self.assertEqual([instruction for instruction in found if instruction not in spilled], [])
        self.assertLessEqual(len(spilled), 32 if may_spill else 0)
        return sass.find_loops(code, labels)

    def check_loops_of_products(self, loops: list[sass.Loop]) -> None:
        """Check the innermost loops with matrix instructions: they wait for no warp and not for global memory."""
        loops = [loop for loop in loops if sass.count(loop.code)["HMMA"]]
        depth = max(loop.depth for loop in loops)
        found = [sass.count(loop.code) for loop in loops if loop.depth == depth]
        for counts in found:
            self.assertEqual(counts["LDG"] + counts["LDGSTS"] + counts["BAR"] + counts["STG"], 0)

    def check_counts(self, kernel: Kernel, loops: list[sass.Loop]) -> None:
        """Check how many instructions load operands and multiply matrices, in the loop over chunks."""
        self.assertTrue({"HAS_BIAS_FRAGMENTS=1", "SLICES=1"} <= set(kernel.definitions))
        loop = max((loop for loop in loops if sass.count(loop.code)["HMMA"]), key=lambda loop: loop.depth)
        found = sass.count(loop.code)
        expected = instructions_per_chunk(kernel)
        if "grad_query" in kernel.name and "HAS_GRADIENT_FRAGMENTS=0" in kernel.definitions:
            del expected["LDS"]
        self.assertEqual({name: found[name] for name in expected}, expected)
        self.assertEqual((found["LDL"], found["STL"], found["LDG"]), (0, 0, 0))


class StageTest(SassTestCase):
    def test_the_first_stage(self):
        for kernel in kernels(*TUNED["stage 1"], (9, 0))[:3]:
            with self.subTest(kernel.name):
                loops = self.check(kernel, (9, 0))
                self.check_loops_of_products(loops)
                self.check_counts(kernel, loops)

    def test_unfused(self):
        found = [kernel for kernel in kernels(*TUNED["stage 1"], (9, 0), ops=UNFUSED) if "tiles" in kernel.name]
        self.assertEqual(len(found), NUMBER_OF_TILED[UNFUSED])
        for kernel in found:
            with self.subTest(kernel.definitions):
                self.check_loops_of_products(self.check(kernel, (9, 0)))

    def test_loops_are_found(self):
        """A hand-written kernel: a loop in a loop, and a block outside that returns into the inner loop."""
        lines = (
            ("", "MOV", "R0, RZ"),
            ("", "LDS", "R1, [R2]"),  # 1: outer loop
            ("", "HMMA.16816.F32", "R4, R4, R8, R12"),  # 2: inner loop
            ("@P2", "BRA", "`(.L_far)"),
            ("", "MUFU.EX2", "R3, R3"),  # 4
            ("@P0", "BRA", "`(.L_inner)"),
            ("@!P1", "BRA", "`(.L_outer)"),
            ("", "EXIT", ""),
            ("", "SHFL.BFLY", "PT, R1, R1, 0x1, 0x1f"),  # 8
            ("", "BRA", "`(.L_back)"),
            ("", "BRA", "`(.L_end)"),  # 10: the trap at the end of each kernel
        )
        code = [sass.Instruction(16 * i, *line) for i, line in enumerate(lines)]
        labels = {".L_outer": 16, ".L_inner": 32, ".L_far": 128, ".L_back": 64, ".L_end": 160}
        loops = [(loop.head, loop.depth, len(loop.code)) for loop in sass.find_loops(code, labels)]
        self.assertEqual(loops, [(16, 0, 2), (32, 1, 6)])


@pytest.mark.slow
class EveryGpuTest(SassTestCase):
    """Kernels for each GPU, with the tiles that its shared memory allows."""

    def check_all(self, *names: str, ops: tuple[str, ...] = FUSED, **options) -> None:
        for capability in SHARED_KIB:
            if not nvrtc.architecture(capability).startswith("--gpu-architecture=sm_"):
                continue
            for name in names:
                found = kernels(*PROBLEMS[name], capability, ops=ops, **options)
                number = NUMBER_OF_TILED[ops] if capability >= cuda.MATRIX_CAPABILITY else 0
                if number and (name, ops, SHARED_KIB[capability]) == ("1-D", UNFUSED, 99):
                    number = 2  # for sums over queries, the weights of 2047 keys do not fit, so backward is plain
                self.assertEqual(sum("tiles" in kernel.name for kernel in found), number, (name, capability))
                for kernel in found:
                    with self.subTest(name, capability=capability, kernel=kernel.name):
                        loops = self.check(kernel, capability)
                        if "tiles" in kernel.name:
                            self.check_loops_of_products(loops)

    def test_models(self):
        self.check_all("stage 1", "stage 2", "stage 3", "stage 4", "k 13")

    def test_counts_of_head_dims(self):
        """Head_dims whose columns are loaded differently, values with another head_dim, and TF32."""
        for dim in (13, 16, 20, 24, 40, 48, 64):
            self.check_dims(dim)
        self.check_dims(32, value_dim=20)
        for dim in (24, 32):
            self.check_dims(dim, dtype=torch.float32, uses_tf32=True)

    def check_dims(self, dim: int, **options) -> None:
        for kernel in kernels((56, 56), 2, dim, 7, 1, (9, 0), **options)[:3]:
            with self.subTest(dim=dim, kernel=kernel.name, **options):
                may_spill = dim in (40, 48) and "grad_query" in kernel.name
                self.check_counts(kernel, self.check(kernel, (9, 0), may_spill))

    def test_three_axes(self):
        self.check_all("3-D")

    def test_unfused(self):
        self.check_all("stage 1", "stage 3", "k 13", "d 128", "1-D", "3-D", ops=UNFUSED)

    def test_float16_and_tf32(self):
        self.check_all("stage 1", dtype=torch.float16)
        self.check_all("stage 1", dtype=torch.float32, uses_tf32=True)


if __name__ == "__main__":
    unittest.main()
