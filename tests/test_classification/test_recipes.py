"""The recipes of the published models have the published settings, and each of them runs."""

from pathlib import Path

import pytest

from natzoo.checkpoints import zoo_entries
from natzoo.classification import train
from natzoo.classification.factory import create_model, create_optimizer
from natzoo.classification.options import parse

FOLDER = Path(__file__).parents[2] / "configs" / "classification"
ZOO = {name: entry.facts for name, entry in zoo_entries().items() if entry.task == "classification"}
TRAINED = [name for name in ZOO if "_21k" not in name]

# The published training of all models, unless the table below says otherwise.
ALWAYS = {
    **{"opt": "adamw", "clip_grad": 5.0, "momentum": 0.9, "grad_accum": 1, "layer_decay": None, "lr_base_size": None},
    **{"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "hflip": 0.5, "vflip": 0.0, "color_jitter": 0.4},
    **{"aa": "rand-m9-mstd0.5-inc1", "train_interpolation": "random", "reprob": 0.25, "remode": "pixel", "recount": 1},
    **{"smoothing": 0.1, "mixup_switch_prob": 0.5, "seed": 42, "bce_loss": False, "drop_path": None},
    "decay_rpb": True,  # the published code never read its list of parameters without weight decay
}
SCRATCH = {
    **{"lr": 1e-3, "warmup_lr": 1e-6, "min_lr": 5e-6, "epochs": 300, "cooldown_epochs": 10, "warmup_epochs": 20},
    **{"amp": "fp16", "batch_size": 128, "sched": "cosine", "weight_decay": 0.05, "img_size": 224, "crop_pct": 0.875},
    **{"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "model_ema": False, "initial_checkpoint": None},
}
AVERAGE = {**SCRATCH, "warmup_epochs": 50, "model_ema": True, "model_ema_decay": 0.9998}
FINETUNE = {
    **{"lr": 5e-5, "epochs": 30, "cooldown_epochs": 0, "warmup_epochs": 0, "amp": "none", "batch_size": 64},
    **{"sched": "none", "weight_decay": 1e-4, "img_size": 224, "crop_pct": 0.875, "model_ema": False},
    **{"mixup": 0.0, "cutmix": 0.0, "mixup_prob": 0.0},
}
FINETUNE_384 = {**FINETUNE, "img_size": 384, "crop_pct": 1.0}
PUBLISHED = {
    **dict.fromkeys(TRAINED, SCRATCH),
    **dict.fromkeys(("nat_isotropic_base", "dinat_isotropic_base", "vitrpb_base"), AVERAGE),
    "dinat_large": {**FINETUNE, "initial_checkpoint": "dinat_large_21k"},
    "dinat_s_large": {**FINETUNE, "initial_checkpoint": "dinat_s_large_21k"},
    "dinat_large_384": {**FINETUNE_384, "weight_decay": 1e-10, "initial_checkpoint": "dinat_large_21k"},
    "dinat_s_large_384": {**FINETUNE_384, "weight_decay": 1e-5, "initial_checkpoint": "dinat_s_large_21k"},
    "dinat_large_384_11x11": {**FINETUNE_384, "weight_decay": 1e-10, "initial_checkpoint": "dinat_large_21k_11x11"},
}


def recipe(name, *more):
    return parse(["-c", str(FOLDER / f"{name}.yml"), *more])


def test_every_trained_model_has_a_recipe():
    assert len(TRAINED) == 22
    assert {path.stem for path in FOLDER.glob("*.yml")} >= set(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_recipes_have_the_published_settings(name):
    args = recipe(name)
    assert args.model == name
    assert args.model_kwargs == {}
    for key, value in {**ALWAYS, **PUBLISHED[name]}.items():
        assert getattr(args, key) == value, key
    assert args.img_size == ZOO[name].get("size", 224)
    comment = (FOLDER / f"{name}.yml").read_text().splitlines()[0]
    assert f"{ZOO[name]['top1']}% top-1" in comment
    assert f"{ZOO[name]['params']}M parameters, {ZOO[name]['macs']} GMACs" in comment


# ----- runs -----


def reduced(name):
    """Return options for a small model of the same family, for small images."""
    if "isotropic" in name or name.startswith("vitrpb"):
        kwargs = ["depth=2", "num_heads=1", "embed_dim=32", "img_size=32"]
    else:
        kwargs = ["depths=(1,1)", "num_heads=(1,2)", "embed_dim=32"]
    if name.startswith("dinat"):
        kwargs.append("dilations=(1,2)" if "isotropic" in name else "dilations=((2,),(1,))")
    return ["--model-kwargs", *kwargs, "--img-size", "32"]


@pytest.mark.parametrize("name", TRAINED)
def test_recipes_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--batch-size", "4"]
    synthetic = ["--synthetic", "12", "--num-classes", "5", "--workers", "0", "--device", "cpu", "--threads", "1"]
    options = ["-c", str(FOLDER / f"{name}.yml"), *reduced(name), *short, *synthetic, "--initial-checkpoint", ""]
    train.main(options)
    output = capsys.readouterr().out
    assert "Epoch 1/1" in output
    assert "skipped" not in output
    assert (tmp_path / "output" / name / "best.pth").exists()


def test_optimizer_decays_the_same_parameters_as_the_published_one():
    args = recipe("nat_mini")
    model = create_model(args.model, recipe("nat_mini", *reduced("nat_mini")).model_kwargs)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for wanted, decay_rpb in ((0.05, True), (0.0, False)):
        args.decay_rpb = decay_rpb
        optimizer = create_optimizer(args, model, 1024)
        decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decay["levels.0.blocks.0.attn.rpb"] == wanted
        assert decay["levels.0.blocks.0.attn.qkv.weight"] == 0.05
        assert decay["levels.0.blocks.0.attn.qkv.bias"] == decay["norm.weight"] == 0.0
        assert {(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups} == {
            (1e-3, (0.9, 0.999), 1e-8)
        }
