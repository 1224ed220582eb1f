"""Names of files and classes that are not UTF-8, or that a terminal would interpret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from natzoo.classification import train

PREDICT = str(Path(__file__).parents[2] / "classification" / "predict.py")
NAMES = [
    b"caf\xe9",
    b"\x1b[31mred",
    b"a\nb",
    "\u202egnp".encode(),
    b"\xff\xfe",
    "\u6c34".encode(),
    b"$x_$",
    b"-c",
    b" ",
]


@pytest.fixture
def odd_names(data):
    """Classes and images with names that are not UTF-8, or that a terminal would interpret."""
    for split in ("train", "val"):
        for number, name in enumerate(NAMES):
            folder = os.fsencode(data / split) + b"/" + name
            os.mkdir(folder)
            image = folder + b"/" + NAMES[-number] + b".png"
            with open(image, "wb") as file:
                file.write((data / "val" / "blue" / "0.png").read_bytes())
    return data


@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8:strict", "latin-1:strict"])
def test_names_that_a_terminal_cannot_print(odd_names, tiny, run_folder, tmp_path, encoding):
    train.main(tiny(epochs=1))
    images = [str(odd_names / "val"), "--checkpoint", str(run_folder / "best.pth")]
    words = [*images, "--json", str(tmp_path / "a.json"), "--grid", str(tmp_path / "a.png"), "--topk", "12"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    (odd_names / "val" / os.fsdecode(NAMES[0]) / "\x1bbad.png").write_bytes(b"x")
    done = subprocess.run([sys.executable, PREDICT, *words], capture_output=True, env=environment)
    assert done.returncode == 2  # for the damaged image
    for output in (done.stdout, done.stderr):
        assert not {b"\x1b", b"\xff", "\u202e".encode()} & set(output.splitlines()) and b"\x1b" not in output
    assert len(done.stdout.splitlines()) == 27 + len(NAMES)
    assert b"Traceback" not in done.stderr and b"\\x1bbad.png" in done.stderr
    paths = [os.fsencode(path) for path in json.loads((tmp_path / "a.json").read_text())]
    assert len(paths) == 27 + len(NAMES) and all(os.path.exists(path) for path in paths)
    assert (tmp_path / "a.png").exists()


def test_errors_escape_what_a_terminal_would_interpret(tmp_path):
    name = str(tmp_path / "\x1b[31m\u202e")
    for words in ([name], ["x", "--device", "\x1b[2J"], ["x", "--\x1b[31m"], ["x", "--topk", "\x1b[2J"]):
        done = subprocess.run([sys.executable, PREDICT, *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and "\x1b" not in done.stderr and "\u202e" not in done.stderr
