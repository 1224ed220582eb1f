"""train.py: what a run leaves, that it can be killed, and what it says of mistakes."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from natzoo.checkpoints import read_checkpoint, write_checkpoint

TRAIN = Path(train.__file__)


def rows(folder):
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def start(options):
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# ----- what a run leaves -----


def test_a_run_learns_and_leaves_everything(tiny, run_folder, capsys):
    best = train.main(tiny(epochs=8))
    assert best > 80
    figures = rows(run_folder)
    assert [row["epoch"] for row in figures] == [str(epoch) for epoch in range(8)]
    assert float(figures[-1]["train_loss"]) < float(figures[0]["train_loss"])
    assert max(float(row["top1"]) for row in figures) == pytest.approx(best)

    last, kept = read_checkpoint(run_folder / "last.pth"), read_checkpoint(run_folder / "best.pth")
    assert last["epoch"] == 8
    assert kept["best"] == pytest.approx(best)
    assert last["record"]["classes"] == ["amber", "blue", "crimson"]
    assert last["record"]["preprocessing"]["input_size"] == [3, 16, 16]

    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "train/grad_norm", "train/images_per_s", "val/top1"} <= set(
        events.Tags()["scalars"]
    )
    assert len(events.Scalars("train/loss")) == 8 * 9
    assert len(events.Scalars("val/top1")) == 8

    output = capsys.readouterr().out
    assert "72 images of 3 classes" in output
    assert "epoch 8/8" in output
    assert f"best top-1 {best:.2f}%" in output


@pytest.mark.parametrize(
    "more",
    [
        ["--model-ema", "--model-ema-decay", "0.5", "--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.5"],
        ["--amp", "bf16", "--channels-last", "--grad-checkpointing", "--grad-accum", "2", "--drop-path", "0.1"],
        ["--opt", "lamb", "--layer-decay", "0.8", "--sched", "none", "--aa", "rand-m9-mstd0.5-inc1"],
    ],
    ids=["ema-mixup", "amp-accumulation", "layer-decay"],
)
def test_options_work_together(tiny, run_folder, more):
    train.main(tiny(*more, epochs=1))
    assert len(rows(run_folder)) == 1
    weights = read_checkpoint(run_folder / "last.pth")["model"]
    assert all(value.isfinite().all() for value in weights.values())


def test_evaluation_is_of_the_averaged_weights(tiny, run_folder):
    """With a decay of 1 the average stays what it was at the start, so its accuracy does not change."""
    train.main(tiny("--model-ema", "--model-ema-decay", "1.0", epochs=3))
    assert len({row["top1"] for row in rows(run_folder)}) == 1


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tiny, run_folder):
    once = train.Trainer(train.parse(tiny("--batch-size", "16", "--experiment", "large", "--hflip", "0")))
    parts = train.Trainer(train.parse(tiny("--grad-accum", "2", "--hflip", "0")))
    x, target = torch.randn(16, 3, 16, 16), torch.arange(16) % 3
    once.backward(x, target, step=0)
    parts.backward(x[:8], target[:8], step=0)
    parts.backward(x[8:], target[8:], step=1)
    for one, other in zip(once.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


# ----- interruptions -----


def test_killed_in_mid_epoch_and_resumed_it_ends_as_the_unbroken_run(tiny, run_folder, tmp_path):
    train.main(tiny("--output", tmp_path / "unbroken", epochs=4))
    expected = read_checkpoint(tmp_path / "unbroken" / "tiny" / "last.pth")

    process = start(tiny("--workers", "1", epochs=4))
    while not (run_folder / "last.pth").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    interrupted = read_checkpoint(run_folder / "last.pth")["epoch"]
    assert 1 <= interrupted < 4

    train.main(tiny("--resume", epochs=4))
    resumed = read_checkpoint(run_folder / "last.pth")
    assert_same_weights(expected["model"], resumed["model"])
    assert resumed["epoch"] == 4
    losses = [[row["train_loss"] for row in rows(folder)] for folder in (run_folder, tmp_path / "unbroken" / "tiny")]
    assert losses[0] == losses[1]


def test_resuming_a_finished_run_trains_no_more(tiny, run_folder):
    best = train.main(tiny(epochs=1))
    before = (run_folder / "last.pth").read_bytes()
    assert train.main(tiny("--resume", epochs=1)) == best
    assert (run_folder / "last.pth").read_bytes() == before


def test_a_run_is_not_overwritten(tiny, run_folder):
    train.main(tiny(epochs=1))
    with pytest.raises(ValueError, match=r"last\.pth is there already: go on with it by --resume"):
        train.main(tiny(epochs=1))


def test_starting_from_weights(tiny, run_folder):
    train.main(tiny(epochs=1))
    trainer = train.Trainer(
        train.parse(tiny("--experiment", "second", "--initial-checkpoint", run_folder / "last.pth"))
    )
    assert_same_weights(read_checkpoint(run_folder / "last.pth")["model"], trainer.model.state_dict())


def test_a_checkpoint_of_another_model_is_not_resumed(tiny, run_folder):
    train.main(tiny(epochs=1))
    with pytest.raises(ValueError, match=r"cannot be resumed: its model_kwargs is .*embed_dim.*but this run's is"):
        train.main(tiny("--resume", "--model-kwargs", "embed_dim=32"))
    write_checkpoint(run_folder / "bare.pth", read_checkpoint(run_folder / "last.pth")["model"])
    with pytest.raises(ValueError, match=r"bare\.pth cannot be resumed, it lacks .*optimizer.*--initial-checkpoint"):
        train.main(tiny("--resume", run_folder / "bare.pth"))


# ----- mistakes -----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nat_minni"], "there is no model 'nat_minni': did you mean 'nat_mini'"),
        (["--model-kwargs", "wibble=1"], "model 'nat_mini' does not take these arguments: .*wibble"),
        (["--num-classes", "2"], "has 3 classes, but the model tells only 2 apart"),
        (["--opt", "wibble"], "the optimizer 'wibble' cannot be made"),
        (["--batch-size", "7", "--mixup", "0.5"], "--batch-size is 7, but mixup pairs images"),
        (["--batch-size", "100"], "holds 72 images, fewer than --batch-size 100"),
        (["--grad-accum", "10"], "an epoch has 9 batches, fewer than --grad-accum 10"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--lr", "1e30", "--clip-grad", "0"], r"the loss is (nan|inf) in epoch \d, update \d+: lower --lr"),
    ],
)
def test_mistakes_are_named(tiny, more, message):
    with pytest.raises(ValueError, match=message):
        train.main(tiny(*more))


def test_an_unreadable_image_is_named_and_can_be_skipped(tiny, data, run_folder, capsys):
    bad = data / "train" / "blue" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"blue/3\.png cannot be read as an image: .*--skip-bad-images"):
        train.main(tiny())
    train.main(tiny("--skip-bad-images"))
    assert [row["bad_images"] for row in rows(run_folder)] == ["1", "1"]
    assert f"1 training images could not be read and were left out:\n  {bad}" in capsys.readouterr().out


def test_the_command_line_says_one_line_and_exits_with_2(tmp_path):
    process = start([str(tmp_path / "nowhere")])
    output, _ = process.communicate()
    assert process.returncode == 2
    assert output.startswith(f"error: there is no data folder {tmp_path / 'nowhere'}")
    assert "Traceback" not in output
    assert output.count("\n") == 1


def test_a_full_disk_stops_with_a_message_and_loses_nothing(tiny, run_folder, monkeypatch):
    train.main(tiny(epochs=1))
    before = (run_folder / "last.pth").read_bytes()
    real = os.fdopen
    full = lambda handle, mode: (os.close(handle), real(os.open("/dev/full", os.O_WRONLY), mode))[1]  # noqa: E731
    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match="what was there before is unharmed"):
        train.main(tiny("--resume", epochs=2))
    assert (run_folder / "last.pth").read_bytes() == before
