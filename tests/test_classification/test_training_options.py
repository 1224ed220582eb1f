"""Options of training: parts that are frozen, distillation, clipping, schedules, batches and trackers."""

import csv
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from timm.scheduler import create_scheduler_v2

from natzoo.checkpoints import read_checkpoint, write_checkpoint
from natzoo.classification import train, validate
from natzoo.classification.data.batches import Normalize, TrainingBatches
from natzoo.classification.data.loader import SeededBatchSampler
from natzoo.classification.data.transforms import evaluation_transform
from natzoo.classification.distributed import World
from natzoo.classification.factory import create_loss, create_scheduler
from natzoo.classification.freezing import train_mode

CPU = torch.device("cpu")


def changed(trainer):
    """Run a trainer and return the names of the parameters that changed."""
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.run()
    return {name for name, value in trainer.model.named_parameters() if not value.equal(before[name])}


# ----- parts of a model -----


def test_frozen_stages_do_not_change(tiny):
    trainer = train.Trainer(train.parse(tiny("--freeze", 1, "--drop-path", 0.5, epochs=1)))
    names = changed(trainer)
    assert names and not any(name.startswith(("patch_embed", "levels.0")) for name in names)
    assert {"norm.weight", "head.weight"} <= names and any(name.startswith("levels.1") for name in names)
    train_mode(trainer.model)
    assert not trainer.model.levels[0].training and trainer.model.levels[1].training  # no drop path in frozen parts


def test_linear_probe_trains_the_classifier_only(tiny):
    assert changed(train.Trainer(train.parse(tiny("--linear-probe", epochs=1)))) == {"head.weight", "head.bias"}


def test_more_frozen_stages_than_the_model_has(tiny):
    with pytest.raises(ValueError, match="--freeze 9"):
        train.Trainer(train.parse(tiny("--freeze", 9)))


def test_sync_batch_norm_requires_gpus(tiny):
    with pytest.raises(ValueError, match="--sync-bn"):
        train.Trainer(train.parse(tiny("--sync-bn")))


# ----- losses -----


def test_balanced_class_weights(tiny, data):
    for index in range(12):
        (data / "train" / "blue" / f"{index}.png").unlink()
    trainer = train.Trainer(train.parse(tiny("--class-weights", "balanced")))
    # images / (classes * images of the class)
    assert trainer.criterion.weight.tolist() == pytest.approx([60 / (3 * 24), 60 / (3 * 12), 60 / (3 * 24)])
    with pytest.raises(ValueError, match="--class-weights"):
        create_loss(train.parse(tiny("--class-weights", 1, 2)), 3)


@pytest.mark.parametrize("more", [["--mixup", 0.8], ["--bce-loss"], ["--bce-loss", "--mixup", 0.8], []])
def test_class_weights_scale_the_loss(tiny, more):
    """A weight of 2 for all classes doubles the loss, except for hard targets, whose mean is weighted."""
    losses = []
    for weight in (1, 2):
        mixup, loss = create_loss(train.parse(tiny(*more, "--class-weights", weight, weight, weight)), 3)
        target = torch.tensor([0, 2])
        if mixup is not None:
            target = torch.nn.functional.one_hot(target, 3) * 0.7 + 0.1
        losses.append(loss(torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]]), target).item())
    assert losses[1] == pytest.approx(losses[0] * (2 if more else 1))


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_distillation_from_itself_has_no_loss(tiny, run_folder, kind, monkeypatch):
    train.main(tiny(epochs=1))
    teacher = run_folder / "best.pth"
    more = ["--teacher", teacher, "--initial-checkpoint", teacher, "--distill", kind, "--task-weight", 0, "--lr", 0]
    more += ["--drop-path", 0]
    options = train.parse(tiny(*more, "--min-lr", 0, "--warmup-lr", 0, "--experiment", "student", epochs=1))
    losses = []
    monkeypatch.setattr(train.EpochMeters, "update", lambda self, loss, norm: losses.append(loss))
    train.Trainer(options).run()
    assert max(losses) == pytest.approx(0, abs=1e-6)


def test_feature_distillation_with_a_projection_resumes(tiny, run_folder, tmp_path, stop_after):
    """The teacher is wider than the student, so a projection is trained and saved."""
    wide = ["--model-kwargs", "embed_dim=32", "--experiment", "teacher"]
    train.main(tiny(*wide, epochs=1))
    more = ["--teacher", tmp_path / "output" / "teacher" / "best.pth", "--distill", "feature"]
    train.main(tiny(*more, "--experiment", "whole"))
    stop_after(4, tiny(*more))
    train.main(tiny(*more, "--resume"))
    whole, resumed = (read_checkpoint(folder / "last.pth") for folder in (tmp_path / "output" / "whole", run_folder))
    assert list(whole["distillation"]["projection"]) == ["weight", "bias"]
    for part in ("model", "optimizer", "distillation"):
        torch.testing.assert_close(whole[part], resumed[part], rtol=0, atol=0)
    resumed.pop("distillation")
    write_checkpoint(run_folder / "last.pth", resumed)
    with pytest.raises(ValueError, match="projection"):
        train.main(tiny(*more, "--resume", epochs=3))


def test_teacher_for_other_classes(tiny, run_folder, data):
    train.main(tiny(epochs=1))
    (data / "train" / "blue").rename(data / "train" / "azure")
    (data / "val" / "blue").rename(data / "val" / "azure")
    with pytest.raises(ValueError, match="--teacher"):
        train.main(tiny("--teacher", run_folder / "best.pth", "--experiment", "student"))


# ----- gradients and schedules -----


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clip_modes(tiny, mode):
    trainer = train.Trainer(train.parse(tiny("--clip-grad", 0.01, "--clip-mode", mode)))
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    head = trainer.model.head.weight.grad.clone()
    norm = trainer.clip_gradients()
    gradients = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    assert norm == pytest.approx(len(gradients) ** 0.5, rel=0.05)  # before clipping
    if mode == "norm":
        assert gradients.norm().item() == pytest.approx(0.01, rel=1e-3)
    elif mode == "value":
        assert gradients.abs().max().item() == pytest.approx(0.01)
    else:
        weight = trainer.model.levels[0].blocks[0].mlp.fc1.weight
        limit = 0.01 * weight.norm(dim=1).clamp(min=1e-3)
        torch.testing.assert_close(weight.grad.norm(dim=1), limit, rtol=1e-3, atol=1e-6)
        assert head.equal(trainer.model.head.weight.grad)


def test_cycles_and_noise_are_those_of_timm(tiny):
    more = ["--lr-cycle-limit", 2, "--lr-cycle-decay", 0.5, "--lr-noise", 0.5, "--lr-noise-std", 0.1, "--seed", 7]
    args = train.parse(tiny(*more, "--lr-k-decay", 2, epochs=4))
    rates = []
    for own in (True, False):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
        if own:
            scheduler, epochs = create_scheduler(args, optimizer, 10)
            assert epochs == 8
        else:
            options = {"min_lr": args.min_lr, "warmup_lr": args.warmup_lr, "noise": [0.5], "noise_std": 0.1}
            options |= {"noise_seed": 7, "cycle_limit": 2, "cycle_decay": 0.5, "k_decay": 2.0}
            options |= {"step_on_epochs": False, "updates_per_epoch": 10}
            scheduler, _ = create_scheduler_v2(optimizer, "cosine", 4, **options)
        found = []
        for update in range(80):
            scheduler.step_update(update)
            found.append(optimizer.param_groups[0]["lr"])
        rates.append(found)
    assert rates[0] == rates[1]
    assert rates[0][40] == pytest.approx(args.lr / 2, rel=0.4)  # the second cycle, with noise


def test_early_stop(tiny, run_folder, capsys):
    more = ["--early-stop", 1, "--lr", 0, "--min-lr", 0, "--warmup-lr", 0]
    train.main(tiny(*more, epochs=9))
    assert len((run_folder / "summary.csv").read_text().splitlines()) == 1 + 2
    assert "in 1 epoch." in capsys.readouterr().out


# ----- batches -----


def test_batches_are_uint8_and_normalized_on_the_device(tiny, data):
    trainer = train.Trainer(train.parse(tiny("--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.3, 0.4)))
    config = trainer.record["preprocessing"]
    for batch in (next(iter(trainer.val_loader))[0], next(trainer.batches())[0]):
        assert batch.dtype == torch.uint8
    image = Image.open(data / "val" / "amber" / "0.png")
    expected = evaluation_transform(config)(image)
    found = Normalize(config, CPU)(evaluation_transform(config, normalize=False)(image)[None])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_images_grow(tiny):
    args = train.parse(tiny("--img-size", 64, "--img-size-start", 32, "--img-size-epochs", 4, epochs=6))
    batches = TrainingBatches(args, {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}, CPU)
    assert [batches.size_of(epoch)[0] for epoch in range(6)] == [32, 40, 48, 56, 64, 64]
    assert batches(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), epoch=1).shape == (2, 3, 40, 40)
    train.main(tiny("--img-size-start", 8, "--img-size-epochs", 1, epochs=2))
    with pytest.raises(ValueError, match="--img-size-start 99"):
        train.main(tiny("--img-size-start", 99, "--experiment", "other"))


def test_repeated_augmentation():
    sampler = SeededBatchSampler(30, 4, seed=1, world=World(), repeats=3)
    batches = list(sampler)
    keys = [key for batch in batches for key in batch]
    assert len(batches) == 7 and len(set(keys)) == 28
    images = [index for _, index, _ in keys]
    assert all(len(set(images[start : start + 3])) == 1 for start in range(0, 27, 3))
    assert [view for _, _, view in keys[:6]] == [0, 1, 2, 0, 1, 2]
    sampler.epoch = 1
    assert [key[1] for batch in sampler for key in batch] != images
    sampler.epoch, sampler.first = 0, 3
    assert list(sampler) == batches[3:]  # as in a resumed run


def test_views_of_an_image_differ(tiny, data):
    trainer = train.Trainer(train.parse(tiny("--aug-repeats", 4, "--scale", 0.2, 0.9)))
    x_BCHW, target_B = next(trainer.batches())
    assert len(set(target_B[:4].tolist())) == 1
    assert len({x_CHW.numpy().tobytes() for x_CHW in x_BCHW[:4]}) == 4


# ----- torch.compile, trackers -----


def test_mode_of_torch_compile(tiny, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: (modes.append(mode), model)[1])
    train.Trainer(train.parse(tiny("--torchcompile", "max-autotune")))
    train.Trainer(train.parse(tiny("--compile")))
    assert modes == ["max-autotune", None]


class Recorder(types.ModuleType):
    """A package with the interface of wandb and trackio."""

    def __init__(self, name, fails_in=""):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)
        self.calls, self.fails_in = [], fails_in

    def __getattr__(self, name):
        if name not in ("init", "log", "finish"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            if name == self.fails_in:
                raise RuntimeError("no network")
            self.calls.append((name, args, kwargs))
            return types.SimpleNamespace(id="abc") if name == "init" else None

        return call


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tracker_receives_the_metrics(tiny, monkeypatch, name):
    package = Recorder(name)
    monkeypatch.setitem(sys.modules, name, package)
    train.main(tiny("--log", "tensorboard", name, epochs=1))
    (_, _, start), *logs, end = package.calls
    assert start["name"] == "tiny" and start["config"]["lr"] == 2e-3 and end[0] == "finish"
    steps = [kwargs["step"] for _, _, kwargs in logs]
    assert steps == [*range(9), 8]
    assert {"train/loss", "train/lr", "train/images_per_s"} <= logs[0][1][0].keys()
    assert {"val/top1", "val/loss", "train/epoch_loss"} <= logs[-1][1][0].keys()


def test_a_resumed_run_continues_that_of_the_tracker(tiny, monkeypatch):
    package = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", package)
    train.main(tiny("--log", "wandb", epochs=1))
    train.main(tiny("--log", "wandb", "--resume", epochs=2))
    first, second = (kwargs for name, _, kwargs in package.calls if name == "init")
    assert (first["id"], second["id"], second["resume"]) == (None, "abc", "allow")


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_failing_tracker_does_not_stop_the_run(tiny, run_folder, monkeypatch, capsys, where):
    package = Recorder("wandb", fails_in=where)
    monkeypatch.setitem(sys.modules, "wandb", package)
    train.main(tiny("--log", "wandb", epochs=2))
    assert capsys.readouterr().out.count("--log wandb") == 1
    assert len((run_folder / "summary.csv").read_text().splitlines()) == 1 + 2


def test_tracker_that_is_not_installed(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="package trackio"):
        train.main(tiny("--log", "trackio"))


def test_counts_per_class_and_confusion(tiny, data, run_folder, tmp_path):
    train.main(tiny(epochs=1))
    table, picture = tmp_path / "classes.csv", tmp_path / "confusion.png"
    more = ["--per-class", str(table), "--confusion", str(picture), "--workers", "0", "--batch-size", "5"]
    result = validate.main([str(data), "--checkpoint", str(run_folder / "best.pth"), *more])
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["amber", "blue", "crimson"]
    assert [int(row["images"]) for row in rows] == [9, 9, 9]
    assert sum(int(row["correct"]) for row in rows) == round(result["top1"] * 27 / 100)
    assert np.asarray(Image.open(picture)).std() > 10
