"""Options from defaults, YAML files and the command line."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import natzoo_commands
from natzoo.classification.factory import create_model
from natzoo.classification.options import make_parser, parse

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yml"))


@pytest.fixture
def config(tmp_path):
    """A function that writes a YAML file and returns its path."""

    def write(text, name="a.yml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_command_line_overrides_the_file_and_the_file_overrides_defaults(config):
    path = config("lr: 1e-4\nepochs: 7\nmodel_ema: true\nscale: [0.5, 1]\naa: none\n")
    args = parse(["data", "-c", path, "--epochs", "9"])
    assert (args.data, args.lr, args.epochs, args.model_ema) == ("data", 1e-4, 9, True)
    assert (args.scale, args.aa, args.weight_decay) == ([0.5, 1.0], "none", 0.05)
    assert parse(["-c", path, "--no-model-ema"]).model_ema is False


def test_base_file(config):
    config("lr: 0.5\nepochs: 7\n", "base.yml")
    args = parse(["-c", config("base: base.yml\nlr: 0.25\n")])
    assert (args.lr, args.epochs) == (0.25, 7)


def test_model_arguments_are_merged_with_the_base(config):
    config("model_kwargs: {depths: [1, 2], embed_dim: 16}\n", "base.yml")
    args = parse(["-c", config("base: base.yml\nmodel_kwargs: {embed_dim: 32}\n")])
    assert args.model_kwargs == {"depths": [1, 2], "embed_dim": 32}


def test_model_arguments_are_merged_with_the_command_line(config):
    path = config("model_kwargs: {depths: [1, 2], embed_dim: 16}\n")
    args = parse(["-c", path, "--model-kwargs", "embed_dim=32", "dilations=[[1],[1,2]]", "name=text"])
    assert args.model_kwargs == {"depths": [1, 2], "embed_dim": 32, "dilations": [[1], [1, 2]], "name": "text"}
    assert parse([]).model_kwargs == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight_decy: 0.1", "'weight_decy'.*'weight_decay'"),
        ("warm_up: 5", "'warm_up'.*'warmup_epochs'"),
        ("config: b.yml", "'config'"),
        ("learning_rate: 1", "'learning_rate'"),
        ("epochs: many", "epochs.*'many'"),
        ("epochs: 1.5", "epochs.*1.5"),
        ("epochs: [1, 2]", r"epochs.*\[1, 2\]"),
        ("model_ema: 3", "model_ema.*3"),
        ("scale: 0.5", "scale.*0.5"),
        ("amp: fp64", "amp.*'fp64'.*none, bf16, fp16"),
        ("model_kwargs: 3", "model_kwargs.*3"),
        ("- lr", ""),
        ("lr: [", ""),
        ("base: a.yml", "base"),
        ("epochs:", "epochs"),
        ("epochs: 0", "epochs.*0"),
        ("resume: true", "resume"),
        ("remode: wibble", "remode.*const, rand, pixel"),
    ],
)
def test_errors_name_the_file_and_the_key(config, text, message):
    with pytest.raises(ValueError, match=rf"a\.yml.*{message}"):
        parse(["-c", config(text)])


def test_missing_files(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yml"):
        parse(["-c", str(tmp_path / "nowhere.yml")])
    with pytest.raises(FileNotFoundError, match=r"base\.yml.*a\.yml"):
        parse(["-c", config("base: base.yml")])


@pytest.mark.parametrize(
    "argv", [["--wibble"], ["--epochs", "x"], ["--grad-accum", "0"], ["--model-kwargs", "depths"], ["--amp", "fp64"]]
)
def test_command_line_errors_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as error:
        parse(argv)
    assert error.value.code == 2
    assert argv[0].lstrip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("--warmup", "--warmup-epochs"), ("--learning-rate=1", "--lr"), ("--bs", "--batch-size"), ("--epoch", "--epochs")],
)
def test_unknown_option_suggests_the_nearest(option, nearest, capsys):
    with pytest.raises(SystemExit) as error:
        parse(["data", option])
    assert error.value.code == 2
    assert re.search(rf"{option.partition('=')[0]} .*{nearest}\b", capsys.readouterr().err)


@pytest.mark.parametrize("option", [["--resume"], ["--model-kwargs", "depths=1"], ["--opt-betas", "0.9"]])
def test_option_that_took_the_data_is_named(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        parse([*option, str(tmp_path)])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert str(tmp_path) in message
    assert f"before {option[0]}" in message
    (tmp_path / "last.pth").touch()
    assert parse(["--resume", str(tmp_path / "last.pth")]).resume == str(tmp_path / "last.pth")


def test_folder_is_not_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is a folder"):
        parse(["-c", str(tmp_path)])


@pytest.mark.parametrize(("missing", "extra"), [("tensorboard", r"\[train\]"), ("natzoo.wibble", "natzoo.wibble")])
def test_missing_module_is_blamed_on_the_extra_that_installs_it(missing, extra, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ImportError, match=extra) as error:
        natzoo_commands._import("natzoo.classification.train", "train")
    assert ("extra" in str(error.value)) == (missing == "tensorboard")


def test_every_option_has_help():
    assert all(action.help for action in make_parser()._actions)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_create_their_models(path):
    args = parse(["-c", str(path)])
    with torch.device("meta"):
        create_model(args.model, {"num_classes": 10, **args.model_kwargs})
