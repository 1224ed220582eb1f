"""The unmodified Nat and Dinat of transformers 4.53 on this operator."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import unittest
import venv
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
GOLDENS = TESTS / "goldens" / "hf.json"
RELEASE = "transformers==4.53.*"
UNREACHABLE = "connection ?error|connection broken|temporary failure|timed out|SSLError|ProxyError"


def make_environment(folder: Path) -> Path:
    """Create an environment with the old release and the packages of this environment; return its Python.

    The old release takes precedence.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    (packages / "borrowed.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--retries", "1", RELEASE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and (reason := re.search(f".*(?:{UNREACHABLE}).*", done.stderr, re.IGNORECASE)):
        raise unittest.SkipTest(f"package index unreachable: {reason[0]}")
    if done.returncode:
        raise AssertionError(f"{RELEASE} could not be installed:\n{done.stdout}{done.stderr}")
    return python


@pytest.mark.slow
class OldTransformersTest(unittest.TestCase):
    """Results of the models, against goldens of transformers 4.53.3 with the original operator."""

    @classmethod
    def setUpClass(cls):
        cls.goldens = json.loads(GOLDENS.read_text())
        with tempfile.TemporaryDirectory() as folder:
            python = make_environment(Path(folder))
            environment = {**os.environ, "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1"}
            command = [python, Path(__file__).with_name("old_transformers.py"), GOLDENS]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(done.stderr)
        cls.found = json.loads(done.stdout)

    def test_release(self):
        self.assertRegex(self.found["release"], r"^4\.53\.")
        self.assertEqual(set(self.found), {"release", "nat", "dinat"})

    def test_values(self):
        for model in ("nat", "dinat"):
            golden, found = self.goldens[f"{model}-128x128"], self.found[model]
            for name in ("logits", "hidden_norms", "attention_norms"):
                with self.subTest(model, name=name):
                    expected = torch.tensor(golden[name])
                    torch.testing.assert_close(torch.tensor(found[name]), expected, atol=1e-5, rtol=1e-5)

    def test_shapes(self):
        for model in ("nat", "dinat"):
            golden, found = self.goldens[f"{model}-128x128"], self.found[model]
            for name in ("hidden_states", "reshaped_hidden_states", "attentions"):
                with self.subTest(model, name=name):
                    self.assertEqual(found[name], golden[name])
            for name in ("state_dict", "backbone-state_dict"):
                with self.subTest(model, name=name):
                    self.assertEqual(found[name], self.goldens[f"{model}-{name}"])
