"""tools/setup.sh: which interpreters it accepts, and that every failure ends in one line that names the cause."""

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
    """Return a function that writes a command, puts it first on the PATH and returns its path."""

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


def error_of(done):
    """The error message: the last line of stderr, with status 2."""
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def fake_python(commands, name, version):
    """Write an interpreter that knows its version and nothing else."""
    return commands(
        name,
        f"""
[ "$1" = --version ] && echo Python {version}.0 && exit
[ "$1" = -c ] && exec {sys.executable} -c "import sys; sys.version_info = ({version.replace(".", ", ")}, 0); $2"
exit 1""",
    )


@pytest.mark.parametrize("version", ["3.8", "3.10", "3.15"])
def test_unsupported_python(tmp_path, commands, version):
    python = fake_python(commands, "other-python", version)
    error = error_of(setup(tmp_path, PYTHON=str(python)))
    assert str(python) in error
    assert version in error
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_supported_python_is_found(tmp_path, commands, version):
    """Under its own name, where python3 is too old. It then fails to create the environment."""
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
        fake_python(commands, name, version if name == f"python{version}" else "3.9")
    done = setup(tmp_path, PYTHON="")
    assert f"Python {version}" in done.stdout
    assert f"python{version}" in error_of(done)


def test_full_disk(tmp_path, commands):
    commands("df", "printf 'Filesystem 1M-blocks Used Available\\n/dev/x 9000 8800 200\\n'")
    error = error_of(setup(tmp_path))
    assert " 200 MB" in error
    assert str(tmp_path / "venv") in error


def test_failed_download(tmp_path, commands):
    commands("df", "printf 'Filesystem 1M-blocks Used Available\\n/dev/x 90000 0 90000\\n'")
    no_server = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    error = error_of(setup(tmp_path, PIP_CONFIG_FILE="/dev/null", PIP_RETRIES="0", **no_server))
    assert "download" in error
    assert "network" in error


def test_environment_of_an_unsupported_python(tmp_path, commands):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    fake_python(commands, "python", "3.10").rename(python)
    error = error_of(setup(tmp_path))
    assert str(tmp_path / "venv") in error
    assert "3.10" in error


def test_second_run_installs_nothing(tmp_path):
    """A run that was interrupted before pip was installed is completed."""
    venv.create(tmp_path / "venv", with_pip=False)
    content = b"".join((SETUP.parents[1] / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    text = f"{SETUP.parents[1]}\n".encode() + content
    number = subprocess.run(["cksum"], input=text, capture_output=True).stdout.split()[0].decode()
    (tmp_path / "venv" / f"installed-train-{number}").touch()
    done = setup(tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "venv" / "install.log").exists()
    assert (tmp_path / "venv" / "bin" / "pip3").exists()


def test_checks_refuse_test_files_that_do_not_exist():
    script = SETUP.with_name("test.sh")
    done = subprocess.run(["bash", str(script), "-x", "tests/nowhere.py::test"], capture_output=True, text=True)
    assert "tests/nowhere.py" in error_of(done)
