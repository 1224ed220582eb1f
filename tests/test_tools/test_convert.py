"""tools/convert.py: every format into every other, and what it refuses."""

from __future__ import annotations

import json
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageClassification

import natzoo.hf
from natzoo.checkpoints import read_checkpoint, read_weights, write_checkpoint
from natzoo.checkpoints.adapt import published_names
from natzoo.classification.inference import restore

ROOT = Path(__file__).parents[2]
KWARGS = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "embed_dim": 16}
RECORD = {
    "model": "nat_mini",
    "model_kwargs": KWARGS,
    "num_classes": 3,
    "classes": ["cat", "dog", "bird"],
    "preprocessing": {
        "input_size": [3, 64, 64],
        "crop_pct": 0.5,
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    },
}


@pytest.fixture
def convert(monkeypatch, capsys, tmp_path):
    """Return a function that runs the tool in tmp_path, in this process, and returns its status and its output."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "tools" / "convert.py"), run_name="__main__")
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return call


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("nat_mini", num_classes=3, **KWARGS).eval()


@pytest.fixture
def trained(model, tmp_path):
    """A checkpoint of train.py with EMA weights."""
    content = {
        "epoch": 3,
        "model": {name: torch.zeros_like(value) for name, value in model.state_dict().items()},
        "model_ema": model.state_dict(),
        "optimizer": {"state": {}},
        "record": RECORD,
    }
    write_checkpoint(tmp_path / "last.pth", content)
    return tmp_path / "last.pth"


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_format(convert, trained, model, tmp_path):
    """Weights stay bit-equal through all formats, and each format can be read."""
    source = "last.pth"
    for target in ("a.safetensors", "hf/a", "b.pth", "c.pkl", "d.bin", "e.safetensors"):
        status, text = convert(source, target)
        assert (status, target in text, "float32" in text) == (0, True, True), text
        source = target
    expected = model.state_dict()
    for name in ("a.safetensors", "hf/a/model.safetensors", "b.pth", "c.pkl", "d.bin", "e.safetensors"):
        weights = read_weights(tmp_path / name)
        assert same(published_names(weights), expected), name
    assert pickle.loads((tmp_path / "c.pkl").read_bytes())["matching_heuristics"] is True
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_the_record_of_train_py_is_kept(convert, trained, tmp_path):
    assert convert("last.pth", "a.safetensors")[0] == 0
    assert read_checkpoint(tmp_path / "a.safetensors")["record"] == json.loads(json.dumps(RECORD))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_folder_for_transformers(convert, trained, model, tmp_path):
    assert convert("last.pth", "hf/nat")[0] == 0
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "hf" / "nat").eval()
    assert type(loaded) is natzoo.hf.NatForImageClassification
    assert loaded.config.id2label == {0: "cat", 1: "dog", 2: "bird"}
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(x).logits, model(x))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf" / "nat")
    assert (dict(processor.size), list(processor.image_mean)) == ({"shortest_edge": 128}, [0.1, 0.2, 0.3])
    status, text = convert("last.pth", "hf/nat")
    assert status == 2 and "hf/nat" in text


def test_folder_without_a_timm_name(convert, trained, model, tmp_path):
    """Class names, preprocessing and architecture are restored from the folder."""
    assert convert("last.pth", "hf/nat")[0] == 0
    assert convert("hf/nat", "hf/again")[0] == 0
    assert convert("hf/again", "again.pth")[0] == 0
    record = read_checkpoint(tmp_path / "again.pth")["record"]
    assert (record["classes"], record["num_classes"]) == (RECORD["classes"], 3)
    assert record["preprocessing"] == RECORD["preprocessing"]
    restored, _ = restore(str(tmp_path / "again.pth"))
    assert same(restored.state_dict(), model.state_dict())


def test_vit_with_a_bias(convert, tmp_path):
    model = timm.create_model("vitrpb_small", depth=1, num_classes=3, img_size=64)
    write_checkpoint(tmp_path / "a.pth", model.state_dict())
    assert convert("a.pth", "hf", "--model", "vitrpb_small", "--model-kwargs", "depth=1", "img_size=64")[0] == 0
    assert convert("hf", "b.pth")[0] == 0
    assert same(read_weights(tmp_path / "b.pth"), model.state_dict())


def test_dtype(convert, trained, tmp_path):
    assert convert("last.pth", "half.pth", "--dtype", "float16")[0] == 0
    assert {x.dtype for x in read_weights(tmp_path / "half.pth").values()} == {torch.float16}


@pytest.mark.parametrize("wrapper", ["", "module.", "module._orig_mod."])
def test_detector_without_its_optimizer(convert, model, tmp_path, wrapper):
    parts = {f"backbone.{name}": value for name, value in model.state_dict().items() if not name.startswith("head")}
    parts["roi_head.fc.weight"] = torch.ones(2)
    wrapped = {wrapper + name: value for name, value in parts.items()}
    write_checkpoint(tmp_path / "iter_1.pth", {"state_dict": wrapped, "optimizer": {}, "meta": {"iter": 1}})
    assert convert("iter_1.pth", "published.pth")[0] == 0
    assert same(read_checkpoint(tmp_path / "published.pth"), parts)
    assert convert("iter_1.pth", "backbone.pth", "--backbone")[0] == 0
    names = read_weights(tmp_path / "backbone.pth").keys()
    assert "levels.0.blocks.0.attn.rpb" in names and not any(name.startswith(("backbone", "roi")) for name in names)


def test_backbone_as_a_folder(convert, model, tmp_path):
    parts = {f"backbone.{name}": x for name, x in model.state_dict().items() if not name.startswith(("head", "norm"))}
    for stage in range(4):
        parts |= {f"backbone.norm{stage}.{kind}": torch.rand(16 * 2**stage) for kind in ("weight", "bias")}
    write_checkpoint(tmp_path / "detector.pth", {"state_dict": {**parts, "neck.weight": torch.ones(1)}})
    kwargs = ("--model", "nat_mini", "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items()))
    assert convert("detector.pth", "hf", "--backbone", *kwargs, "dilations=((2,),)*4")[0] == 2
    assert convert("detector.pth", "hf", "--backbone", *kwargs, "dilations=[[2],[1],[1],[1]]")[0] == 0
    backbone = natzoo.hf.DinatBackbone.from_pretrained(tmp_path / "hf")
    assert backbone.config.dilations == [[2], [1], [1], [1]]
    assert torch.equal(backbone.hidden_states_norms["stage3"].weight, parts["backbone.norm2.weight"])
    assert [x.shape[1] for x in backbone(torch.zeros(1, 3, 64, 64)).feature_maps] == [16, 32, 64, 128]
    assert convert("detector.pth", "other", "--backbone", "--model", "nat_tiny")[0] == 2
    assert not (tmp_path / "other").exists()


def test_segmenter_of_transformers(convert, tmp_path):
    config = natzoo.hf.NatConfig(**KWARGS, out_features=["stage1", "stage2", "stage3", "stage4"])
    backbone = natzoo.hf.NatBackbone(config)
    backbone.save_pretrained(tmp_path / "backbone")
    prefix = "model.pixel_level_module.encoder."
    parts = {prefix + name: x for name, x in read_weights(tmp_path / "backbone" / "model.safetensors").items()}
    write_checkpoint(tmp_path / "segmenter.pth", {**parts, "class_predictor.bias": torch.ones(2)})
    assert convert("segmenter.pth", "whole.safetensors")[0] == 0
    assert read_weights(tmp_path / "whole.safetensors").keys() == {*parts, "class_predictor.bias"}
    assert convert("segmenter.pth", "backbone.pth", "--backbone")[0] == 0
    taken = read_weights(tmp_path / "backbone.pth")
    assert {"levels.0.blocks.0.attn.qkv.weight", "norm0.weight"} <= taken.keys()
    assert torch.equal(taken["norm2.bias"], backbone.hidden_states_norms["stage3"].bias)


def test_invalid_records_are_refused(convert, tmp_path):
    for record, named in (
        ({}, "a.pth"),
        ({**RECORD, "model_kwargs": {"pretrained": True}}, "pretrained"),
        ({**RECORD, "model": "hf-hub:some/body"}, "hf-hub:some/body"),
        ({**RECORD, "model_kwargs": {"wibble": 1}}, "wibble"),
    ):
        write_checkpoint(tmp_path / "a.pth", {"model": {"head.weight": torch.ones(3, 2)}, "record": record})
        status, message = convert("a.pth", "b.pth")
        assert (status, named in message) == (2, True), message
        assert not (tmp_path / "b.pth").exists()


def test_mistakes(convert, trained, model, tmp_path):
    write_checkpoint(tmp_path / "bare.pth", model.state_dict())
    for arguments, named in (
        (("nowhere.pth", "a.pth"), "nowhere.pth"),
        (("nat_mimi", "a.pth"), "nat_mini"),  # the nearest name
        (("bare.pth", "a.zip"), ".zip"),
        (("bare.pth", "last.pth"), "last.pth"),
        (("last.pth", "a.pth", "--model", "nat_tiny"), "nat_tiny"),
        (("bare.pth", "a.pkl", "--dtype", "bfloat16"), "bfloat16"),
        (("bare.pth", "folder"), "--model"),
        (("bare.pth", "folder", "--model", "wibble"), "wibble"),
        (("bare.pth", "a.pth", "--model", "dinat_s_tiny"), "bare.pth"),
        (("bare.pth", "missing/a.pth"), "missing/a.pth"),
    ):
        status, message = convert(*arguments)
        assert (status, "Traceback" in message) == (2, False), message
        assert named in message
        assert not (tmp_path / "a.pth").exists() and not (tmp_path / "folder").exists()
