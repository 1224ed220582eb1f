"""tools/gpu_check.py where there is no GPU: every part is rehearsed on the CPU, so that none fails by a slip."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
class RehearsalTest(unittest.TestCase):
    def rehearse(self, part: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder, "rows.txt")
            rows.touch()
            command = [
                sys.executable,
                "tools/gpu_check.py",
                part,
                "--rehearse",
                "--seconds",
                "200",
                "--rows",
                str(rows),
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr[-3000:])
            self.assertNotIn("FAILED", rows.read_text())
            return rows.read_text()

    def test_correctness(self):
        rows = self.rehearse("correctness")
        for what in ("goldens", "same from run to run", "bf16 soak", "random problems"):
            self.assertIn(f"correctness | {what}", rows)

    def test_sanitizer(self):
        self.rehearse("sanitizer")

    def test_operators(self):
        rows = self.rehearse("operators")
        self.assertRegex(rows, r"operator \| .* backward \| \d+ us")
        self.assertRegex(rows, r"flex_attention \| .* \d+ us")

    def test_layers(self):
        self.assertRegex(self.rehearse("layers"), r"shifted \| .* x natten's time")

    def test_models(self):
        self.assertEqual(self.rehearse("models").count("model | "), 4)

    def test_without_a_gpu_it_says_so(self):
        command = [sys.executable, "tools/gpu_check.py", "operators"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
        self.assertEqual(done.returncode, 2)
        self.assertIn("no CUDA device", done.stderr)


if __name__ == "__main__":
    unittest.main()
