"""The commands in a Python that lacks what Windows lacks: train, resume, evaluate and classify."""

import os
import subprocess
import sys
from pathlib import Path

import as_on_windows
import pytest

from natzoo.checkpoints import read_checkpoint
from natzoo.classification import train, validate
from natzoo.classification.data import loader

ROOT = Path(__file__).parents[2]
HOLD = "import sys; from pathlib import Path; from natzoo.runs import lock_folder\n"
HOLD += "with lock_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Windows is imitated on Linux")


def start(code, *words):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, as_on_windows.__file__, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NATTEN_BACKEND": "reference"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(name, *words):
    """Run a console command, and return its status and what it prints."""
    process = start(f"import natzoo_commands; natzoo_commands.{name}()", *words)
    output, errors = process.communicate(timeout=600)
    return process.returncode, output + errors


def test_the_commands_can_be_imported():
    names = ("train", "validate", "predict", "probe")
    modules = (*(f"natzoo.classification.{name}" for name in names), "natzoo.launch")
    process = start("\n".join(f"import {module}" for module in modules))
    assert process.communicate(timeout=600)[1] == ""
    assert process.returncode == 0


@pytest.mark.slow
def test_train_resume_and_a_second_run(tiny, run_folder):
    status, text = command("train", *tiny(epochs=1))
    assert status == 0, text
    assert sorted(path.name for path in run_folder.glob(".*")) == []
    assert read_checkpoint(run_folder / "last.pth")["epoch"] == 1
    with start(HOLD, str(run_folder)) as holder:
        assert holder.stdout.readline() == "held\n"
        status, text = command("train", *tiny("--resume", epochs=2))
        assert (status, "used by another run (process" in text) == (2, True), text
        holder.stdin.close()
    assert not (run_folder / ".lock").exists()
    status, text = command("train", *tiny("--resume", epochs=2))
    assert status == 0, text
    assert read_checkpoint(run_folder / "last.pth")["epoch"] == 2


@pytest.mark.slow
def test_validate_and_predict(tiny, run_folder, data):
    train.main(tiny(epochs=1))
    weights = ("--checkpoint", str(run_folder / "best.pth"))
    status, text = command("validate", str(data), *weights, "--workers", "0")
    assert (status, "27 images" in text) == (0, True), text
    status, text = command("predict", str(data / "val" / "blue" / "0.png"), *weights)
    assert (status, "0.png: " in text) == (0, True), text


@pytest.mark.slow
def test_workers_that_are_not_forked(tiny, run_folder, data, monkeypatch):
    """As on Windows and macOS, where everything that a worker gets is pickled."""

    def kwargs(workers, pin_memory, real=loader._worker_kwargs):
        return {**real(workers, pin_memory), "multiprocessing_context": "spawn" if workers else None}

    monkeypatch.setattr(loader, "_worker_kwargs", kwargs)
    train.main(tiny("--workers", "1", epochs=1))
    found = validate.main([str(data), "--checkpoint", str(run_folder / "best.pth"), "--workers", "1"])
    assert found["count"] == 27
