"""Check that a printed command names an existing program, and that the program's own parser accepts it."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from test_tools.pages import ROOT

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The launchers start these scripts. Arguments before the number of processes stay in place.
_LAUNCHED = {"dist_train.sh": ("train.py", 1), "dist_test.sh": ("test.py", 2)}


class Parsed(BaseException):
    """Raised as soon as a program has parsed its arguments, so that it does nothing else."""


def check(text: str) -> None:
    """Raise AssertionError unless the command can be started as printed."""
    words = shlex.split(text)
    while re.match(r"\w+=", words[0]):  # environment variables
        words = words[1:]
    program, arguments = Path(words[0]).name, words[1:]
    if re.fullmatch(r"python3?", program):
        _check_python(arguments)
    elif program == "bash":
        _check_bash(arguments)
    elif program == "torchrun":
        from torch.distributed.run import parse_args

        args = parse_args(arguments)
        module = ["-m"] if args.module else []
        _check_python([*module, args.training_script, *args.training_script_args])
    elif program == "pip":
        _check_extras(re.findall(r"^\.\[(.*)\]$", "\n".join(arguments), re.MULTILINE))
    elif program.startswith("natzoo-"):
        module, _, function = _PROJECT["scripts"][program].partition(":")
        _parse(lambda: getattr(importlib.import_module(module), function)(), arguments)
    else:
        assert words[0] in (".", "apt", "tensorboard") or shutil.which(program), f"unknown program {program}"


def _check_python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
        return
    if arguments[0] == "-m":
        _, name, *rest = arguments
        if name in ("pytest", "unittest"):
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), rest
        elif name.startswith(("natten", "natzoo")):
            main = _main_of(name)
            if rest:  # without arguments it is only mentioned
                _parse(main, rest)
        return
    script, *rest = arguments
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if rest and "--help" not in rest:
        _parse(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"), rest, (ROOT / script).parent)


def _main_of(name: str):
    module = importlib.import_module(name)
    return module.main if hasattr(module, "main") else importlib.import_module(f"{name}.__main__").main


def _check_bash(arguments: list[str]) -> None:
    script = ROOT / arguments[0]
    assert script.is_file(), f"{arguments[0]} does not exist"
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.name in _LAUNCHED and arguments[1:]:
        launched, number = _LAUNCHED[script.name]
        before, after = arguments[1 : 1 + number], arguments[2 + number :]
        if script.parent.name == "classification":
            before = ["--config", *before]
        _check_python([str(script.parent.relative_to(ROOT) / launched), *before, *after])
    elif script.name == "setup.sh":
        _check_extras(arguments[1:])


def _check_extras(extras: list[str]) -> None:
    for extra in ",".join(extras).split(","):
        assert not extra or extra in _PROJECT["optional-dependencies"], f"no extra {extra}"


def _parse(start, arguments: list[str], folder: Path = ROOT) -> None:
    """Call `start` with the command line `arguments`, and stop it when they are parsed."""
    patches = mock.patch.object(sys, "argv", ["program", *arguments]), mock.patch.dict(os.environ)
    with patches[0], patches[1], mock.patch.object(sys, "path", [str(folder), *sys.path]), _stop_when_parsed():
        try:
            start()
        except Parsed:
            return
        except SystemExit as ended:
            assert not ended.code, "its options were rejected"
            return
    raise AssertionError("it does not parse its arguments")


@contextmanager
def _stop_when_parsed() -> Iterator[None]:
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        yield
