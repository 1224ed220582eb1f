"""Several processes: what one process with accumulation computes, one voice, signals, and killed ones started again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from classification import train
from natzoo.checkpoints import read_checkpoint

SCRIPT = Path(train.__file__).with_name("dist_train.sh")


@pytest.fixture
def config(data, tmp_path):
    """A recipe of a run of seconds."""
    options = {
        **{"model": "nat_mini", "img_size": 16, "crop_pct": 1.0, "device": "cpu", "threads": 1, "workers": 1},
        "model_kwargs": {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "kernel_size": 3},
        **{"epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 0, "lr": 1e-3, "batch_size": 4, "log_interval": 1},
        **{"aa": "none", "scale": [0.5, 1.0], "mixup": 0.8, "output": str(tmp_path / "output"), "drop_path": 0.1},
    }
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.fixture
def launch(config, data):
    """Starts a run of several processes; returns the launcher, whose output is merged."""
    started = []

    def start(count, *more, **environment):
        words = ["bash", str(SCRIPT), str(count), str(config), str(data), *map(str, more)]
        env = {**os.environ, "PYTHON": sys.executable, **environment}
        process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def losses(folder):
    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def assert_same_run(one, other):
    one, other = read_checkpoint(one / "last.pth"), read_checkpoint(other / "last.pth")
    for part in ("model", "optimizer"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert (one["epoch"], one["update"], one["best"]) == (other["epoch"], other["update"], other["best"])


def test_two_processes_compute_what_one_computes_with_accumulation(launch, config, data, tmp_path):
    run = launch(2, "--experiment", "two", "--epochs", "3")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert output.count("72 images of 3 classes") == 1  # one process speaks
    assert "nodes 1 x processes 2 x batch 4 x accumulation 1 = 8 images an update" in output
    assert "\r" not in output  # no progress bar in a pipe
    train.main([str(data), "-c", str(config), "--experiment", "one", "--epochs", "3", "--grad-accum", "2"])
    two, one = losses(tmp_path / "output" / "two"), losses(tmp_path / "output" / "one")
    assert len(two) == 27
    for step in range(20):
        assert two[step] == pytest.approx(one[step], abs=1e-6)
    scores = [read_checkpoint(tmp_path / "output" / name / "last.pth")["best"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1])


def test_a_signal_saves_and_the_run_goes_on_with_one_process(launch, config, data, tmp_path):
    """Within an epoch, with loading processes that the signal reaches too."""
    folder = tmp_path / "output" / "stopped"
    run = launch(2, "--experiment", "stopped", "--epochs", "300")
    wait_for(lambda: run.poll() is not None or list(folder.glob("tensorboard/*")))
    time.sleep(1)
    run.send_signal(signal.SIGUSR1)
    output, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert output.count("stopped by SIGUSR1 after") == 1, output
    state = read_checkpoint(folder / "last.pth")
    assert state["processes"] == 2
    done = state["epoch"] * 9 + state["update"]
    assert done > 0
    train.main(
        [str(data), "-c", str(config), "--experiment", "stopped", "--resume", "--epochs", str(state["epoch"] + 1)]
    )
    assert read_checkpoint(folder / "last.pth")["options"]["grad_accum"] == 2
    assert sorted(losses(folder)) == list(range(9 * (state["epoch"] + 1)))


def test_processes_with_other_kernels_are_told(launch, tmp_path):
    """The second process is made to use another backend than the first."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$LOCAL_RANK" = 1 ] && export NATTEN_BACKEND=reference\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    run = launch(2, PYTHON_EXEC=str(python), NATTEN_BACKEND="cpu")
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "has the attention backend reference, but rank 0 on" in output
    assert output.count("error: ") == 1, output  # what both find, one says
    assert 'train.py", line' not in output


@pytest.mark.slow
def test_twenty_processes_killed_at_random_make_no_difference(launch, tmp_path):
    """Three in four while they train or save, the rest while they start."""
    epochs, kills = 100, 20
    more = ("--epochs", epochs, "--save-interval", 2, "--keep-last", 2, "--model-ema")
    unbroken = launch(2, "--experiment", "unbroken", *more)
    assert unbroken.wait(timeout=600) == 0
    run = launch(2, "--experiment", "killed", *more, MAX_RESTARTS=str(kills + 5))
    chance, past, progress = random.Random(20), set(), []
    last = tmp_path / "output" / "killed" / "last.pth"

    def is_started_again():
        return run.poll() is not None or (len(children(run.pid)) == 2 and not past & set(children(run.pid)))

    for _ in range(kills):
        wait_for(is_started_again)
        assert run.poll() is None, "the run ended before all kills: make it longer"
        past |= set(children(run.pid))
        before = last.stat().st_mtime_ns if last.exists() else 0
        if chance.random() < 0.75:
            wait_for(lambda before=before: last.exists() and last.stat().st_mtime_ns != before)
            time.sleep(chance.uniform(0, 1.5))
        else:
            time.sleep(chance.uniform(0, 8))
        victim = chance.choice(children(run.pid))
        os.kill(victim, signal.SIGKILL)
        if last.exists():
            state = read_checkpoint(last)
            progress.append(state["epoch"] * 9 + state["update"])
    assert run.wait(timeout=600) == 0
    print("updates done at each kill:", progress)
    assert progress[-1] < epochs * 9
    assert_same_run(tmp_path / "output" / "unbroken", tmp_path / "output" / "killed")
