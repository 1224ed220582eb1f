"""Which program a printed command calls with what, and that its own parser takes it."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from test_tools.pages import ROOT

_FOLDERS = ("assets", "classification", "configs", "detection", "natten", "natzoo", "segmentation", "tests", "tools")
# What a command names of these must be there, patterns of the shell included.
_NAMED = ("classification/", "configs/", "detection/", "segmentation/", "tests/", "tools/")
# Stands for a program: notes how it was called, and does nothing.
_NOTE = '#!/bin/sh\n{ printf "%s\\0" "${0##*/}" "$@"; printf "\\n"; } >> "$CALLS"\n'
_CALLED = ("python", "python3", "torchrun", "pip", "apt")
# What these take is not for a parser of Python: they are read by bash alone, and run by the tests named in rules.py.
SCRIPTS = ("setup", "quickstart", "test", "build_wheel", "gpu_check")


class Parsed(Exception):
    """Raised in place of all that comes after a program has read its command line."""


def checkout_of_links(folder: Path) -> Path:
    """A checkout whose folders are links to this one's, and a PATH with made-up programs."""
    for name in _FOLDERS:
        (folder / name).symlink_to(ROOT / name)
    programs = folder / ".programs"
    programs.mkdir()
    for name in _CALLED:
        (programs / name).write_text(_NOTE)
    (programs / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (programs / "scontrol").write_text("#!/bin/sh\necho node0\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "pip").symlink_to(programs / "pip")
    (folder / ".venv" / "bin" / "activate").write_text("")
    return folder


def calls(text: str, checkout: Path) -> list[list[str]]:
    """What a command calls, as bash reads it: each program's name and arguments.

    The shell scripts that start processes are run, down to the program that they would start.
    """
    log = checkout / "calls"
    log.write_bytes(b"")
    path = f"{checkout / '.programs'}:{os.environ['PATH']}"
    environment = {**os.environ, "CALLS": str(log), "PATH": path, "PYTHON": "python", "SLURM_JOB_NODELIST": "node[0-3]"}
    environment |= {"SLURM_NNODES": "4", "SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "64"}
    words = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return [line.split("\0")[:-1] for line in log.read_text().split("\n") if line]


def check(text: str, checkout: Path) -> None:
    """Fails unless the program that a command calls takes its command line, and the files of the checkout that it
    names are there."""
    first, *rest = shlex.split(text.split("\n")[0])
    if first == "bash" and Path(rest[0]).stem in SCRIPTS and Path(rest[0]).parent.name == "tools":
        _check_script(Path(rest[0]), rest[1:])
        return
    if first == ".":
        return
    called = calls(text, checkout)
    called = [call for call in called if call[1:2] != ["-c"]]  # where the launcher asks for the version of torchrun
    assert called, f"{text} calls nothing"
    for program, *words in called:
        for word in words:
            is_readers = Path(word).name == "mine.py"  # which the page has them write
            assert is_readers or not word.startswith(_NAMED) or (ROOT / word).exists(), word
        _check_call(program, words)


def _check_call(program: str, words: list[str]) -> None:
    if program == "apt":
        assert words == ["install", "g++"]
    elif program == "pip":
        _check_pip(words)
    elif program == "torchrun" or words[:2] == ["-m", "torch.distributed.run"]:
        from torch.distributed.run import parse_args

        args = parse_args(words if program == "torchrun" else words[2:])
        _check_call("python", [args.training_script, *args.training_script_args])
    elif words[:2] == ["-m", "pytest"] or words[:2] == ["-m", "unittest"]:
        assert any((ROOT / word).exists() for word in words[2:])
    elif words[:2] == ["-m", "venv"]:
        assert len(words) == 3
    elif words[0].startswith("tests/") or (len(words) == 1 and not words[0].startswith("tools/plot")):
        assert (ROOT / words[0]).is_file()  # a program that is mentioned, or a test
    else:
        with pytest.raises((Parsed, SystemExit)) as ended, _only_parsed():
            call(words)
        assert ended.type is Parsed or ended.value.code == 0, words


def call(words: list[str]) -> None:
    """Calls the main function of a program, as `python WORDS` does."""
    name, *arguments = words[1:] if words[0] == "-m" else words
    if words[0] != "-m":
        path = ROOT / name
        is_package = (path.parent / "__init__.py").exists()
        name = f"{path.parent.name}.{path.stem}" if is_package else path.stem
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")
    with mock.patch.object(sys, "argv", [name, *arguments]):
        module.main()


@contextmanager
def _only_parsed() -> Iterator[None]:
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        yield


_PIP = """
import sys
from pip._internal.commands import create_command
print(*create_command("install").parse_args(sys.argv[1:])[1])
"""


def _check_pip(words: list[str]) -> None:
    """By pip's own parser, in a process of its own: pip changes how modules are found; extras must be the project's."""
    assert words[0] == "install"
    done = subprocess.run([sys.executable, "-c", _PIP, *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for package in done.stdout.split():
        if package.startswith("."):
            _check_extras(package[1:].strip("[]").split(","))


def _check_extras(extras: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) - {""} <= known.keys(), extras


def _check_script(script: Path, words: list[str]) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    if script.stem == "setup":
        _check_extras(words)
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word).exists(), word
