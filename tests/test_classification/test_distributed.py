"""Runs of several processes: same result as one process, output, signals, and restarts of killed processes."""

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
from natzoo.classification import distributed, train
from natzoo.classification.distributed import init_world
from natzoo.classification.signals import SignalHandler

SCRIPT = Path(__file__).parents[2] / "classification" / "dist_train.sh"


@pytest.fixture
def config(data, tmp_path):
    """A recipe of a run that takes seconds."""
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
    """A function that starts a run of several processes and returns the launcher, with its output merged."""
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
    """Return the logged training loss by update."""
    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def assert_same_run(one, other):
    one, other = read_checkpoint(one / "last.pth"), read_checkpoint(other / "last.pth")
    for part in ("model", "optimizer"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert (one["epoch"], one["update"], one["best"]) == (other["epoch"], other["update"], other["best"])


def test_two_processes_equal_one_with_accumulation(launch, config, data, tmp_path):
    run = launch(2, "--experiment", "two", "--epochs", "3")
    output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output
    assert output.count("Epoch 3/3") == 1  # only the main process prints
    assert "8 images per update" in output
    assert "\r" not in output  # no progress bar in a pipe
    train.main([str(data), "-c", str(config), "--experiment", "one", "--epochs", "3", "--grad-accum", "2"])
    two, one = losses(tmp_path / "output" / "two"), losses(tmp_path / "output" / "one")
    assert len(two) == 27
    for step in range(20):
        assert two[step] == pytest.approx(one[step], abs=1e-6)
    scores = [read_checkpoint(tmp_path / "output" / name / "last.pth")["best"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1])


@pytest.mark.slow
def test_sharded_processes_equal_replicated_ones(launch, config, data, tmp_path):
    """FSDP2 and DDP, with accumulation and an uneven validation set; one process resumes the sharded run."""
    more = ("--epochs", 2, "--grad-accum", 2, "--val-batch-size", 13)
    for name, option in (("ddp", ()), ("fsdp", ("--fsdp",))):
        run = launch(2, "--experiment", name, *more, *option)
        output, _ = run.communicate(timeout=900)
        assert run.returncode == 0, output
    folders = [tmp_path / "output" / name for name in ("ddp", "fsdp")]
    expected, found = map(losses, folders)
    assert len(found) == len(expected) == 8
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-5
    states = [read_checkpoint(folder / "last.pth") for folder in folders]
    assert states[0]["best"] == states[1]["best"]
    for part in ("model", "optimizer"):
        torch.testing.assert_close(states[1][part], states[0][part], rtol=0, atol=1e-4)
    run = launch(2, "--experiment", "fsdp", *more, "--fsdp", "--resume", "--epochs", 3)
    output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output
    train.main([str(data), "-c", str(config), "--experiment", "ddp", "--resume", "--epochs", "3"])
    for step in range(8, 12):
        assert losses(folders[1])[step] == pytest.approx(losses(folders[0])[step], abs=1e-5)


class Terminal:
    """A pseudo-terminal of 120 columns whose output is read by a thread."""

    def __init__(self):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
        self.written = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # closed
            while content := os.read(self.master, 65536):
                self.written.append(content)

    def text(self):
        return b"".join(self.written).decode(errors="replace")

    def close(self):
        """Return the whole output after the process has ended."""
        os.close(self.slave)
        self.reader.join(timeout=600)
        return self.text()


@pytest.fixture
def terminal():
    """A pseudo-terminal for the output of a process."""
    made = Terminal()
    yield made
    os.close(made.master)


def test_signal_saves_and_one_process_resumes_the_run(launch, config, data, tmp_path, terminal):
    """In a terminal, within an epoch, with data-loading workers that receive the signal too."""
    folder = tmp_path / "output" / "stopped"
    run = launch(2, "--experiment", "stopped", "--epochs", "300", output=terminal.slave)
    wait_for(lambda: run.poll() is not None or "loss=" in terminal.text())
    run.send_signal(signal.SIGUSR1)
    run.wait(timeout=600)
    output = terminal.close()
    assert run.returncode == 128 + signal.SIGUSR1
    assert output.count("Stopped by SIGUSR1") == 1, output
    assert "Traceback" not in output
    assert len(re.findall(r"\rEpoch 1/300: +0%\|.*\| 0/2700 ", output)) == 1  # one bar starts
    assert re.search(r"\rEpoch 1/300: .*\| [1-9]\d*/2700 .*update.*, loss=\d\.\d+, lr=", output)
    assert max(map(len, re.findall(r"Epoch 1/300: [^\r\n\]]*\]", output))) <= 120  # no line is wrapped
    state = read_checkpoint(folder / "last.pth")
    assert state["processes"] == 2
    done = state["epoch"] * 9 + state["update"]
    assert done > 0
    train.main(
        [str(data), "-c", str(config), "--experiment", "stopped", "--resume", "--epochs", str(state["epoch"] + 1)]
    )
    assert read_checkpoint(folder / "last.pth")["options"]["grad_accum"] == 2
    assert sorted(losses(folder)) == list(range(9 * (state["epoch"] + 1)))


def test_processes_with_different_kernels_are_refused(launch, tmp_path):
    """The second process uses another attention backend than the first."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$LOCAL_RANK" = 1 ] && export NATTEN_BACKEND=reference\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    run = launch(2, PYTHON_EXEC=str(python), NATTEN_BACKEND="cpu")
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 2
    assert "Traceback" not in output
    assert re.search("error: attention backend .*reference on rank 1", output)
    assert output.count("error: ") == 1, output  # only the main process prints it
    assert 'train.py", line' not in output


def test_launcher_command_lines(config, tmp_path):
    """CONFIG GPUS and the former order GPUS CONFIG, an older torchrun, usage errors, and no PyTorch."""
    torch_folder = tmp_path / "torch"
    (torch_folder / "distributed").mkdir(parents=True)
    (torch_folder / "distributed" / "run.py").write_text("")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {torch_folder} || echo "$@"\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "MAX_RESTARTS": "2"}
    words = ["bash", str(SCRIPT), str(config), "8", "--synthetic", "1000"]
    for order in (words, [*words[:2], "8", str(config), *words[4:]]):
        done = subprocess.run(order, env=env, capture_output=True, text=True)
        options = f"--synthetic 1000 --resume --config {config}\n"
        assert done.stdout.endswith(f"--nproc-per-node 8 --max-restarts 2 {SCRIPT.with_name('train.py')} {options}")
    assert done.stderr.count("note: ") == 1
    assert "PET_SHUTDOWN_TIMEOUT" in done.stderr
    for wrong in (words[:3], [*words[:3], *words[4:]]):
        usage = subprocess.run(wrong, env=env, capture_output=True, text=True)
        assert (usage.returncode, "CONFIG GPUS" in usage.stderr) == (2, True)
    assert subprocess.run([*words[:2], "--help"], env=env, capture_output=True).returncode == 0
    env["PYTHON"] = "/nowhere"
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("error: /nowhere ")) == (2, True)


@pytest.mark.parametrize("is_stopped", [True, False])
def test_slurm_script_requeues_a_job_out_of_time(tmp_path, is_stopped):
    readme = SCRIPT.with_name("README.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", readme, re.DOTALL)
    until_stopped = 'trap "echo saved; kill \\$!; exit 1" USR1; echo begun; sleep 600 & wait'
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
    assert job.communicate(timeout=300)[0] == ("saved\nrequeue 17\n" if is_stopped else "")


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    with (
        pytest.raises(ValueError, match="--device cuda:1"),
        init_world("cuda:1", SignalHandler()),
    ):
        pass


@pytest.mark.parametrize("number", [None, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM])
def test_error_of_one_process_is_raised_unless_torchrun_stops_it(monkeypatch, capsys, number):
    """torchrun sends SIGTERM when the main process failed. Any other signal, or a timeout, ends the wait for it."""
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(distributed, "_ERROR_DELAY_S", 0.0 if number is None else 600.0)
    # During the wait, so that Ctrl-C is not handled before.
    monkeypatch.setattr(distributed.time, "sleep", lambda _: number and os.kill(os.getpid(), number))
    with (
        SignalHandler() as signals,
        pytest.raises(SystemExit if number == signal.SIGTERM else ValueError),
        init_world("cuda:1", signals),
    ):
        pass
    assert ("rank 1:" in capsys.readouterr().err) == (number != signal.SIGTERM)


@pytest.mark.slow
def test_twenty_processes_killed_at_random_do_not_change_the_result(launch, tmp_path):
    """Three in four are killed while they train or save, the rest while they start."""
    epochs, kills = 100, 20
    more = ("--epochs", epochs, "--save-interval", 2, "--keep-last", 2, "--model-ema")
    uninterrupted = launch(2, "--experiment", "uninterrupted", *more)
    assert uninterrupted.wait(timeout=600) == 0
    run = launch(2, "--experiment", "killed", *more, MAX_RESTARTS=str(kills + 5))
    chance, past, progress = random.Random(20), set(), []
    last = tmp_path / "output" / "killed" / "last.pth"

    def is_restarted():
        return run.poll() is not None or (len(children(run.pid)) == 2 and not past & set(children(run.pid)))

    for _ in range(kills):
        wait_for(is_restarted)
        assert run.poll() is None, "the run ended before all kills; make it longer"
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
    assert_same_run(tmp_path / "output" / "uninterrupted", tmp_path / "output" / "killed")
