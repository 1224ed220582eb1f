"""Checkpoints of runs: interrupted writes, the files of a run, older formats, and use as pretrained weights."""

import errno
import os
import random
import resource
import signal
from pathlib import Path

import pytest
import timm
import torch

from natzoo.checkpoints import read_checkpoint, read_weights, write, write_checkpoint
from natzoo.classification import checkpoints as checkpoints_module
from natzoo.classification import train
from natzoo.classification.checkpoints import CheckpointSaver
from natzoo.classification.distributed import World
from natzoo.classification.options import parse
from natzoo.runs import lock_folder


def state(version):
    weights = torch.full((100, 100), float(version))
    return {"version": version, "model": {"weight": weights}, "optimizer": {"state": {0: weights.clone()}}}


@pytest.fixture
def checkpoints(tmp_path):
    saver = CheckpointSaver(tmp_path, keep=0, world=World())
    saver.save_last(state(0))
    return saver


def in_child(function):
    """Run a function in a forked process and return the signal that ended it, or minus its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = function()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def killed_at_byte(checkpoints, version, byte):
    """Save in a process that the kernel kills when it writes that byte of the file."""

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, resource.RLIM_INFINITY))
        checkpoints.save_last(state(version))
        return 0

    return in_child(save)


def killed_at_call(checkpoints, version, name, is_after):
    """Save in a process that is killed before or after a system call."""

    def save():
        original = getattr(os, name)

        def killed(*args):
            if is_after:
                original(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, killed)
        checkpoints.save_last(state(version))
        return 0

    return in_child(save)


def full_at_byte(checkpoints, version, byte, monkeypatch):
    """Save to a disk that is full from that byte on, and return the message of the error."""
    real = os.fdopen

    class Full:
        def __init__(self, *args):
            self.file = real(*args)
            self.room = byte

        def write(self, content):
            self.room -= len(content)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", Full)
        try:
            checkpoints.save_last(state(version))
        except OSError as error:
            return str(error)


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_crashes_leave_the_old_or_the_new_state(checkpoints, monkeypatch, count):
    chance = random.Random(200)
    size = checkpoints.last.stat().st_size
    known, killed, full = 0, 0, 0
    for version in range(1, count + 1):
        byte = chance.randrange(size)
        if version % 4 == 0:
            message = full_at_byte(checkpoints, version, byte, monkeypatch)
            assert "last.pth" in message
            full += 1
        elif version % 4 == 1:
            name, is_after = chance.choice([("fsync", False), ("fsync", True), ("replace", False), ("replace", True)])
            assert killed_at_call(checkpoints, version, name, is_after) == signal.SIGKILL
            known = version if (name, is_after) == ("replace", True) else known
            killed += 1
        else:
            assert killed_at_byte(checkpoints, version, byte) == signal.SIGXFSZ
            killed += 1
        found = read_checkpoint(checkpoints.last)
        assert found["version"] == known
        torch.testing.assert_close(found, state(known), rtol=0, atol=0)
    assert (killed, full) == (count * 3 // 4, count // 4)
    assert known > 0
    with lock_folder(checkpoints.folder):  # as the next run does; it deletes what killed writers left
        checkpoints.save_last(state(999))
    assert read_checkpoint(checkpoints.last)["version"] == 999
    assert [path.name for path in checkpoints.folder.iterdir()] == ["last.pth"]


def test_last_epochs_are_kept(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=2, world=World())
    for epoch in range(1, 5):
        checkpoints.save_last(state(epoch))
        checkpoints.keep_epoch(epoch)
    checkpoints.save_last(state(99))
    kept = {path.name: read_checkpoint(path)["version"] for path in tmp_path.iterdir()}
    assert kept == {"epoch-0003.pth": 3, "epoch-0004.pth": 4, "last.pth": 99}


def test_run_resumed_from_an_earlier_epoch_keeps_other_files(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=5, world=World())
    for epoch in range(1, 7):
        checkpoints.save_last(state(epoch))
        checkpoints.keep_epoch(epoch)
    checkpoints = CheckpointSaver(tmp_path, keep=2, world=World())
    checkpoints.save_last(state(33))
    (tmp_path / "epoch-best.pth").write_bytes(b"a file of the user")
    checkpoints.keep_epoch(3)
    (tmp_path / "epoch-best.pth").unlink()
    kept = {path.name: read_checkpoint(path)["version"] for path in tmp_path.glob("epoch-*.pth")}
    assert kept == {f"epoch-{epoch:04d}.pth": version for epoch, version in ((2, 2), (3, 33), (4, 4), (5, 5), (6, 6))}


def test_epochs_are_kept_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    synced, sync = [], write.sync
    monkeypatch.setattr(os, "link", refuse)
    checkpoints = CheckpointSaver(tmp_path, keep=1, world=World())
    checkpoints.save_last(state(1))
    monkeypatch.setattr(write, "sync", lambda path: (synced.append(path.stat().st_size), sync(path)))
    checkpoints.keep_epoch(1)
    assert read_checkpoint(tmp_path / "epoch-0001.pth")["version"] == 1
    assert synced == [(tmp_path / "epoch-0001.pth").stat().st_size]


def test_only_the_main_process_writes(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=1, world=World(rank=1, size=2))
    checkpoints.save_last(state(1))
    checkpoints.save_best(state(1))
    checkpoints.keep_epoch(1)
    assert not list(tmp_path.iterdir())


# Options of checkpoints written before --work-dir existed.
OLD_OPTIONS = (
    *("data", "config", "dataset", "input_key", "target_key", "train_split", "val_split", "class_map", "synthetic"),
    *("workers", "skip_bad_images", "model", "model_kwargs", "num_classes", "img_size", "drop_path", "pretrained"),
    *("initial_checkpoint", "opt", "lr", "lr_base_size", "weight_decay", "decay_rpb", "momentum", "opt_eps"),
    *("opt_betas", "layer_decay", "clip_grad", "batch_size", "grad_accum", "skip_nonfinite", "epochs", "sched"),
    *("warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs", "decay_epochs", "decay_milestones", "decay_rate"),
    *("scale", "ratio", "hflip", "vflip", "color_jitter", "aa", "train_interpolation", "reprob", "remode", "recount"),
    *("mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "smoothing", "bce_loss", "bce_target_thresh", "crop_pct"),
    *("interpolation", "mean", "std", "val_batch_size", "model_ema", "model_ema_decay", "output", "experiment"),
    *("resume", "save_interval", "keep_last", "seed", "device", "threads", "amp", "channels_last"),
    *("grad_checkpointing", "compile", "log_interval"),
)


def test_checkpoint_of_an_earlier_version_resumes(tiny, run_folder, capsys):
    """Its options, the keys of its state and of its meters are those of the earlier version."""
    trainer = train.Trainer(train.parse(tiny(epochs=1)))
    trainer.backward(torch.zeros(8, 3, 16, 16), torch.zeros(8, dtype=torch.long), step=0)
    trainer.update_weights(1.0)
    optimizer = trainer.optimizer.state_dict()
    old = {
        "model": trainer.model.state_dict(),
        "model_ema": None,
        "record": trainer.record,
        "epoch": 0,
        "best": 40.0,
        "best_epoch": 1,
        "update": 5,
        "totals": {"loss": 5.5, "losses": 5, "norm": 10.0, "norms": 5, "seconds": 1.5},
        "skipped": 0,
        "optimizer": optimizer,
        "scaler": {},
        "options": {key: vars(trainer.args)[key] for key in OLD_OPTIONS},
        "processes": 1,
        "images": {"number of training images": 72},
    }
    write_checkpoint(run_folder / "last.pth", old)
    capsys.readouterr()
    train.main(tiny("--resume", epochs=1))
    output = capsys.readouterr().out
    assert "(epoch 1/1, update 5/9)" in output
    assert "Resuming with" not in output  # no option differs
    state = read_checkpoint(run_folder / "last.pth")
    assert (state["epoch"], state["update"]) == (1, 0)
    assert state.keys() == old.keys()
    assert state["options"].keys() == vars(trainer.args).keys() > set(OLD_OPTIONS)
    assert state["totals"].keys() == old["totals"].keys()


def test_changed_options_are_named_unless_the_run_is_refused(tiny, run_folder, capsys):
    train.main(tiny(epochs=1))
    capsys.readouterr()
    with pytest.raises(ValueError, match="kernel_size"):
        train.main(tiny("--resume", "--lr", "1e-3", "--model-kwargs", "kernel_size=5"))
    assert "Resuming with" not in capsys.readouterr().out
    train.main(tiny("--resume", "--lr", "1e-3"))
    assert "Resuming with lr = 0.001; the checkpoint has 0.002." in capsys.readouterr().out


def test_names_of_the_run_folder(tmp_path):
    """--work-dir, and --output with --experiment; the command line overrides a file, the last option wins."""
    config = tmp_path / "recipe.yml"
    config.write_text("model: nat_mini\n")
    old, new = tmp_path / "old.yml", tmp_path / "new.yml"
    old.write_text("output: runs\nexperiment: a\n")
    new.write_text("work_dir: runs/b\n")
    for argv, folder in (
        ([], "output/nat_tiny"),
        (["-c", config], "output/recipe"),
        (["--output", "runs"], "runs/nat_tiny"),
        (["--output", "runs", "--experiment", "a"], "runs/a"),
        (["--work-dir", "runs/b"], "runs/b"),
        (["-c", old], "runs/a"),
        (["-c", old, "--work-dir", "c"], "c"),
        (["-c", new], "runs/b"),
        (["-c", new, "--output", "runs", "--experiment", "a"], "runs/a"),
    ):
        assert checkpoints_module.run_folder(parse([str(word) for word in argv])) == Path(folder), argv


# ----- checkpoints as pretrained weights of timm models -----


SMALL = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3}


@pytest.mark.parametrize("average", [False, True])
def test_checkpoints_of_a_run_are_pretrained_weights(tiny, run_folder, average):
    """The averaged weights if there are any; also for a feature extractor."""
    train.main(tiny(*(["--model-ema", "--model-ema-decay", "0.5"] if average else []), epochs=1))
    for name in ("last.pth", "best.pth"):
        path = run_folder / name
        expected = read_checkpoint(path)["model_ema" if average else "model"]
        arguments = {**SMALL, "pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
        model = timm.create_model("nat_mini", **arguments, num_classes=3)
        features = timm.create_model("nat_mini", **arguments, features_only=True, out_indices=(0, 1))
        for key, value in expected.items():
            assert torch.equal(model.state_dict()[key], value), key
            assert torch.equal(read_weights(path)[key], value), key
        key = "levels.1.blocks.0.attn.rpb"
        assert torch.equal(features.state_dict()[f"model.{key}"], expected[key])
