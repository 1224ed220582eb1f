"""Bank conflicts of the CUDA kernels in shared memory, counted by the emulation."""

from __future__ import annotations

import unittest

import pytest
from emulation import wavefronts
from emulation.launcher import Access


class BankConflictsTest(unittest.TestCase):
    def check(self, *problem, **options) -> list[Access]:
        """Check that no access of a kernel with matrix instructions has bank conflicts, but where they are cheap."""
        accesses = [a for a in wavefronts.count(*problem, **options) if "tiles" in a.kernel]
        self.assertTrue(accesses)
        for access in accesses:
            print(access)
        return accesses

    def test_a_stage(self):
        self.check((14, 14), 1, 32, 7, 1)

    @pytest.mark.slow
    def test_head_dims(self):
        for dim in (8, 16, 24, 40, 48, 56, 64, 72, 88, 96, 120, 128):
            with self.subTest(dim=dim):
                self.check((14, 14), 1, dim, 7, 1)


if __name__ == "__main__":
    unittest.main()
