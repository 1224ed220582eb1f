"""Several processes: what one process with accumulation computes, one voice, signals, and killed ones started again."""

import contextlib
import fcntl
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from natzoo.checkpoints import read_checkpoint
from natzoo.classification import train
from natzoo.classification.distributed import init_world
from natzoo.classification.signals import SignalHandler

SCRIPT = Path(__file__).parents[2] / "classification" / "dist_train.sh"


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

    def start(count, *more, output=subprocess.PIPE, **environment):
        words = ["bash", str(SCRIPT), str(config), str(count), str(data), *map(str, more)]
        env = {**os.environ, "PYTHON": sys.executable, **environment}
        process = subprocess.Popen(words, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)
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


@pytest.fixture
def terminal():
    """A terminal to write to, and what was written."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    written = []

    def read():
        with contextlib.suppress(OSError):  # closed
            while content := os.read(master, 65536):
                written.append(content)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def text():
        os.close(slave)
        reader.join(timeout=60)
        return b"".join(written).decode()

    yield slave, text
    os.close(master)


def test_a_signal_saves_and_the_run_goes_on_with_one_process(launch, config, data, tmp_path, terminal):
    """Within an epoch, with loading processes that the signal reaches too; in a terminal, where one process speaks."""
    folder = tmp_path / "output" / "stopped"
    run = launch(2, "--experiment", "stopped", "--epochs", "300", output=terminal[0])
    wait_for(lambda: run.poll() is not None or list(folder.glob("tensorboard/*")))
    time.sleep(1)
    run.send_signal(signal.SIGUSR1)
    run.wait(timeout=60)
    output = terminal[1]()
    assert run.returncode == 128 + signal.SIGUSR1
    assert output.count("stopped by SIGUSR1 after") == 1, output
    assert "Traceback" not in output
    assert len(re.findall(r"\repoch 1/300: +0%\|.*\| 0/2700 ", output)) == 1  # one bar begins
    assert re.search(r"\repoch 1/300: .*\| [1-9]\d*/2700 .*update.*, loss=\d\.\d+, lr=", output)
    assert max(map(len, re.findall(r"epoch 1/300: [^\r\n\]]*\]", output))) <= 120  # none is wrapped
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
    assert run.returncode == 2
    assert "Traceback" not in output
    assert "has the attention backend reference, but rank 0 on" in output
    assert output.count("error: ") == 1, output  # what both find, one says
    assert 'train.py", line' not in output


def test_the_launcher_takes_options_for_data_and_says_what_an_older_torchrun_lacks(config, tmp_path):
    torch_folder = tmp_path / "torch"
    (torch_folder / "distributed").mkdir(parents=True)
    (torch_folder / "distributed" / "run.py").write_text("")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {torch_folder} || echo "$@"\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "MAX_RESTARTS": "2"}
    words = ["bash", str(SCRIPT), "8", str(config), "--synthetic", "1000"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.stdout.endswith(
        f"--max-restarts 2 {SCRIPT} --synthetic 1000 --resume --config {config}\n".replace("dist_train.sh", "train.py")
    )
    assert done.stderr.count("note: ") == 1
    assert "PET_SHUTDOWN_TIMEOUT" in done.stderr
    for wrong in (words[:3], [*words[:2], *words[3:], "more"]):
        usage = subprocess.run(wrong, env=env, capture_output=True, text=True)
        assert (usage.returncode, usage.stderr.startswith("Train on several GPUs")) == (2, True)
    assert subprocess.run([*words[:2], "--help"], env=env, capture_output=True).returncode == 0
    env["PYTHON"] = "/nowhere"
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("error: /nowhere has no PyTorch")) == (2, True)


@pytest.mark.parametrize("is_stopped", [True, False])
def test_the_slurm_script_queues_a_job_again_whose_time_was_over(tmp_path, is_stopped):
    readme = SCRIPT.with_name("README.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", readme, re.DOTALL)
    until_stopped = 'trap "echo saved; exit 1" USR1; echo begun; sleep 5 & wait'
    for name, body in {
        "srun": f'test "$SRUN_CPUS_PER_TASK" = 64; {until_stopped if is_stopped else "echo begun"}',
        "scontrol": 'echo "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash -e\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[0-3]"}
    env["SLURM_CPUS_PER_TASK"] = "64"
    words = ["bash", "-c", script]
    job = subprocess.Popen(words, env={**env, "SLURM_JOB_ID": "17"}, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "begun\n"
    if is_stopped:
        job.send_signal(signal.SIGUSR1)
    assert job.communicate(timeout=30)[0] == ("saved\nrequeue 17\n" if is_stopped else "")


def test_all_processes_on_one_gpu_are_refused(monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    with (
        pytest.raises(ValueError, match="--device cuda:1 puts all processes on one GPU"),
        init_world("cuda:1", SignalHandler()),
    ):
        pass


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
