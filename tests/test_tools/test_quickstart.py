"""tools/quickstart.sh, as a new user runs it."""

import os
import re
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quickstart(tmp_path):
    """In a clone, with a new environment that uses the packages installed in this one."""
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    venv.create(copy / ".venv", with_pip=True)
    (site_packages,) = (copy / ".venv" / "lib").glob("python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "VENV"}
    script = ["bash", "tools/quickstart.sh"]
    done = subprocess.run(script, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    top1 = dict(re.findall(r"^(nat|dinat)\s+top-1 ([\d.]+)%", done.stdout, re.MULTILINE))
    assert float(top1["nat"]) >= 97
    assert float(top1["dinat"]) >= 97
    for name in ("curves.png", "nat/best.pth", "nat/summary.csv", "nat/attention.png", "dinat/tensorboard"):
        assert (copy / "output" / "quickstart" / name).exists(), name
