"""Bank conflicts of the CUDA kernels in shared memory, counted by the emulation."""

from __future__ import annotations

import unittest

import pytest
from emulation import wavefronts

# Runs once per block that sums a gradient of the bias, and reads diagonals.
ONCE = "sum_diagonals"


class BankConflictsTest(unittest.TestCase):
    def check(self, *problem, has_unequal_slices: bool = False, **options) -> None:
        """Check that no kernel with matrix instructions has conflicts.

        Args:
            has_unequal_slices: whether blocks compute different numbers of results. Then some lanes skip stores. The
                emulation matches the n-th accesses of lanes, and finds conflicts that there are not.
        """
        accesses = [a for a in wavefronts.count(*problem, **options) if "tiles" in a.kernel and ONCE not in a.function]
        self.assertEqual(len({access.kernel for access in accesses}), 3)
        for access in accesses:
            is_matched = not (has_unequal_slices and access.function.startswith("store_unit"))
            self.assertLessEqual(access.wavefronts, access.fewest if is_matched else 2 * access.fewest, access)

    def test_a_stage(self):
        self.check((14, 14), 1, 32, 7, 1)

    @pytest.mark.slow
    def test_head_dims(self):
        """Multiples of 8 that differ in the pitch of columns, of results, and in the rest after pieces by four."""
        for dim in (8, 16, 24, 40, 48, 56, 64, 72, 80, 88, 96, 112, 120, 128):
            with self.subTest(dim=dim):
                self.check((9, 14), 1, dim, 5, 1, has_unequal_slices=dim == 88)

    @pytest.mark.slow
    def test_tf32(self):
        for dim in (8, 16, 24, 32, 40, 64):
            with self.subTest(dim=dim):
                self.check((9, 14), 1, dim, 5, 1, uses_tf32=True)

    @pytest.mark.slow
    def test_other_ranks(self):
        self.check((200,), 1, 32, 13, 1)
        self.check((4, 9, 16), 1, 32, 3, 1)

    def test_unfused(self):
        accesses = wavefronts.count((14, 14), 1, 32, 7, 1, unfused=True)
        # Lanes skip stores of logits outside their windows, so the emulation cannot tell which of them belong together.
        is_counted = [not (a.kind == "store" and a.bytes == 2) and ONCE not in a.function for a in accesses]
        accesses = [a for a, counts in zip(accesses, is_counted, strict=True) if counts and "tiles" in a.kernel]
        self.assertEqual(len({access.kernel for access in accesses}), 3)
        for kernel in {access.kernel for access in accesses}:
            found = [access for access in accesses if access.kernel == kernel]
            ratio = sum(access.wavefronts for access in found) / sum(access.fewest for access in found)
            self.assertLess(ratio, 1.1, kernel)


if __name__ == "__main__":
    unittest.main()
