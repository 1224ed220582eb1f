"""PyTorch's settings for float32 matrix products, each in its own process because they interact."""

from __future__ import annotations

import subprocess
import sys
import unittest

_CODE = "import torch; {}; from natten.backends.cuda import allows_tf32; print(allows_tf32())"


class Float32Test(unittest.TestCase):
    def allows_tf32(self, setting: str) -> str:
        done = subprocess.run([sys.executable, "-c", _CODE.format(setting)], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.strip()

    def test_old_and_new_settings(self):
        for setting, expected in (
            ("pass", "False"),
            ("torch.set_float32_matmul_precision('high')", "True"),
            ("torch.set_float32_matmul_precision('medium')", "True"),
            ("torch.set_float32_matmul_precision('highest')", "False"),
            ("torch.backends.cuda.matmul.allow_tf32 = True", "True"),
            ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "True"),
            ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "False"),
            ("torch.backends.fp32_precision = 'tf32'", "True"),
        ):
            with self.subTest(setting):
                self.assertEqual(self.allows_tf32(setting), expected)


if __name__ == "__main__":
    unittest.main()
