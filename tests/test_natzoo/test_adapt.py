"""Weights in other layouts, and for models that differ from the one they are of."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from natzoo.checkpoints import load_weights, read_checkpoint, read_weights
from natzoo.checkpoints.keys import from_hf, to_hf
from natzoo.models.layers import init_linear

GOLDENS = Path(__file__).parents[1] / "goldens"
SMALL = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3, "num_classes": 5}
FAMILIES = {
    "nat_mini": SMALL,
    "nat_small": {**SMALL, "layer_scale": 0.5},
    "dinat_mini": {**SMALL, "dilations": [[2], [1]]},
    "dinat_s_tiny": {**SMALL, "dilations": [[2], [1]]},
    "dinat_isotropic_small": {"depth": 2, "num_heads": 2, "embed_dim": 16, "dilations": (1, 2), "num_classes": 5},
    "vitrpb_small": {"depth": 2, "num_heads": 2, "embed_dim": 16, "img_size": 48, "num_classes": 5},
}


def small(name="nat_mini", seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**FAMILIES[name], **kwargs}).eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def load(model, weights, **kwargs):
    return load_weights(model, weights, "a.pth", **kwargs)


# ----- layouts -----


@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face_and_back(name):
    weights = weights_of(small(name))
    for prefix in ("nat.", "dinat.", ""):
        renamed = to_hf(weights, prefix)
        assert len(renamed) != len(weights)
        assert_same(from_hf(renamed), weights)
    model = small(name, seed=1)
    assert load(model, to_hf(weights, "dinat.")) == []
    assert_same(model.state_dict(), weights)


@pytest.mark.parametrize("kind", ["nat", "dinat"])
def test_names_and_shapes_are_those_of_hugging_face(kind):
    golden = json.loads((GOLDENS / "hf.json").read_text())
    config = golden[f"{kind}-128x128"]["config"]
    model = timm.create_model(
        "nat_mini",
        **{key: config[key] for key in ("embed_dim", "depths", "num_heads", "kernel_size", "mlp_ratio")},
        layer_scale=config["layer_scale_init_value"],
        num_classes=config["num_labels"],
    )
    renamed = to_hf(model.state_dict(), f"{kind}.")
    assert {name: list(value.shape) for name, value in renamed.items()} == golden[f"{kind}-state_dict"]


def test_a_foreign_weight_is_named():
    with pytest.raises(ValueError, match=r"wibble\.weight is no weight"):
        to_hf({"wibble.weight": torch.zeros(1)}, "nat.")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_models(prefix):
    weights = weights_of(small())
    model = small(seed=1)
    assert load(model, {prefix + name: value for name, value in weights.items()}) == []
    assert_same(model.state_dict(), weights)


class Backbone(nn.Module):
    """As detectors have it: no classifier, a norm for each map."""

    def __init__(self):
        super().__init__()
        source = small(seed=1)
        self.patch_embed, self.levels = source.patch_embed, source.levels
        self.norm0, self.norm1 = nn.LayerNorm(16), nn.LayerNorm(32)
        self.apply(init_linear)


def test_a_classifier_for_a_backbone():
    weights, model = weights_of(small()), Backbone()
    assert load(model, weights) == ["the norms of the stages' maps start anew: a classifier has none"]
    for name, value in model.state_dict().items():
        expected = weights.get(name, torch.ones(1) if name.endswith("weight") else torch.zeros(1))
        assert torch.equal(value, expected.expand_as(value)), name


def test_a_backbone_out_of_a_detector():
    source, model = Backbone(), Backbone()
    weights = {f"backbone.{name}": torch.randn_like(value) for name, value in source.state_dict().items()}
    assert load(model, {**weights, "neck.conv.weight": torch.zeros(1)}) == []
    assert_same({f"backbone.{name}": value for name, value in model.state_dict().items()}, weights)


# ----- other models -----


def test_a_bias_of_another_window_is_stretched():
    weights, model = weights_of(small()), small(seed=1, kernel_size=5)
    assert load(model, weights) == ["the relative position bias was stretched from 5x5 to 9x9"]
    table, old = model.levels[0].blocks[0].attn.rpb, weights["levels.0.blocks.0.attn.rpb"]
    assert table.shape == (1, 9, 9)
    torch.testing.assert_close(table[:, 4, 4], old[:, 2, 2])  # the middle stays where it is


def test_a_constant_bias_stays_constant():
    weights = weights_of(small())
    weights["levels.0.blocks.0.attn.rpb"].fill_(0.25)
    model = small(seed=1, kernel_size=5)
    load(model, weights)
    table = model.levels[0].blocks[0].attn.rpb
    torch.testing.assert_close(table, torch.full_like(table, 0.25))


def test_vit_of_another_image_size():
    weights, model = weights_of(small("vitrpb_small")), small("vitrpb_small", seed=1, img_size=80)
    assert load(model, weights) == ["the relative position bias was stretched from 5x5 to 9x9"]
    assert model.layers[0].attn.relative_position_index.shape == (25, 25)


def test_other_input_channels():
    weights, model = weights_of(small()), small(seed=1, in_chans=1)
    assert load(model, weights) == ["the first convolution was made to take 1 channels instead of 3"]
    first = weights["patch_embed.proj.0.weight"]
    torch.testing.assert_close(model.patch_embed.proj[0].weight, first.sum(1, keepdim=True))


def test_a_model_without_a_classifier_takes_none():
    weights, model = weights_of(small()), small(seed=1, num_classes=0)
    assert load(model, weights) == []
    assert torch.equal(model.norm.weight, weights["norm.weight"])


def test_a_new_classifier():
    model = small(seed=1, num_classes=7)
    head = model.head.weight.clone()
    (note,) = load(model, weights_of(small()), new_classifier=True)
    assert "it has 7 classes" in note
    assert torch.equal(model.head.weight, head)
    with pytest.raises(ValueError, match="of another shape"):
        load(small(seed=1, num_classes=7), weights_of(small()))


def test_weights_that_are_not_finite_are_told():
    weights = weights_of(small())
    weights["norm.weight"][3] = float("nan")
    with pytest.warns(UserWarning, match=r"1 not finite: norm\.weight"):
        load(small(seed=1), weights)


# ----- plain pickles -----


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload-ran",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_detectron_weights(tmp_path, protocol):
    weights = weights_of(small())
    arrays = {name: value.numpy() for name, value in weights.items()}
    content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True, "scale": np.float32(2), "b": b""}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    assert_same(read_weights(tmp_path / "a.pkl"), weights)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("code", [">f4", "<f4", ">i8", "<f8", "<f2", "|b1", "|u1"])
def test_arrays_of_any_numbers(tmp_path, code, protocol):
    """Also those of other byte orders, by columns, and without any entry."""
    numbers = np.arange(6).reshape(2, 3).astype(code)
    content = {"rows": numbers, "columns": np.asfortranarray(numbers), "none": numbers[:0], "one": numbers[1, 1]}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    read = read_checkpoint(tmp_path / "a.pkl")
    assert read["rows"].tolist() == read["columns"].tolist() == numbers.tolist()
    assert read["rows"].dtype == torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("="))).dtype
    assert read["none"].shape == (0, 3)
    assert read["one"] == numbers[1, 1]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x02K\x03\x86", b"K\x02K\x7f\x86"),
        (b"K\x02K\x03\x86", b"K\x02J\xff\xff\xff\xff\x86"),
        (b"f4", b"O4"),
        (b"f4", b"f9"),
    ],
)
def test_an_array_that_lies_about_itself(tmp_path, old, new):
    content = pickle.dumps({"a": np.zeros((2, 3), "f4")}, 4)
    assert old in content
    (tmp_path / "a.pkl").write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match=r"a\.pkl is (refused|truncated)"):
        read_checkpoint(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "content",
    [
        Payload(),
        [np.array([Payload()], dtype=object)],
        torch.zeros(2),
        np.array(["text"]),
        np.zeros(2, dtype=[("a", "f4")]),
        np.ndarray,
        pickle.Unpickler,
        len,
    ],
    ids=lambda content: type(content).__name__,
)
def test_a_pickle_of_anything_else_is_refused_and_does_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"a": content}}))
    with pytest.raises(ValueError, match=r"a\.pkl (is refused|holds no weights)"):
        read_weights(tmp_path / "a.pkl")
    assert not (tmp_path / "payload-ran").exists()


def test_damaged_pickles_raise_nothing_else(tmp_path):
    arrays = {name: value.numpy() for name, value in weights_of(small()).items()}
    content = pickle.dumps({"model": arrays})
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content[: random.integers(1, len(content))])
        for place in random.integers(0, min(len(damaged), 3000), 6):
            damaged[place] = random.integers(0, 256)
        (tmp_path / "a.pkl").write_bytes(damaged)
        try:
            read_weights(tmp_path / "a.pkl")
        except ValueError as error:
            assert "a.pkl" in str(error)
