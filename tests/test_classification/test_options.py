"""Options from defaults, YAML files and the command line."""

import importlib
import os
import re
from pathlib import Path

import pytest
import torch
from mutations import limited

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
        ("num_heads: 3", "num_heads.*model_kwargs"),
    ],
)
def test_errors_name_the_file_and_the_key(config, text, message):
    with pytest.raises(ValueError, match=rf"a\.yml.*{message}"):
        parse(["-c", config(text)])


@pytest.mark.parametrize(
    "text",
    [
        "model_kwargs: &a [*a]",
        "\n".join([f"a0: &a0 {'x' * 50}", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]),
        "\n".join(
            ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12))]
        ),
        "model_kwargs: " + "[" * 100_000,
        "model_kwargs: " + "{a: " * 5000 + "1" + "}" * 5000,
        "lr: !!int " + "9" * 10_000,
        "lr: !!python/object/apply:os.system [touch OWNED]",
        "lr: !!timestamp 2001-13-45",
        "lr: !!int ''",
        "lr: !!bool x",
        "? [1, 2]\n: 3",
        "lr: 1\n---\nlr: 2",
        "a\0b: 1",
        "lr: \x1b[31m",
        "3: 4",
        "x" * 2**21,
        "x: " + "y" * 10**6,
    ],
    ids=range(17),
)
def test_recipes_cannot_run_code_or_exhaust_memory(config, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with limited(), pytest.raises(ValueError, match=r"a\.yml") as error:
        parse(["-c", config(text)])
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "OWNED").exists()


def test_recipe_with_a_byte_order_mark_and_an_alias(config):
    path = config("\ufeffopt_betas: &pair [0.5, 0.9]\nscale: *pair\n")
    assert parse(["-c", path]).scale == parse(["-c", path]).opt_betas == [0.5, 0.9]


@pytest.mark.parametrize(
    "base", ["/etc/passwd", "../a.yml", "x/../../a.yml", "~/a.yml", "https://x/a.yml", "[1]", "''"]
)
def test_base_is_a_file_in_the_folder(config, base):
    with pytest.raises(ValueError, match=r"a\.yml.*base"):
        parse(["-c", config(f"base: {base}")])


def test_recipes_that_are_not_text(config, tmp_path):
    (tmp_path / "b.yml").write_bytes(b"lr: \xff\xfe")
    with pytest.raises(ValueError, match=r"b\.yml"):
        parse(["-c", str(tmp_path / "b.yml")])
    os.mkfifo(tmp_path / "fifo.yml")
    for path in (tmp_path / "fifo.yml", Path("/dev/zero")):
        with limited(), pytest.raises(FileNotFoundError, match=str(path)):
            parse(["-c", str(path)])
    with pytest.raises(FileNotFoundError, match=r"fifo\.yml.*a\.yml"):
        parse(["-c", config("base: fifo.yml")])


def test_chains_of_bases(config):
    config("lr: 0.25\n", "0.yml")
    for number in range(1, 2001):
        path = config(f"base: {number - 1}.yml\n", f"{number}.yml")
        if number == 10:
            assert parse(["-c", path]).lr == 0.25
    with limited(), pytest.raises(ValueError, match=r"2000\.yml"):
        parse(["-c", path])


def test_base_with_model_arguments_of_another_type(config):
    config("model_kwargs: 3\n", "base.yml")
    assert parse(["-c", config("base: base.yml\nmodel_kwargs: {depths: [1]}\n")]).model_kwargs == {"depths": [1]}


@pytest.mark.parametrize(
    "key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained", "cache_dir"]
)
def test_model_arguments_cannot_name_files(config, key, capsys):
    with pytest.raises(ValueError, match=rf"a\.yml.*{key}.*--initial-checkpoint"):
        parse(["-c", config(f"model_kwargs: {{{key}: x.pth}}")])
    with pytest.raises(SystemExit):
        parse(["--model-kwargs", f"{key}=x.pth"])
    assert key in capsys.readouterr().err


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


RANGES = [  # option, values outside its range, values inside
    ("--threads", "-1 0 100000 1.5 x", "1 1024"),
    ("--workers", "-1 5000 1e3", "0 128"),
    ("--img-size", "0 -5 100000", "8 4096"),
    ("--in-chans", "0 -3 x", "1 3"),
    ("--grad-accum", "0 -1", "1"),
    ("--batch-size", "0 1000000", "1"),
    ("--val-batch-size", "0", "1"),
    ("--epochs", "0 -1 1e3 " + "9" * 4000, "1"),
    ("--warmup-epochs", "-1", "0"),
    ("--num-classes", "0 -1 1000000000", "1 21841"),
    ("--synthetic", "0 1000000000000", "1"),
    ("--drop-path", "-0.1 1.1 nan inf x", "0 1"),
    ("--lr", "-1 nan inf", "0 1e-8"),
    ("--weight-decay", "-1 nan", "0"),
    ("--momentum", "-0.5 2", "0.9"),
    ("--opt-betas", "1.5 -1", "0.9"),
    ("--layer-decay", "-1 1.5", "0.75"),
    ("--clip-grad", "-1 nan", "0"),
    ("--crop-pct", "0 1e-9 1.5 nan", "0.875 1"),
    ("--smoothing", "-0.1 2", "0.1"),
    ("--reprob", "-0.1 2", "0.25"),
    ("--hflip", "-1 3", "0.5"),
    ("--mixup", "-0.1 nan", "0 0.8"),
    ("--mixup-prob", "7", "1"),
    ("--recount", "0 100000", "1"),
    ("--model-ema-decay", "-1 1.5", "0.9998"),
    ("--bce-target-thresh", "-1 2", "0.2"),
    ("--seed", "-1 1e9 100000000000000000000", "0 42"),
    ("--log-interval", "0", "1"),
    ("--keep-last", "-1", "0"),
    ("--skip-nonfinite", "-1", "0"),
]


@pytest.mark.parametrize(("option", "outside", "inside"), RANGES, ids=[option for option, *_ in RANGES])
def test_ranges(option, outside, inside, config, capsys):
    key = option[2:].replace("-", "_")
    for value in outside.split():
        with pytest.raises(SystemExit) as error:
            parse([f"{option}={value}"])
        assert error.value.code == 2
        message = capsys.readouterr().err
        assert option in message and re.search(r" (from|above) .* to ", message) and len(message) < 200
        with pytest.raises(ValueError, match=rf"a\.yml has {key} "):
            parse(["-c", config(f"{key}: {[value] if option == '--opt-betas' else value}")])
    for value in inside.split():
        found = getattr(parse([f"{option}={value}"]), key)
        assert (found[0] if isinstance(found, list) else found) == float(value)


def test_ranges_of_pairs(config):
    for option, values in (("--scale", "0 1"), ("--scale", "0.5 2"), ("--ratio", "0 1"), ("--ratio", "nan 1")):
        with pytest.raises(SystemExit):
            parse([option, *values.split()])
    for option in ("--scale", "--ratio"):
        with pytest.raises(SystemExit):
            parse([option, "0.9", "0.5"])
        with pytest.raises(ValueError, match=rf"a\.yml has {option[2:]} "):
            parse(["-c", config(f"{option[2:]}: [0.9, 0.5]")])
    with pytest.raises(SystemExit):
        parse(["--std", "1", "0", "1"])
    with pytest.raises(SystemExit):
        parse(["--input-size", "3", "32", "0"])
    assert parse(["--scale", "0.5", "0.5"]).scale == [0.5, 0.5]


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
