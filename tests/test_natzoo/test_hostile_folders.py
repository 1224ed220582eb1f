"""Folders in Hugging Face form with invalid or hostile JSON files: one sentence, and no code from them is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutations import check_reader, damaged_bytes, damaged_values, limited
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification

import natzoo.hf as hf
from natzoo.classification.inference import read_with_record, restore
from natzoo.hf.folders import read_record, save_folder
from natzoo.models import NAT, DiNAT

PROJECT = Path(__file__).parents[2]
CODE = "from pathlib import Path\nPath('OWNED').touch()\nclass Config: pass\nclass Processor: pass\nclass Model: pass\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DiNAT(depths=(2, 1), num_heads=(1, 2), embed_dim=16, dilations=([1, 2], [1]), kernel_size=3, num_classes=3)
    model.pretrained_cfg = {
        "input_size": (3, 32, 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    save_folder(model.eval(), tmp_path / "folder", ["cat", "dog", "bird"])
    return tmp_path / "folder"


def change(path: Path, **values) -> None:
    """Change entries of a JSON file; ... removes one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def test_valid_folder(folder):
    record = read_record(folder)
    assert record["classes"] == ["cat", "dog", "bird"] and record["num_classes"] == 3
    assert record["preprocessing"]["input_size"] == [3, 32, 32]
    assert record["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert record["preprocessing"]["interpolation"] == "bicubic"
    model, _ = restore(str(folder))
    again = AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), again(x).logits)


CONFIGS = {
    "labels with gaps": {"id2label": {"0": "a", "2": "b", "3": "c"}},
    "labels that begin at 1": {"id2label": {"1": "a", "2": "b", "3": "c"}},
    "labels as a list": {"id2label": ["a", "b", "c"]},
    "labels that are numbers": {"id2label": {"0": 1, "1": 2, "2": 3}},
    "labels with other keys": {"id2label": {"a": "0", "b": "1"}},
    "labels with long keys": {"id2label": {"9" * 5000: "0"}},
    "negative number of labels": {"id2label": ..., "num_labels": -3},
    "many labels": {"id2label": ..., "num_labels": 10**9},
    "fractional number of labels": {"id2label": ..., "num_labels": 2.5},
    "depths of null": {"depths": None},
    "depths as text": {"depths": "34"},
    "depths of texts": {"depths": ["3", "4"]},
    "no depths": {"depths": []},
    "large depths": {"depths": [10**9, 1]},
    "depths that are together too large": {"depths": [600, 600]},
    "negative depth": {"depths": [-1, 1]},
    "heads of another number": {"num_heads": [1]},
    "heads that do not divide the channels": {"num_heads": [3, 2]},
    "heads of text": {"num_heads": "12"},
    "dilations that are large": {"dilations": [[1, 5 * 10**9], [1]]},
    "dilations of text": {"dilations": ["12", "1"]},
    "dilations of zero": {"dilations": [[0, 1], [1]]},
    "dilations as numbers": {"dilations": [1, 2]},
    "kernel size as text": {"kernel_size": "3"},
    "large kernel size": {"kernel_size": 10**6},
    "large width": {"embed_dim": 10**9},
    "width as a float": {"embed_dim": 16.5},
    "image size of a million": {"image_size": 10**6},
    "nested image size": {"image_size": [[32, 32]]},
    "dtype that does not exist": {"dtype": "float7"},
    "dtype that is a function": {"dtype": "load"},
    "dtype that is an expression": {"dtype": "os.system"},
    "dtype that is a number": {"dtype": 32},
    "old dtype that does not exist": {"dtype": ..., "torch_dtype": "wibble"},
    "unknown layout": {"layout": "wibble"},
    "layout as a list": {"layout": ["nat"]},
    "unknown activation": {"hidden_act": "wibble"},
    "activation as a number": {"hidden_act": 5},
    "probability above 1": {"drop_path_rate": 1.5},
    "not a number": {"mlp_ratio": float("nan")},
    "negative ratio": {"mlp_ratio": -3},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_invalid_configurations(folder, name):
    change(folder / "config.json", **CONFIGS[name])
    field = list(CONFIGS[name])[-1]
    pattern = rf"config\.json .*({field}|depths)"
    with limited(), pytest.raises(ValueError, match=pattern) as caught:
        read_record(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)
    with limited(), pytest.raises(Exception, match=f"{field}|depths"):  # huggingface_hub has its own errors for types
        hf.DinatModel(AutoConfig.from_pretrained(folder))


PROCESSORS = {
    "mean as text": {"image_mean": "0.5"},
    "mean of texts": {"image_mean": ["a", "b", "c"]},
    "std as text": {"image_std": "1"},
    "size as text": {"size": "224"},
    "size as a list": {"size": [224, 224]},
    "size of texts": {"size": {"shortest_edge": "36"}},
    "large size": {"size": {"shortest_edge": 10**9}},
    "negative size": {"crop_size": {"height": -1, "width": 32}},
    "size of another kind": {"size": {"longest_edge": 36}, "crop_size": ..., "do_center_crop": False},
    "unknown interpolation": {"resample": 99},
    "interpolation as text": {"resample": "bicubic"},
    "another processor": {"image_processor_type": "DetrImageProcessor"},
    "unknown processor": {"image_processor_type": "../../OWNED"},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_invalid_preprocessing(folder, name):
    path = folder / "preprocessor_config.json"
    change(path, **PROCESSORS[name])
    with limited(), pytest.raises(ValueError, match=r"preprocessor_config\.json ") as caught:
        read_record(folder)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"5", b"null", b"{", b"\xff\xfe", b'{"a":' * 100_000, b"[" * 100_000, b'{"depths": 1e999}'],
)
def test_files_that_are_no_json_objects(folder, name, content):
    (folder / name).write_bytes(content)
    if content.endswith(b"1e999}") and name.startswith("pre"):
        return  # an entry without meaning there
    with limited():
        try:
            assert read_record(folder) is None and content.endswith(b"1e999}")  # no model type
        except ValueError as error:
            assert str(error).startswith(str(folder / name)) and "\n" not in str(error)


def test_code_is_never_run(folder, monkeypatch):
    """With `auto_map`, transformers would ask whether to run code from the folder."""
    (folder / "code.py").write_text(CODE)
    code = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    change(folder / "config.json", auto_map=code)
    change(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "code.Processor"})

    def ask(*arguments):
        raise AssertionError("asked whether to run code")

    monkeypatch.setattr("builtins.input", ask)
    model, record = restore(str(folder))
    assert record["preprocessing"]["input_size"] == [3, 32, 32] and model.num_classes == 3
    for kind in ("wibble", "bert"):
        change(folder / "config.json", model_type=kind)
        assert read_record(folder) is None
    change(folder / "config.json", model_type="dinat")
    change(folder / "preprocessor_config.json", image_processor_type="Processor")
    with pytest.raises(ValueError, match="Processor"):
        read_record(folder)
    assert not list(folder.parent.rglob("OWNED"))


def test_command_line(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, values in {"config.json": {"depths": None}, "preprocessor_config.json": {"image_mean": "x"}}.items():
        before = (folder / name).read_text()
        change(folder / name, **values)
        done = subprocess.run(
            [sys.executable, PROJECT / "classification" / "predict.py", tmp_path / "a.png", "--checkpoint", folder],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {folder / name} ")
        assert "Traceback" not in done.stderr
        (folder / name).write_text(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("kind", ["values", "bytes"])
def test_damaged_files(folder, name, kind):
    path = folder / name
    content = path.read_bytes()

    def read(damaged):
        path.write_bytes(damaged)
        read_with_record(str(folder))

    if kind == "bytes":
        damaged = damaged_bytes(content, 1000)
    else:
        damaged = (json.dumps(value).encode(errors="replace") for value in damaged_values(json.loads(content), 1000))
    outcomes = check_reader(read, damaged, names=folder)
    assert min(outcomes["succeeded"], outcomes["refused"]) > 50


def test_folder_of_another_layout(tmp_path):
    model = NAT(depths=(1,), num_heads=(1,), embed_dim=16, kernel_size=3, num_classes=2)
    model.pretrained_cfg = {
        "input_size": (3, 32, 48),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    save_folder(model, tmp_path / "nat")
    record = read_record(tmp_path / "nat")
    assert record["classes"] is None and record["preprocessing"]["input_size"] == [3, 32, 48]
