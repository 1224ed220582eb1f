"""One writer per run: the lock of the folder, files written by several processes, and processes that end together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from natzoo import runs
from natzoo.checkpoints import read_checkpoint, write_checkpoint
from natzoo.runs import lock_folder

SCRIPTS = Path(__file__).parents[2] / "classification"
HOLD = "import sys, time; from pathlib import Path; from natzoo.runs import lock_folder\n"
HOLD += "with lock_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


@pytest.fixture
def start():
    """A function that starts a process with merged output; the process is killed at the end."""
    started = []

    def run(*words, **environment):
        env = {**os.environ, "PYTHON": sys.executable, **environment}
        process = subprocess.Popen(
            [str(word) for word in words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(runs, "_PATIENCE_S", 0.0)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def descendants(pid):
    """Return the process ids of all children, their children, and so on."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = [
            int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()
        ]
        return children + [other for child in children for other in descendants(child)]
    return []


def is_alive(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


# ----- files -----


def test_two_writers_never_show_an_incomplete_file(tmp_path, start):
    path = tmp_path / "last.pth"
    content = {"weight": torch.zeros(300_000)}
    write_checkpoint(path, content)
    loop = "import sys, torch; from natzoo.checkpoints import write_checkpoint\n"
    loop += "print('ready', flush=True)\n"
    loop += "while True: write_checkpoint(sys.argv[1], {'weight': torch.full((300_000,), float(sys.argv[2]))})"
    writers = [start(sys.executable, "-c", loop, path, number) for number in (1, 2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    seen = set()

    def read():
        weight = read_checkpoint(path)["weight"]
        assert torch.equal(weight, weight[:1].expand(len(weight)))  # written by one of them
        seen.add(weight[0].item())
        return {1.0, 2.0} <= seen

    wait_for(read)
    for _ in range(200):
        read()
    assert all(writer.poll() is None for writer in writers)


# ----- the lock -----


def test_second_run_is_refused(tmp_path, start, impatient):
    folder = tmp_path / "run"
    holder = start(sys.executable, "-c", HOLD, folder)
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGSTOP)  # a stopped process keeps the lock
    with (
        pytest.raises(ValueError, match=rf"run.*process {holder.pid} on {re.escape(socket.gethostname())}"),
        lock_folder(folder),
    ):
        pass
    holder.kill()
    holder.wait()
    with lock_folder(folder):
        pass
    assert not list(folder.iterdir())
    with lock_folder(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new").exists()  # nothing was written into it


def test_folder_with_content_stays(tmp_path):
    folder = tmp_path / "parent" / "run"
    folder.mkdir(parents=True)
    for name in (".last.pth.tmp", ".last.pth.0123456789ab.tmp", ".other.tmp"):
        (folder / name).write_bytes(b"left by a killed writer")
    with lock_folder(folder):
        (folder / "last.pth").touch()
    assert sorted(path.name for path in folder.iterdir()) == [".other.tmp", "last.pth"]


def test_forked_process_does_not_hold_the_lock(tmp_path, impatient):
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
    try:
        with lock_folder(tmp_path / "run"):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    for folder in (tmp_path / "file", tmp_path / "run"):
        with pytest.raises(OSError, match=folder.name), lock_folder(folder):
            pass
    assert not (tmp_path / "precious").exists()


# ----- runs -----


def test_two_starts_in_one_folder(tiny, run_folder, start):
    first = start(sys.executable, SCRIPTS / "train.py", *tiny(epochs=1000))
    wait_for((run_folder / "last.pth").exists)
    second = start(sys.executable, SCRIPTS / "train.py", *tiny("--resume", epochs=1000))
    output = second.communicate(timeout=300)[0]
    assert second.returncode == 2
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert f"process {first.pid}" in line
    assert str(run_folder) in line
    assert "Traceback" not in output
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=300) == 128 + signal.SIGTERM
    assert not (run_folder / ".lock").exists()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no parent-death signal")
def test_killed_launcher_leaves_no_process(tiny, run_folder, tmp_path, start, processes):
    """Ranks and data-loading workers end with the process that was started, and the run resumes."""
    config = tmp_path / "empty.yml"
    config.write_text("workers: 2\n")
    data, *options = tiny(epochs=1000)
    options[options.index("--workers") + 1] = "2"
    one = [sys.executable, SCRIPTS / "train.py", data, *options]
    run = start(*(one if processes == 1 else ["bash", SCRIPTS / "dist_train.sh", config, processes, data, *options]))
    wait_for(lambda: run.poll() is not None or (run_folder / "last.pth").exists())
    assert run.poll() is None, run.stdout.read()
    family = descendants(run.pid)
    assert len(family) >= (4 if processes == 1 else 2 + 8)  # two workers each for training and validation
    run.kill()
    run.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in family), seconds=60)
    epochs = read_checkpoint(run_folder / "last.pth")["epoch"]
    options[options.index("--epochs") + 1] = str(epochs + 1)
    again = start(sys.executable, SCRIPTS / "train.py", data, *options, "--resume", "--grad-accum", processes)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert "Resumed from" in output
