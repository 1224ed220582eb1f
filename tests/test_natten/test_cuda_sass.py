"""The machine code of the CUDA kernels, which NVRTC compiles and nvdisasm disassembles without a GPU."""

from __future__ import annotations

import unittest

import pytest
import sass
import torch
from emulation.launcher import SHARED_KIB

from natten.backends.cuda import nvrtc
from natten.backends.cuda.driver import Kernel
from test_natten.test_cuda_compile import OTHERS, TUNED, UNFUSED, has_nvrtc, kernels

PROBLEMS = TUNED | OTHERS
# Instructions of local memory, of memory whose kind the compiler does not know, and atomic additions by comparing.
SLOW = {"LDL", "STL", "LD", "ST", "ATOM", "ATOMS", "ATOMG", "RED"}


def skip_reason() -> str | None:
    """Return why machine code cannot be examined here, or None."""
    if not has_nvrtc():
        return "NVRTC is not installed; it comes with PyTorch for CUDA"
    return None if sass.find_nvdisasm() else "nvdisasm is not installed; it comes with CUDA and with Triton"


class SassTestCase(unittest.TestCase):
    def setUp(self):
        if reason := skip_reason():
            self.skipTest(reason)

    def check(self, kernel: Kernel, capability: tuple[int, int]) -> list[sass.Loop]:
        """Check what holds for all kernels. Return the loops."""
        self.assertLessEqual(kernel.shared_bytes, SHARED_KIB[capability] << 10)
        code, labels = sass.disassemble(sass.compile_kernel(kernel, capability), kernel.name)
        self.assertIn("EXIT", {instruction.opcode for instruction in code})
        slow = [instruction for instruction in code if instruction.opcode.split(".")[0] in SLOW]
        self.assertEqual(slow, [])
        return sass.find_loops(code, labels)

    def check_loops_of_products(self, loops: list[sass.Loop]) -> None:
        """Check the innermost loops with matrix instructions: they wait for no warp and not for global memory."""
        loops = [loop for loop in loops if sass.count(loop.code)["HMMA"]]
        depth = max(loop.depth for loop in loops)
        found = [sass.count(loop.code) for loop in loops if loop.depth == depth]
        for counts in found:
            self.assertEqual(counts["LDG"] + counts["LDGSTS"] + counts["BAR"] + counts["STG"], 0)


class StageTest(SassTestCase):
    def test_the_first_stage(self):
        for kernel in kernels(*TUNED["stage 1"], (9, 0))[:3]:
            with self.subTest(kernel.name):
                self.check_loops_of_products(self.check(kernel, (9, 0)))

    def test_unfused(self):
        for kernel in kernels(*TUNED["stage 1"], (9, 0), ops=UNFUSED):
            if "tiles" in kernel.name:
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

    def check_all(self, *names: str, **options) -> None:
        for capability in SHARED_KIB:
            if not nvrtc.architecture(capability).startswith("--gpu-architecture=sm_"):
                continue
            for name in names:
                for kernel in kernels(*PROBLEMS[name], capability, **options):
                    with self.subTest(name, capability=capability, kernel=kernel.name):
                        loops = self.check(kernel, capability)
                        if "tiles" in kernel.name:
                            self.check_loops_of_products(loops)

    def test_models(self):
        self.check_all("stage 1", "stage 2", "stage 3", "stage 4", "k 13")

    def test_three_axes(self):
        self.check_all("3-D")

    def test_unfused(self):
        self.check_all("stage 1", "stage 3", "k 13", "d 128", "1-D", "3-D", ops=UNFUSED)

    def test_float16_and_tf32(self):
        self.check_all("stage 1", dtype=torch.float16)
        self.check_all("stage 1", dtype=torch.float32, uses_tf32=True)


if __name__ == "__main__":
    unittest.main()
