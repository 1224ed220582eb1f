"""tools/setup.sh says in one line what is wrong."""

import os
import stat
import subprocess
import sys
import venv
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "tools" / "setup.sh"


@pytest.fixture
def commands(tmp_path):
    """Puts a made-up command at the head of the PATH; returns its path."""

    def make(name, script):
        path = tmp_path / "commands" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


def setup(tmp_path, **environment):
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'commands'}:{os.environ['PATH']}",
        "VENV": str(tmp_path / "venv"),
        "PYTHON": sys.executable,
        **environment,
    }
    return subprocess.run(["bash", str(SETUP)], env=environment, capture_output=True, text=True)


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


def test_python_too_old(tmp_path, commands):
    old = commands("old-python", '[ "$1" = --version ] && echo Python 3.8.10; exit 1')
    done = setup(tmp_path, PYTHON=str(old))
    assert done.returncode == 2
    assert last_line(done).startswith("error: Python 3.11 or newer is needed, but")
    assert "Python 3.8.10" in last_line(done)
    assert not (tmp_path / "venv").exists()


def test_disk_full(tmp_path, commands):
    commands("df", "printf 'Filesystem 1M-blocks Used Available\\n/dev/x 9000 8800 200\\n'")
    done = setup(tmp_path)
    assert done.returncode == 2
    assert last_line(done).startswith("error: the disk has 200 MB free, but PyTorch needs about 9000")


def test_failed_download(tmp_path, commands):
    commands("df", "printf 'Filesystem 1M-blocks Used Available\\n/dev/x 90000 0 90000\\n'")
    nothing_listens = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    done = setup(tmp_path, PIP_CONFIG_FILE="/dev/null", PIP_RETRIES="0", **nothing_listens)
    assert done.returncode == 2
    assert last_line(done).startswith("error: a download failed")
    assert last_line(done).endswith("check the network and run this again.")


def test_an_environment_of_an_old_python(tmp_path, commands):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    commands("python", '[ "$1" = --version ] && echo Python 3.10.2; exit 1').rename(python)
    done = setup(tmp_path)
    assert done.returncode == 2
    assert "venv has Python 3.10.2, but Python 3.11 or newer is needed: remove" in last_line(done)


def test_a_second_run_installs_nothing(tmp_path):
    """And a run that broke off before pip was there is gone on with."""
    venv.create(tmp_path / "venv", with_pip=False)
    content = b"".join((SETUP.parents[1] / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    text = f"{SETUP.parents[1]}\n".encode() + content
    number = subprocess.run(["cksum"], input=text, capture_output=True).stdout.split()[0].decode()
    (tmp_path / "venv" / f"installed-train-{number}").touch()
    done = setup(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is up to date (train)" in done.stdout
    assert (tmp_path / "venv" / "bin" / "pip3").exists()
