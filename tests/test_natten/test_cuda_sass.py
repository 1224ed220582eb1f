"""The machine code of the CUDA kernels, which NVRTC compiles and nvdisasm disassembles without a GPU."""

from __future__ import annotations

import unittest

import sass

from natten.backends.cuda.driver import Kernel
from test_natten.test_cuda_compile import TUNED, has_nvrtc, kernels


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
        code, labels = sass.disassemble(sass.compile_kernel(kernel, capability), kernel.name)
        self.assertIn("EXIT", {instruction.opcode for instruction in code})
        slow = [i for i in code if i.opcode.split(".")[0] in ("LDL", "STL", "LD", "ST", "ATOM")]
        self.assertEqual(slow, [], "local memory, or addresses of an unknown kind")
        return sass.find_loops(code, labels)


class StageTest(SassTestCase):
    def test_loop_over_chunks(self):
        """The products of one chunk: each operand is loaded once, and nothing comes from global memory."""
        forward, grad_query, grad_key_value, _ = kernels(*TUNED["stage 1"], (9, 0))
        for kernel in (forward, grad_query, grad_key_value):
            with self.subTest(kernel.name):
                (loop,) = (loop for loop in self.check(kernel, (9, 0)) if sass.count(loop.code)["HMMA"])
                counts = sass.count(loop.code)
                self.assertEqual(counts["HMMA"], 2 * counts["LDSM"])
                self.assertEqual(counts["LDG"] + counts["BAR"], 0)


if __name__ == "__main__":
    unittest.main()
