"""Defaults, YAML files and the command line, in that order."""

from pathlib import Path

import pytest
import torch

from natzoo.classification.factory import create_model
from natzoo.classification.options import make_parser, parse

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yml"))


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and returns its path."""

    def write(text, name="a.yml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_the_command_line_goes_over_the_file_and_the_file_over_defaults(config):
    path = config("lr: 1e-4\nepochs: 7\nmodel_ema: true\nscale: [0.5, 1]\naa: none\n")
    args = parse(["data", "-c", path, "--epochs", "9"])
    assert (args.data, args.lr, args.epochs, args.model_ema) == ("data", 1e-4, 9, True)
    assert (args.scale, args.aa, args.weight_decay) == ([0.5, 1.0], "none", 0.05)
    assert parse(["-c", path, "--no-model-ema"]).model_ema is False


def test_a_file_can_be_based_on_another(config):
    config("lr: 0.5\nepochs: 7\n", "base.yml")
    args = parse(["-c", config("base: base.yml\nlr: 0.25\n")])
    assert (args.lr, args.epochs) == (0.25, 7)


def test_model_arguments_are_merged_over_the_base(config):
    config("model_kwargs: {depths: [1, 2], embed_dim: 16}\n", "base.yml")
    args = parse(["-c", config("base: base.yml\nmodel_kwargs: {embed_dim: 32}\n")])
    assert args.model_kwargs == {"depths": [1, 2], "embed_dim": 32}


def test_model_arguments_are_merged(config):
    path = config("model_kwargs: {depths: [1, 2], embed_dim: 16}\n")
    args = parse(["-c", path, "--model-kwargs", "embed_dim=32", "dilations=[[1],[1,2]]", "name=text"])
    assert args.model_kwargs == {"depths": [1, 2], "embed_dim": 32, "dilations": [[1], [1, 2]], "name": "text"}
    assert parse([]).model_kwargs == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight_decy: 0.1", r"a\.yml has the unknown key 'weight_decy': did you mean 'weight_decay'\?"),
        ("config: b.yml", "unknown key 'config'"),
        ("learning_rate: 1", "unknown key 'learning_rate': train.py --help lists all keys"),
        ("epochs: many", "gives epochs the value 'many'"),
        ("epochs: 1.5", "gives epochs the value 1.5"),
        ("epochs: [1, 2]", r"gives epochs the value \[1, 2\]: it must be one value"),
        ("model_ema: 3", "gives model_ema the value 3: it must be true or false"),
        ("scale: 0.5", "gives scale the value 0.5: it must be a list of 2 numbers"),
        ("amp: fp64", "gives amp the value 'fp64': it must be one of none, bf16, fp16"),
        ("model_kwargs: 3", "gives model_kwargs the value 3"),
        ("- lr", "must hold lines `key: value`, but holds a list"),
        ("lr: [", "is not valid YAML"),
        ("base: a.yml", r"a\.yml is its own base"),
        ("epochs:", "gives epochs the value None: it must have a value"),
        ("epochs: 0", "gives epochs the value 0: it must be at least 1"),
        ("resume: true", "gives resume the value True: it belongs on the command line"),
        ("remode: wibble", "it must be one of const, rand, pixel"),
    ],
)
def test_mistakes_in_a_file_are_named(config, text, message):
    with pytest.raises(ValueError, match=message):
        parse(["-c", config(text)])


def test_missing_files(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config .*nowhere\.yml"):
        parse(["-c", str(tmp_path / "nowhere.yml")])
    with pytest.raises(FileNotFoundError, match=r"no config .*base\.yml: .* that .*a\.yml names as its base"):
        parse(["-c", config("base: base.yml")])


@pytest.mark.parametrize(
    "argv", [["--wibble"], ["--epochs", "x"], ["--grad-accum", "0"], ["--model-kwargs", "depths"], ["--amp", "fp64"]]
)
def test_mistakes_on_the_command_line_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as error:
        parse(argv)
    assert error.value.code == 2
    assert argv[0].lstrip("-") in capsys.readouterr().err


def test_every_option_has_help():
    assert all(action.help for action in make_parser()._actions)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_read_and_their_models_built(path):
    args = parse(["-c", str(path)])
    with torch.device("meta"):
        create_model(args.model, {"num_classes": 10, **args.model_kwargs})
