"""Weights in other layouts, and for models that differ from the one they were trained with."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace

import numpy as np
import pytest
import torch
from small_models import assert_same, copy_of_weights, small
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from natzoo.checkpoints import load_weights, read_checkpoint, read_weights
from natzoo.models._layers import init_linear


def load(model, weights, **kwargs):
    return load_weights(model, weights, "a.pth", **kwargs)


# ----- layouts -----


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_models(prefix):
    weights = copy_of_weights(small())
    model = small(seed=1)
    assert load(model, {prefix + name: value for name, value in weights.items()}) == []
    assert_same(model.state_dict(), weights)


class Backbone(nn.Module):
    """Backbone of a detector: no classifier, one norm per feature map."""

    def __init__(self):
        super().__init__()
        source = small(seed=1)
        self.patch_embed, self.levels = source.patch_embed, source.levels
        self.norm0, self.norm1 = nn.LayerNorm(16), nn.LayerNorm(32)
        self.apply(init_linear)


def test_classifier_into_backbone():
    weights, model = copy_of_weights(small()), Backbone()
    (note,) = load(model, weights)
    assert "norm" in note
    for name, value in model.state_dict().items():
        expected = weights.get(name, torch.ones(1) if name.endswith("weight") else torch.zeros(1))
        assert torch.equal(value, expected.expand_as(value)), name


def detector():
    """Return the weights of a detector whose backbone is random."""
    torch.manual_seed(2)
    weights = {f"backbone.{name}": torch.randn_like(value) for name, value in Backbone().state_dict().items()}
    return {**weights, "neck.conv.weight": torch.zeros(1), "bbox_head.norm.weight": torch.zeros(1)}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_detector_into_backbone(prefix):
    weights, model = detector(), Backbone()
    assert load(model, {prefix + name: value for name, value in weights.items()}) == []
    own = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    assert_same(own, {name: value for name, value in weights.items() if name.startswith("backbone.")})


def test_detector_into_classifier():
    weights, model = detector(), small(seed=1)
    before = copy_of_weights(model)
    with pytest.raises(ValueError, match=r"missing.*head\.bias.*norm\.weight.*unexpected.*norm0\.bias"):
        load(model, weights)
    assert_same(model.state_dict(), before)
    about_classifier, about_norm = load(model, weights, new_classifier=True)
    assert "classifier" in about_classifier
    assert "norm" in about_norm
    for name, value in model.state_dict().items():
        expected = before[name] if name.startswith(("norm.", "head.")) else weights[f"backbone.{name}"]
        assert torch.equal(value, expected), name


def test_only_norms_may_differ_between_classifier_and_backbone():
    weights = detector()
    del weights["backbone.levels.0.blocks.0.norm1.weight"]
    with pytest.raises(ValueError, match=r"missing.*levels\.0\.blocks\.0\.norm1\.weight"):
        load(small(seed=1), weights, new_classifier=True)
    weights = {**copy_of_weights(small()), "norms.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unexpected.*norms\.weight"):
        load(Backbone(), weights)


# ----- files of other training scripts -----


@pytest.fixture
def saver(tmp_path):
    """timm's CheckpointSaver, set up as in its training script."""
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = Namespace(model="nat_mini", lr=1e-3, mean=(0.485, 0.456, 0.406), amp=True)
    average = ModelEmaV3(model)
    for parameter in average.parameters():
        parameter.data += 1
    return CheckpointSaver(model, optimizer, args, average, checkpoint_dir=str(tmp_path))


def test_timm_checkpoint(saver, tmp_path):
    """Contains options as an argparse.Namespace, and averaged weights, which take priority."""
    saver.save_checkpoint(0, metric=50.0)
    path = tmp_path / "model_best.pth.tar"
    assert read_checkpoint(path)["args"].lr == 1e-3
    assert_same(read_weights(path), saver.model_ema.module.state_dict())
    model = small(seed=1)
    assert load(model, read_weights(path)) == []
    assert_same(model.state_dict(), saver.model_ema.module.state_dict())
    torch.save({**read_checkpoint(path), "state_dict_ema": None}, path)
    assert_same(read_weights(path), saver.model.state_dict())


def test_namespace_cannot_hide_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Payload:
        def __reduce__(self):
            return os.system, ("touch payload-ran",)

    torch.save({"args": Namespace(lr=Payload()), "state_dict": copy_of_weights(small())}, "a.pth.tar")
    with pytest.raises(ValueError, match=r"a\.pth\.tar.*posix\.system"):
        read_weights("a.pth.tar")
    assert os.listdir(tmp_path) == ["a.pth.tar"]


def test_openmmlab_checkpoint(tmp_path):
    weights = detector()
    torch.save(
        {"meta": {"epoch": 12, "CLASSES": ("person",)}, "state_dict": weights, "optimizer": {}}, tmp_path / "a.pth"
    )
    model = Backbone()
    assert load(model, read_weights(tmp_path / "a.pth")) == []
    assert torch.equal(model.norm1.weight, weights["backbone.norm1.weight"])


def test_averaged_weights_of_wrapped_model(tmp_path):
    weights = copy_of_weights(small())
    wrapped = {f"module._orig_mod.{name}": value for name, value in weights.items()}
    torch.save({"state_dict": {}, "state_dict_ema": wrapped}, tmp_path / "a.pth.tar")
    model = small(seed=1)
    assert load(model, read_weights(tmp_path / "a.pth.tar")) == []
    assert_same(model.state_dict(), weights)


# ----- other models -----


def test_bias_is_resized_to_another_window():
    weights, model = copy_of_weights(small()), small(seed=1, kernel_size=5)
    (note,) = load(model, weights)
    assert "5x5" in note and "9x9" in note
    table, old = model.levels[0].blocks[0].attn.rpb, weights["levels.0.blocks.0.attn.rpb"]
    assert table.shape == (1, 9, 9)
    torch.testing.assert_close(table[:, 4, 4], old[:, 2, 2])  # the center stays the center


def test_resized_constant_bias_is_constant():
    weights = copy_of_weights(small())
    weights["levels.0.blocks.0.attn.rpb"].fill_(0.25)
    model = small(seed=1, kernel_size=5)
    load(model, weights)
    table = model.levels[0].blocks[0].attn.rpb
    torch.testing.assert_close(table, torch.full_like(table, 0.25))


def test_vit_for_another_image_size():
    weights, model = copy_of_weights(small("vitrpb_small")), small("vitrpb_small", seed=1, img_size=80)
    (note,) = load(model, weights)
    assert "5x5" in note and "9x9" in note
    assert model.layers[0].attn.relative_position_index.shape == (25, 25)


def test_other_input_channels():
    weights, model = copy_of_weights(small()), small(seed=1, in_chans=1)
    (note,) = load(model, weights)
    assert "first convolution" in note and "1" in note
    first = weights["patch_embed.proj.0.weight"]
    torch.testing.assert_close(model.patch_embed.proj[0].weight, first.sum(1, keepdim=True))


def test_model_without_classifier_ignores_it():
    weights, model = copy_of_weights(small()), small(seed=1, num_classes=0)
    assert load(model, weights) == []
    assert torch.equal(model.norm.weight, weights["norm.weight"])


def test_new_classifier():
    model = small(seed=1, num_classes=7)
    head = model.head.weight.clone()
    (note,) = load(model, copy_of_weights(small()), new_classifier=True)
    assert "7 classes" in note
    assert torch.equal(model.head.weight, head)
    with pytest.raises(ValueError, match=r"shape.*head\.weight \(5, 32\) instead of \(7, 32\)"):
        load(small(seed=1, num_classes=7), copy_of_weights(small()))


# ----- plain pickles -----


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_detectron2_weights(tmp_path, protocol):
    weights = copy_of_weights(small())
    arrays = {name: value.numpy() for name, value in weights.items()}
    content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True, "scale": np.float32(2), "b": b""}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    assert_same(read_weights(tmp_path / "a.pkl"), weights)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("code", [">f4", "<f4", ">i8", "<f8", "<f2", "|b1", "|u1"])
def test_arrays_of_all_numeric_dtypes(tmp_path, code, protocol):
    """In C and Fortran order, with any byte order, and empty."""
    numbers = np.arange(6).reshape(2, 3).astype(code)
    content = {"c": numbers, "fortran": np.asfortranarray(numbers), "empty": numbers[:0], "scalar": numbers[1, 1]}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    read = read_checkpoint(tmp_path / "a.pkl")
    assert read["c"].tolist() == read["fortran"].tolist() == numbers.tolist()
    assert read["c"].dtype == torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("="))).dtype
    assert read["empty"].shape == (0, 3)
    assert read["scalar"] == numbers[1, 1]
