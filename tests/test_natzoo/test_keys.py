"""Conversion of names between the published layout and Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from small_models import SMALL, assert_same, copy_of_weights, small

from natzoo.checkpoints import load_weights
from natzoo.checkpoints.keys import from_hf, is_hf, to_hf

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = timm.list_models(["nat_*", "dinat_*", "vitrpb_*"])


def assert_round_trip(weights):
    """Check the conversion and its inverse, with the prefixes of models, classifiers and backbones."""
    for prefix in ("nat.", "dinat.", ""):
        renamed = to_hf(weights, prefix)
        assert is_hf(renamed)
        assert not renamed.keys() & {name for name in weights if not name.startswith("norm.")}
        assert_same(from_hf(renamed), weights)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_with_few_channels(name):
    """Names only depend on the depth, so small models suffice to compare values."""
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=24, num_classes=3)
    weights = {name: torch.rand(value.shape).to(value.dtype) for name, value in model.state_dict().items()}
    assert_round_trip(weights)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_on_the_meta_device(name):
    with torch.device("meta"):
        weights = timm.create_model(name).state_dict()
    back = from_hf(to_hf(weights, "dinat."))
    assert {name: (value.shape, value.dtype) for name, value in back.items()} == {
        name: (value.shape, value.dtype) for name, value in weights.items()
    }


@pytest.mark.parametrize("name", SMALL)
def test_loading_hugging_face_names(name):
    weights, model = copy_of_weights(small(name)), small(name, seed=1)
    assert load_weights(model, to_hf(weights, "dinat."), "a.bin") == []
    assert_same(model.state_dict(), weights)


def test_backbone_with_one_norm_per_map():
    weights = {
        name: value for name, value in copy_of_weights(small()).items() if not name.startswith(("head", "norm."))
    }
    for stage in range(4):
        weights |= {f"norm{stage}.weight": torch.rand(3), f"norm{stage}.bias": torch.rand(3)}
    renamed = to_hf(weights, "")
    assert torch.equal(renamed["hidden_states_norms.stage1.weight"], weights["norm0.weight"])
    assert_same(from_hf(renamed), weights)


@pytest.mark.parametrize("kind", ["nat", "dinat"])
def test_names_and_shapes_match_hugging_face(kind):
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


def test_unknown_weight_is_named():
    with pytest.raises(ValueError, match=r"wibble\.weight"):
        to_hf({"wibble.weight": torch.zeros(1)}, "nat.")
    with pytest.raises(ValueError, match="gamma1"):
        to_hf({"levels.0.blocks.0.gamma1": torch.zeros(1)}, "nat.")
