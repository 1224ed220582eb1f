"""train.py: the files of a run, interruption and resuming, and errors."""

import csv
import errno
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from natzoo.checkpoints import read_checkpoint, read_weights, write_checkpoint
from natzoo.classification import signals, train
from natzoo.classification.distributed import World
from natzoo.models.nat import HierarchicalTransformer

TRAIN = Path(__file__).parents[2] / "classification" / "train.py"


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


# ----- files of a run -----


def test_run_learns_and_writes_all_files(tiny, run_folder, capsys):
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
    assert {"train/loss", "train/lr", "train/grad_norm", "train/images_per_s", "train/memory_mb", "val/top1"} <= set(
        events.Tags()["scalars"]
    )
    assert len(events.Scalars("train/loss")) == 8 * 9
    assert len(events.Scalars("val/top1")) == 8

    output = capsys.readouterr().out
    assert "Epoch 8/8" in output
    assert f"top-1 {best:.2f}%" in output


@pytest.mark.parametrize(
    "more",
    [
        ["--model-ema", "--model-ema-decay", "0.5", "--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.5"],
        ["--amp", "bf16", "--channels-last", "--grad-checkpointing", "--grad-accum", "2", "--drop-path", "0.1"],
        ["--bce-loss", "--bce-target-thresh", "0.2", "--cutmix", "1.0", "--lr-base-size", "16", "--decay-rpb"],
        ["--opt", "lamb", "--layer-decay", "0.8", "--sched", "none", "--aa", "rand-m9-mstd0.5-inc1"],
    ],
    ids=["ema-mixup", "amp-accumulation", "bce", "layer-decay"],
)
def test_options_work_together(tiny, run_folder, more):
    train.main(tiny(*more, epochs=1))
    assert len(rows(run_folder)) == 1
    weights = read_checkpoint(run_folder / "last.pth")["model"]
    assert all(value.isfinite().all() for value in weights.values())


def test_averaged_weights_are_evaluated(tiny, run_folder):
    """With a decay of 1 the average keeps the initial weights, and the validation loss is constant."""
    train.main(tiny("--model-ema", "--model-ema-decay", "1.0", epochs=3))
    figures = rows(run_folder)
    assert len({row["val_loss"] for row in figures}) == 1
    assert len({row["train_loss"] for row in figures}) == 3
    state = read_checkpoint(run_folder / "best.pth")
    assert_same_weights(state["model_ema"], read_weights(run_folder / "best.pth"))
    assert not torch.equal(state["model"]["head.weight"], state["model_ema"]["head.weight"])


def test_accumulated_gradient_equals_that_of_one_large_batch(tiny, run_folder):
    once = train.Trainer(train.parse(tiny("--batch-size", "16", "--experiment", "large", "--drop-path", "0")))
    parts = train.Trainer(train.parse(tiny("--grad-accum", "2", "--drop-path", "0")))
    x, target = torch.randn(16, 3, 16, 16), torch.arange(16) % 3
    once.backward(x, target, step=0)
    parts.backward(x[:8], target[:8], step=0)
    parts.backward(x[8:], target[8:], step=1)
    for one, other in zip(once.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


# ----- interruptions -----


KILLED = """
import os, signal, sys
from natzoo.classification import train
calls, original = 0, getattr({owner}, {name!r})
def killed(*args):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
setattr({owner}, {name!r}, killed)
train.main(sys.argv[1:])
"""

# In the middle of the second epoch, whose updates are 10 to 18; and between writing and renaming the second last.pth,
# which may follow a best.pth.
PLACES = {"mid-epoch": ("train.Trainer", "update_weights", 14), "mid-save": ("os", "replace", 5)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "more", [[], ["--model-ema", "--mixup", "0.8", "--grad-accum", "1"]], ids=["plain", "ema-mixup"]
)
def test_killed_run_resumes_to_the_result_of_an_uninterrupted_run(tiny, run_folder, tmp_path, place, more):
    train.main(tiny(*more, "--output", tmp_path / "uninterrupted", epochs=4))
    uninterrupted = tmp_path / "uninterrupted" / "tiny"
    owner, name, call = PLACES[place]
    code = KILLED.format(owner=owner, name=name, call=call)
    done = subprocess.run([sys.executable, "-c", code, *tiny(*more, "--workers", "1", epochs=4)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert 1 <= read_checkpoint(run_folder / "last.pth")["epoch"] < 4

    train.main(tiny(*more, "--resume", epochs=4))
    expected, resumed = read_checkpoint(uninterrupted / "last.pth"), read_checkpoint(run_folder / "last.pth")
    assert_same_weights(expected["model"], resumed["model"])
    if "--model-ema" in more:
        assert_same_weights(expected["model_ema"], resumed["model_ema"])
    torch.testing.assert_close(expected["optimizer"], resumed["optimizer"], rtol=0, atol=0)
    assert (resumed["epoch"], resumed["best"]) == (4, expected["best"])
    assert untimed(run_folder) == untimed(uninterrupted)
    assert sorted(path.name for path in run_folder.iterdir()) == sorted(path.name for path in uninterrupted.iterdir())


@pytest.mark.parametrize("updates", [5, 9], ids=["mid-epoch", "before the evaluation"])
def test_stopped_run_resumes_to_the_result_of_an_uninterrupted_run(tiny, run_folder, tmp_path, stop_after, updates):
    more = ("--mixup", "0.8", "--model-ema", "--drop-path", "0.1", "--grad-accum", "1", "--workers", "2")
    train.main(tiny(*more, "--output", tmp_path / "uninterrupted"))
    stop_after(updates, tiny(*more))
    stopped = read_checkpoint(run_folder / "last.pth")
    assert (stopped["epoch"], stopped["update"]) == (0, updates)
    train.main(tiny(*more, "--resume", "--workers", "1"))
    assert float(rows(run_folder)[0]["seconds"]) > 0.99 * stopped["totals"]["seconds"] > 0
    expected, resumed = (
        read_checkpoint(folder / "last.pth") for folder in (tmp_path / "uninterrupted" / "tiny", run_folder)
    )
    for part in ("model", "model_ema", "optimizer", "best"):
        torch.testing.assert_close(expected[part], resumed[part], rtol=0, atol=0)
    assert untimed(run_folder) == untimed(tmp_path / "uninterrupted" / "tiny")


@pytest.mark.slow
def test_compiled_run_with_averaged_weights_resumes_exactly(tiny, run_folder, tmp_path, stop_after):
    more = ("--compile", "--model-ema", "--model-ema-decay", "0.9")
    train.main(tiny(*more, "--output", tmp_path / "uninterrupted"))
    stop_after(5, tiny(*more))
    train.main(tiny(*more, "--resume"))
    expected, resumed = (
        read_checkpoint(folder / "last.pth") for folder in (tmp_path / "uninterrupted" / "tiny", run_folder)
    )
    for part in ("model", "model_ema", "optimizer", "best"):
        torch.testing.assert_close(expected[part], resumed[part], rtol=0, atol=0)


def test_ctrl_c_saves_and_a_second_one_stops_at_once(tiny, run_folder, stop_after, monkeypatch, capfd):
    stop_after(3, tiny("--workers", "1"), signal.SIGINT)
    assert read_checkpoint(run_folder / "last.pth")["update"] == 3
    output = capfd.readouterr()
    assert "SIGINT (epoch 1/2, update 3/9)" in output.out
    assert "Ctrl-C" in output.err
    for environment, second in (({}, signal.SIGINT), ({"RANK": "1"}, signal.SIGTERM)):
        monkeypatch.setattr(os, "environ", environment)
        monkeypatch.setattr(signals, "_REPEAT_S", 60.0)
        with signals.SignalHandler() as handler, pytest.raises(KeyboardInterrupt):
            handler.handle_ctrl_c()
            os.kill(os.getpid(), signal.SIGINT)
            if environment:
                os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, forwarded by torchrun
                monkeypatch.setattr(signals, "_REPEAT_S", 0.0)
            assert handler.received == signal.SIGINT
            os.kill(os.getpid(), second)
    with signals.SignalHandler(), pytest.raises(KeyboardInterrupt):  # before there is anything to save
        os.kill(os.getpid(), signal.SIGINT)


def test_unintended_settings_cause_warnings(tiny, capsys):
    train.Trainer(train.parse(tiny("--model-ema", "--amp", "fp16")))
    output = capsys.readouterr().out
    assert "--model-ema-decay" in output
    assert "--amp fp16" in output
    train.Trainer(train.parse(tiny("--model-ema", "--model-ema-decay", "0.8")))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("is_supported", [True, False])
def test_bfloat16_on_a_cpu_without_it_causes_a_warning(tiny, capsys, monkeypatch, is_supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    train.Trainer(train.parse(tiny("--amp", "bf16")))
    assert capsys.readouterr().out.count("--amp bf16") == (0 if is_supported else 1)


def test_checkpoints_between_epochs(tiny, run_folder, monkeypatch):
    saved = []
    original = train.CheckpointSaver.save_last
    monkeypatch.setattr(
        train.CheckpointSaver, "save_last", lambda self, state: (saved.append(state["update"]), original(self, state))
    )
    train.main(tiny("--save-interval", "4", "--keep-last", "1"))
    assert saved == [4, 8, 0, 4, 8, 0]
    assert read_checkpoint(run_folder / "epoch-0002.pth")["epoch"] == 2
    assert not (run_folder / "epoch-0001.pth").exists()


@pytest.fixture
def pair(monkeypatch):
    """A World of two processes of which only one runs; `others` holds the values of the other one."""

    class Pair(World):
        others = ()

        def sum(self, *values):
            return list(values)

        def gather(self, value):
            return [*self.others, value]

        def data_parallel(self, model, device):
            return model

    return Pair


def test_processes_with_different_state_or_data_are_refused(tiny, data, pair):
    """One process without last.pth or with another one, with another image, or with another class."""
    sent = []

    def start(*more):
        class Second(pair):
            others = sent[-1:] if sent else ()

            def gather(self, value):
                if isinstance(value, tuple) and "number of training images" in value[1]:
                    gathered.append(value)
                    return super().gather(value)
                return [value]

        gathered = []
        train.Trainer(train.parse(tiny("--resume", *more)), Second(1, 2, 1, 2))
        sent[:] = gathered

    start()
    start()
    train.main(tiny("--grad-accum", "2", epochs=1))
    with pytest.raises(ValueError, match=r"\(1, 0, [\d.]+\) on rank 1 .*\(0, 0, -inf\) on rank 0"):
        start()
    new_folder = ("--experiment", "new")
    (data / "train" / "blue" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"number of training images .*71 on rank 1 .*72 on rank 0"):
        start(*new_folder)
    (data / "train" / "crimson" / "0.png").rename(data / "train" / "blue" / "0.png")
    for split in ("train", "val"):
        (data / split / "amber").rename(data / split / "azure")
    (data / "train" / "blue" / "more.png").write_bytes((data / "train" / "blue" / "1.png").read_bytes())
    with pytest.raises(ValueError, match=r"class names .*[0-9a-f]{12} on rank 1"):
        start(*new_folder)


def test_running_statistics_come_from_the_main_process(tiny, pair, monkeypatch):
    shared = []
    monkeypatch.setattr(train, "distribute_bn", lambda model, size: shared.append((model, size)))
    trainer = train.Trainer(train.parse(tiny("--model-ema", epochs=1)), pair(0, 2, 0, 2))
    trainer.run()
    assert shared == [(trainer.ema.module, 2)]


def broken_loss(monkeypatch, *updates):
    """Make the loss of some updates, counted from 0, NaN."""
    original, calls = train.Trainer.backward, []

    def backward(self, x, target, step):
        calls.append(step)
        return original(self, x * float("nan") if len(calls) - 1 in updates else x, target, step)

    monkeypatch.setattr(train.Trainer, "backward", backward)


def test_updates_without_a_finite_loss_are_skipped(tiny, run_folder, monkeypatch, capsys):
    broken_loss(monkeypatch, 3, 4, 5, 7)
    train.main(tiny("--model-ema", epochs=1))
    state = read_checkpoint(run_folder / "last.pth")
    assert all(value.isfinite().all() for part in ("model", "model_ema") for value in state[part].values())
    assert {part["step"].item() for part in state["optimizer"]["state"].values()} == {5}
    assert sum("nan" in line for line in capsys.readouterr().out.splitlines()) == 4
    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    (row,) = rows(run_folder)
    for column, tag in (("train_loss", "train/loss"), ("grad_norm", "train/grad_norm")):
        summed = [event.value for event in events.Scalars(tag) if math.isfinite(event.value)]
        assert len(summed) == 5
        assert float(row[column]) == pytest.approx(sum(summed) / 5)


def test_signal_after_a_skipped_update_saves(tiny, run_folder, monkeypatch, stop_after):
    broken_loss(monkeypatch, 4)
    stop_after(5, tiny())
    state = read_checkpoint(run_folder / "last.pth")
    assert (state["update"], state["skipped"]) == (5, 1)
    assert {part["step"].item() for part in state["optimizer"]["state"].values()} == {4}


def test_signal_after_divergence_saves_nothing(tiny, run_folder, monkeypatch, stop_after):
    original = train.Trainer.backward

    def backward(self, *args, **kwargs):
        self.model.head.weight.data.fill_(math.inf)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(train.Trainer, "backward", backward)
    stop_after(2, tiny())
    assert not (run_folder / "last.pth").exists()


@pytest.mark.parametrize("sched", ["none", "cosine"])
def test_layer_decay_is_applied_once(tiny, sched):
    trainer = train.Trainer(train.parse(tiny("--layer-decay", "0.5", "--sched", sched)))
    if trainer.scheduler is not None:
        trainer.scheduler.step_update(0)
    rates = {}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        rates.update({names[id(parameter)]: group["lr"] for parameter in group["params"]})
    assert rates["head.weight"] == pytest.approx(2e-3)
    assert rates["levels.1.blocks.0.mlp.fc1.weight"] == pytest.approx(1e-3)
    assert rates["levels.0.blocks.0.mlp.fc1.weight"] == pytest.approx(5e-4)


def test_run_stops_after_too_many_skipped_updates(tiny, run_folder, monkeypatch):
    train.main(tiny(epochs=1))
    before = (run_folder / "last.pth").read_bytes()
    broken_loss(monkeypatch, 2, 3, 4)
    with pytest.raises(ValueError, match=r"Epoch 2/2, update 5/9: loss nan, grad norm nan, .*last\.pth.*--lr"):
        train.main(tiny("--resume", "--skip-nonfinite", "2", "--save-interval", "4"))
    assert (run_folder / "last.pth").read_bytes() == before


def untimed(folder):
    """Return the content of summary.csv and TensorBoard without what depends on the clock."""
    table = [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in rows(folder)]
    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in ("train/images_per_s", "train/memory_mb")]
    return table, {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_resuming_a_finished_run_changes_nothing(tiny, run_folder, capsys):
    best = train.main(tiny(epochs=1))
    before = (run_folder / "last.pth").read_bytes()
    capsys.readouterr()
    assert train.main(tiny("--resume", epochs=1)) == best
    assert "--epochs" in capsys.readouterr().out
    assert (run_folder / "last.pth").read_bytes() == before


def test_existing_run_is_not_overwritten(tiny, run_folder):
    train.main(tiny(epochs=1))
    with pytest.raises(ValueError, match=r"last\.pth .*--resume"):
        train.main(tiny(epochs=1))


def test_run_starts_from_the_checkpoint_of_another_run(tiny, run_folder, tmp_path):
    train.main(tiny(epochs=1))
    other = run_folder.with_name("other")
    train.main(tiny("--experiment", "other", "--resume", run_folder / "last.pth", epochs=2))
    assert read_checkpoint(other / "last.pth")["epoch"] == 2
    assert (other / "best.pth").exists()
    with pytest.raises(ValueError, match=r"other/last\.pth"):
        train.main(tiny("--experiment", "other", "--resume", run_folder / "last.pth", epochs=2))


def test_run_restarted_by_torchrun_resumes_from_its_own_checkpoint(tiny, run_folder, monkeypatch, capsys):
    """Even if --resume names another file, from which the first start of the run resumed."""
    train.main(tiny("--resume", epochs=1))
    assert str(run_folder) in capsys.readouterr().out
    first, other = run_folder / "last.pth", run_folder.with_name("other")
    options = tiny("--experiment", "other", "--resume", first, epochs=2)
    train.main(options)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(options)
    assert f"Resumed from {other / 'last.pth'} (epoch 2/2, update 9/9)" in capsys.readouterr().out
    write_checkpoint(run_folder / "kept.pth", read_checkpoint(first))
    with pytest.raises(ValueError, match=r"other/last\.pth"):  # written by another command
        train.main(tiny("--experiment", "other", "--resume", run_folder / "kept.pth", epochs=2))


def test_resuming_with_other_options_or_data_is_refused(tiny, data, run_folder, capsys):
    train.main(tiny(epochs=1))
    for more, message in (
        (["--seed", "7"], "seed.*42.*7"),
        (["--opt", "lamb"], "opt.*'adamw'.*'lamb'"),
        (["--model-ema"], "model_ema.*False.*True"),
        (["--layer-decay", "0.8"], "layer_decay.*None.*0.8"),
    ):
        with pytest.raises(ValueError, match=message):
            train.main(tiny("--resume", *more))
    trainer = train.Trainer(train.parse(tiny("--resume", "--weight-decay", "0.5", "--sched", "none", "--lr", "1e-7")))
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-7}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.5}
    assert re.search(r"weight_decay.*0\.5.*0\.05", capsys.readouterr().out)
    spare = (data / "train" / "amber" / "0.png").rename(data / "spare.png")
    with pytest.raises(ValueError, match=r"number of training images.*72.*71"):
        train.main(tiny("--resume"))
    spare.rename(data / "train" / "amber" / "0.png")
    for split in ("train", "val"):
        (data / split / "amber").rename(data / split / "zinc")
    with pytest.raises(ValueError, match=r"classes.*amber"):
        train.main(tiny("--resume"))


def test_fine_tuning_to_other_classes(tiny, data, run_folder):
    train.main(tiny(epochs=1))
    for split in ("train", "val"):
        (data / split / "crimson").rename(data / split.replace("train", "spare1").replace("val", "spare2"))
    options = tiny("--experiment", "second", "--initial-checkpoint", run_folder / "best.pth")
    trainer = train.Trainer(train.parse(options))
    old, new = read_weights(run_folder / "best.pth"), trainer.model.state_dict()
    assert new["head.weight"].shape == (2, 32)
    assert not (new["head.weight"][:, None] == old["head.weight"]).all(-1).any()  # no row of the old classifier
    assert torch.equal(old["levels.1.blocks.0.attn.rpb"], new["levels.1.blocks.0.attn.rpb"])


def test_resume_names_the_folder(tiny, run_folder):
    train.main(tiny(epochs=1))
    with pytest.raises(FileNotFoundError, match=f"--resume {run_folder} is a folder"):
        train.main(tiny("--resume", run_folder))


def test_initial_checkpoint(tiny, run_folder, capsys):
    train.main(tiny(epochs=1))
    trainer = train.Trainer(
        train.parse(tiny("--experiment", "second", "--initial-checkpoint", run_folder / "last.pth"))
    )
    assert_same_weights(read_checkpoint(run_folder / "last.pth")["model"], trainer.model.state_dict())
    (line,) = (line for line in capsys.readouterr().out.splitlines() if str(run_folder / "last.pth") in line)
    assert "nat_mini" in line


def test_checkpoint_of_another_model_is_refused(tiny, run_folder):
    train.main(tiny(epochs=1))
    with pytest.raises(ValueError, match=r"model_kwargs.*embed_dim"):
        train.main(tiny("--resume", "--model-kwargs", "embed_dim=32"))
    write_checkpoint(run_folder / "bare.pth", read_checkpoint(run_folder / "last.pth")["model"])
    with pytest.raises(ValueError, match=r"bare\.pth .*optimizer.*--initial-checkpoint"):
        train.main(tiny("--resume", run_folder / "bare.pth"))


# ----- errors -----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nat_minni"], "--model nat_minni.*nat_mini"),
        (["--model-kwargs", "wibble=1"], "nat_mini.*wibble"),
        (["--num-classes", "2"], "--num-classes"),
        (["--aa", "wibble"], "--aa wibble"),
        (["--sched", "plateau"], "--sched plateau"),
        (["--opt", "fusedadamw"], "--opt fusedadamw.*apex"),
        (["--sched", "wibble"], "--sched wibble"),
        (["--warmup-epochs", "2"], "--warmup-epochs 2"),
        (["--opt", "adahessian"], "--opt adahessian"),
        (["--opt", "wibble"], "--opt wibble"),
        (["--batch-size", "7", "--mixup", "0.5"], "--batch-size 7"),
        (["--batch-size", "100"], "--batch-size 100"),
        (["--grad-accum", "10"], "--grad-accum 10"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--lr", "1e30", "--clip-grad", "0"], r"Epoch 1/2, update \d/9: loss nan.*--lr"),
    ],
)
def test_errors_name_the_option(tiny, more, message):
    with pytest.raises(ValueError, match=message):
        train.main(tiny(*more))


def test_work_dir_that_cannot_be_created(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"--work-dir {tmp_path / 'file' / 'run'}"):
        train.main(tiny("--work-dir", tmp_path / "file" / "run"))


def test_diverged_run_keeps_its_last_good_checkpoint(tiny, run_folder):
    """Also if no loss is logged during the epoch."""
    train.main(tiny(epochs=1))
    before = (run_folder / "last.pth").read_bytes()
    with pytest.raises(ValueError, match=r"last\.pth.*--lr"):
        train.main(tiny("--resume", "--lr", "1e30", "--clip-grad", "0", "--sched", "none", "--log-interval", "1000"))
    assert (run_folder / "last.pth").read_bytes() == before


def test_model_without_gradient_checkpointing(tiny, monkeypatch):
    monkeypatch.delattr(HierarchicalTransformer, "set_grad_checkpointing")
    with pytest.raises(ValueError, match=r"--grad-checkpointing.*nat_mini"):
        train.main(tiny("--grad-checkpointing"))


def test_out_of_memory_is_a_user_error(tiny, monkeypatch):
    def backward(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(train.Trainer, "backward", backward)
    with pytest.raises(ValueError, match=r"--batch-size .*\(CUDA out of memory\)"):
        train.main(tiny())


def test_disk_too_full_for_tensorboard(tiny, run_folder, monkeypatch, capsys):
    """A tracker that fails does not stop the run."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("flush", "close"):
        monkeypatch.setattr(SummaryWriter, name, full)
    train.main(tiny())
    assert capsys.readouterr().out.count("--log tensorboard failed") == 1
    assert len(rows(run_folder)) == 2


def test_unreadable_images_are_named_or_skipped(tiny, data, run_folder, capsys):
    bad = data / "train" / "blue" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"blue/3\.png.*--skip-bad-images"):
        train.main(tiny())
    train.main(tiny("--skip-bad-images"))
    assert [row["bad_images"] for row in rows(run_folder)] == ["1", "1"]
    assert f"\n  {bad}\n" in capsys.readouterr().out
    bad = data / "val" / "blue" / "3.png"
    bad.write_bytes(b"no image")
    train.main(tiny("--skip-bad-images", "--experiment", "second", epochs=1))
    assert f"\n  {bad}\n" in capsys.readouterr().out


def test_user_errors_are_one_line_and_exit_with_2(tmp_path):
    process = start([str(tmp_path / "nowhere")])
    output, _ = process.communicate()
    assert process.returncode == 2
    assert output.startswith(f"error: {tmp_path / 'nowhere'}")
    assert "Traceback" not in output
    assert output.count("\n") == 1


def test_full_disk_loses_no_checkpoint(tiny, run_folder, monkeypatch):
    train.main(tiny(epochs=1))
    before = (run_folder / "last.pth").read_bytes()
    real = os.open

    def full(path, flags, *mode):
        return real("/dev/full", os.O_WRONLY) if ".last.pth." in str(path) else real(path, flags, *mode)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match=r"last\.pth"):
        train.main(tiny("--resume", epochs=2))
    assert (run_folder / "last.pth").read_bytes() == before
