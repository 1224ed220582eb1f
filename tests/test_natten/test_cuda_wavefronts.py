"""Bank conflicts of the CUDA kernels in shared memory, counted by the emulation."""

from __future__ import annotations

import unittest

import pytest
from emulation import wavefronts

# Runs once per block that sums a gradient of the bias, and reads diagonals.
ONCE = "sum_diagonals"


class BankConflictsTest(unittest.TestCase):
    def check(self, *problem, **options) -> None:
        """Check each kernel with matrix instructions."""
        accesses = [a for a in wavefronts.count(*problem, **options) if "tiles" in a.kernel and ONCE not in a.function]
        self.assertEqual(len({access.kernel for access in accesses}), 3)
        for access in accesses:
            limit = access.fewest if access.kind in ("matrix", "copy") else 2 * access.fewest
            self.assertLessEqual(access.wavefronts, limit, access)
        for kernel in {access.kernel for access in accesses}:
            found = [access for access in accesses if access.kernel == kernel]
            ratio = sum(access.wavefronts for access in found) / sum(access.fewest for access in found)
            self.assertLess(ratio, 1.1, kernel)

    def test_a_stage(self):
        self.check((14, 14), 1, 32, 7, 1)

    @pytest.mark.slow
    def test_head_dims(self):
        for dim in (8, 16, 40, 64, 72, 128):
            with self.subTest(dim=dim):
                self.check((14, 14), 1, dim, 7, 1)

    @pytest.mark.slow
    def test_tf32(self):
        for dim in (32, 64):
            with self.subTest(dim=dim):
                self.check((14, 14), 1, dim, 7, 1, uses_tf32=True)

    @pytest.mark.slow
    def test_other_ranks(self):
        self.check((200,), 1, 32, 13, 1)
        self.check((4, 9, 16), 1, 32, 3, 1)

    def test_unfused(self):
        """Weights that are read and written 2 bytes at a time have the fewest conflicts away from borders."""
        accesses = wavefronts.count((14, 14), 1, 32, 7, 1, unfused=True)
        accesses = [a for a in accesses if "tiles" in a.kernel and ONCE not in a.function]
        self.assertEqual(len({access.kernel for access in accesses}), 3)
        for kernel in {access.kernel for access in accesses}:
            found = [access for access in accesses if access.kernel == kernel]
            ratio = sum(access.wavefronts for access in found) / sum(access.fewest for access in found)
            self.assertLess(ratio, 1.25, kernel)


if __name__ == "__main__":
    unittest.main()
