"""tools/export.py: every format compares well, takes what it promises, and fails in one sentence."""

from __future__ import annotations

import importlib.util
import re

import export
import numpy as np
import pytest
import torch
from exporting import formats, measure
from exporting.formats import Shapes
from PIL import Image
from small_models import SMALL, small

from natzoo.checkpoints import write_checkpoint

SHAPES = Shapes(3, 32, 32)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of train.py for a small DiNAT with two classes, and a folder of images to evaluate it on."""
    kwargs = {**SMALL["dinat_mini"], "num_classes": 2}
    record = {
        "model": "dinat_mini",
        "model_kwargs": {name: value for name, value in kwargs.items() if name != "num_classes"},
        "num_classes": 2,
        "classes": ["black", "white"],
        "preprocessing": {"input_size": [3, 32, 32], "crop_pct": 1.0},
    }
    write_checkpoint(
        tmp_path / "best.pth", {"model": small("dinat_mini", num_classes=2).state_dict(), "record": record}
    )
    for name, color in (("black", 0), ("white", 255)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 40), (color,) * 3).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.mark.parametrize(
    "kind",
    ["onnx", "torch-export", "torchscript", pytest.param("openvino", marks=[needs("openvino"), pytest.mark.slow])],
)
def test_formats(kind, checkpoint, capsys):
    """The command writes a program that loads again and agrees with the model for any batch size."""
    images = str(checkpoint / "images")
    words = ["--format", kind, "--out", str(checkpoint / f"program{formats.FORMATS[kind]}"), "--images", images]
    export.main([str(checkpoint / "best.pth"), *words, "--rounds", "1", "--evaluate", images])
    out = capsys.readouterr().out
    assert "random, batch 3" in out and "6 images" in out
    (eager,), (program,) = (re.findall(rf"^{name} .* (\S+)%$", out, re.M) for name in ("eager", kind))
    assert eager == program
    loaded = formats.load(kind, checkpoint / f"program{formats.FORMATS[kind]}", 1)
    x = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    assert loaded(x).shape == (5, 2)
    assert not list(checkpoint.glob(".*"))  # no temporary files


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch-export", pytest.param("openvino", marks=needs("openvino"))])
@pytest.mark.parametrize("name", SMALL)
def test_any_size(name, kind, tmp_path):
    if name == "vitrpb_small":
        pytest.skip("full attention has a fixed size")
    model, path = small(name).requires_grad_(False), tmp_path / f"program{formats.FORMATS[kind]}"
    shapes = SHAPES._replace(height=48, width=48, least=32, most=96)
    formats.write(model, kind, path, shapes)
    lines = list(measure.compare(model, formats.load(kind, path, 1), shapes, None))
    assert len(lines) == 4


@pytest.mark.slow
def test_int8(checkpoint, capsys):
    """Quantized weights are a quarter of the size, and the classes of most images stay the same."""
    model = small("nat_mini", embed_dim=64, num_heads=(2, 4)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(0.1)
    formats.write(model, "onnx", checkpoint / "float.onnx", SHAPES)
    x = SHAPES.example(16).numpy()
    formats.quantize(checkpoint / "float.onnx", checkpoint / "int8.onnx", x)
    assert (checkpoint / "int8.onnx").stat().st_size < 0.6 * (checkpoint / "float.onnx").stat().st_size
    expected, found = (formats.load("onnx", checkpoint / f"{name}.onnx", 1)(x) for name in ("float", "int8"))
    assert not np.array_equal(expected, found)
    assert np.corrcoef(expected.flatten(), found.flatten())[0, 1] > 0.95


def test_a_wrong_program_is_noticed():
    model = small("nat_mini").requires_grad_(False)
    with pytest.raises(ValueError, match="differs"):
        list(measure.compare(model, lambda x: model(torch.from_numpy(x)).numpy() * 1.01, SHAPES, None))


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="openvino"):
        formats.require("openvino")


@pytest.mark.parametrize(
    "words",
    [["--int8", "x", "--format", "openvino"], ["--dynamic-size", "32", "64", "--format", "torchscript"]],
)
def test_refusals(words, tmp_path):
    if words[0] == "--int8":
        words = ["--int8", str(tmp_path), *words[2:]]
    with pytest.raises(ValueError, match=words[0]):
        export.main(["nat_mini", *words])


def test_folders_and_suffixes_are_checked_first(tmp_path):
    with pytest.raises(ValueError, match=r"--out model\.pt must end with \.onnx"):
        export.main(["no_such_model", "--out", "model.pt"])
    for option in ("--images", "--int8", "--evaluate"):
        with pytest.raises(FileNotFoundError, match=f"{option} {tmp_path}"):
            export.main(["no_such_model", option, str(tmp_path / "nowhere")])
