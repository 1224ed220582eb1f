"""The Python code for Windows, in a Python that lacks what Windows lacks. The kernels: see test_portable.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import as_on_windows
import pytest

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Windows is imitated on Linux")


def run(*words, **environment):
    paths = [str(TESTS), str(TESTS.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CXX": "", **environment}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=900)


def test_builder_and_cache():
    done = run("-m", "test_natten.windows_cases")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Ran 11 tests", done.stderr, re.MULTILINE)


@pytest.mark.slow
def test_report(tmp_path):
    """The kernels themselves, with their own threads, compiled into the profile."""
    done = run(as_on_windows.__file__, "natten.check", NATTEN_CACHE_DIR="", LOCALAPPDATA=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = (tmp_path / "natten").glob("*.dll")
    assert f"CPU kernels   {library}, compiled by" in done.stdout
    assert re.search(r"^threads +\d+ by the kernels themselves$", done.stdout, re.MULTILINE)
    assert re.search(r"^cpu check +passed", done.stdout, re.MULTILINE)
    assert "cpu check     failed" not in done.stdout
