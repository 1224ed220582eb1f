"""What PyTorch's settings say of float32 matrix products, each in a process of its own: they do not mix."""

from __future__ import annotations

import subprocess
import sys
import unittest

_QUESTION = "import torch; {}; from natten.backends.cuda import may_round_float32; print(may_round_float32())"


class Float32Test(unittest.TestCase):
    def ask(self, setting: str) -> str:
        done = subprocess.run([sys.executable, "-c", _QUESTION.format(setting)], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.strip()

    def test_older_and_newer_settings(self):
        for setting, answer in (
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
                self.assertEqual(self.ask(setting), answer)


if __name__ == "__main__":
    unittest.main()
