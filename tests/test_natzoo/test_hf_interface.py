"""What transformers' own tools expect of a model: gradients, checkpointing, attentions, loading and saving."""

from __future__ import annotations

import json
import re

import pytest
import torch
from deterministic import image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer

import natzoo.hf as hf
from natzoo.models import Isotropic

KINDS = ("NatModel", "NatForImageClassification", "NatBackbone", "DinatForImageClassification", "DinatBackbone")


def small(kind: str = "DinatForImageClassification", **changes):
    """Return a model with two stages and layer scale, in eval mode."""
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "depths": [2, 1],
        "num_heads": [1, 2],
        "kernel_size": 3,
        "layer_scale_init_value": 0.5,
        "num_labels": 3,
        "drop_path_rate": 0.0,
    }
    if kind.startswith("Dinat"):
        config["dilations"] = [[1, 2], [2]]
    name = "DinatConfig" if kind.startswith("Dinat") else "NatConfig"
    return getattr(hf, kind)(getattr(hf, name)(**{**config, **changes})).eval()


def isotropic(**kwargs):
    torch.manual_seed(0)
    return hf.from_timm(Isotropic(depth=2, num_heads=2, embed_dim=16, num_classes=3, **kwargs)).eval()


# ----- gradients -----


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(image((64, 64)), labels=torch.tensor([1])).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("make", [small, isotropic])
def test_gradient_checkpointing(make, kwargs, monkeypatch):
    """The arguments reach torch.utils.checkpoint, and each block is recomputed once."""
    model = make().train()
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(blocks) == sum(model.config.depths)
    expected = gradients(model)
    calls, original = [], torch.utils.checkpoint.checkpoint

    def checkpoint(function, *args, **options):
        calls.append(options["use_reentrant"])
        return original(function, *args, **options)

    for module in ("torch.utils.checkpoint.checkpoint", "transformers.modeling_utils.checkpoint"):
        monkeypatch.setattr(module, checkpoint)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    runs = []
    blocks[0].attn.register_forward_pre_hook(lambda *_: runs.append(1))
    found = gradients(model)
    assert len(runs) == 2
    if kwargs is not None:
        assert calls == [kwargs["use_reentrant"]] * len(blocks)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_disable()
    runs.clear()
    gradients(model)
    assert len(runs) == 1


@pytest.mark.parametrize("make", [small, isotropic, lambda: isotropic(kernel_size=None, img_size=64)])
def test_attentions_and_hidden_states_are_part_of_the_graph(make):
    model = make()
    x = image((64, 64))
    out = model(x, output_attentions=True, output_hidden_states=True)
    for tensor in (*out.attentions, *out.hidden_states):
        tensor.retain_grad()
    out.logits.sum().backward()
    for tensor in (*out.attentions, *out.hidden_states):
        assert tensor.grad is not None and tensor.grad.abs().max() > 0
    torch.testing.assert_close(out.logits, model(x).logits, rtol=1e-4, atol=1e-5)


def test_attentions_with_gradient_checkpointing():
    model = small().train()
    model.gradient_checkpointing_enable()
    out = model(image((64, 64)), output_attentions=True)
    out.logits.sum().backward()
    assert len(out.attentions) == 2


def test_sharing_layers_with_a_timm_model():
    """The timm model still works, and both have the same parameters."""
    timm_model = Isotropic(depth=2, num_heads=2, embed_dim=16, num_classes=3).eval()
    model = hf.from_timm(timm_model)
    x = image((64, 64))
    with torch.no_grad():
        timm_model.layers[0].mlp.fc2.weight.mul_(3)
        torch.testing.assert_close(model(x).logits, timm_model(x))
    assert {id(p) for p in model.parameters()} == {id(p) for p in timm_model.parameters()}


# ----- attn_implementation -----


def test_attention_implementations(tmp_path):
    small().save_pretrained(tmp_path)
    x = image((64, 64))
    outputs = []
    for name in (None, "eager", "sdpa"):
        model = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation=name).eval()
        outputs.append(model(x, output_attentions=True))
        model.set_attn_implementation("sdpa")
    for out in outputs[1:]:
        assert torch.equal(out.logits, outputs[0].logits)
        assert len(out.attentions) == 2
    config = hf.DinatConfig.from_pretrained(tmp_path)
    assert AutoModelForImageClassification.from_config(config, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="attn_implementation"):
        AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="flex_attention")


# ----- loading and saving -----


@pytest.mark.parametrize("kind", KINDS)
def test_each_conversion_applies_and_is_reversible(kind, tmp_path):
    """transformers requires this of the conversions of a model type."""
    model = small(kind)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() != model.state_dict().keys()
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        for pattern in conversion.source_patterns:
            assert any(re.search(pattern, name) for name in saved), pattern
    reloaded = type(model).from_pretrained(tmp_path)
    assert model.state_dict().keys() == reloaded.state_dict().keys()
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in model.state_dict().items())
    reloaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in saved.items())


def test_both_tables_of_full_attention_are_renamed(tmp_path):
    model = isotropic(kernel_size=None, img_size=64)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    prefix = "nat.encoder.levels.0.layers.1.attention.self."
    assert {f"{prefix}rpb", f"{prefix}relative_position_index", f"{prefix}query.weight"} <= names
    assert not any(".attn." in name for name in names)


def test_other_number_of_classes(tmp_path):
    """The classifier is initialized as configured and the other weights are loaded."""
    model = small(initializer_range=1e-10, layer_scale_init_value=1e-10)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=42)
    loaded, information = AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=42, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in information["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert loaded(image((64, 64))).logits.shape == (1, 42)
    for parameter in loaded.classifier.parameters():
        assert parameter.abs().max() < 1e-8
    assert torch.equal(loaded.dinat.embeddings.proj[0].weight, model.dinat.embeddings.proj[0].weight)


@pytest.mark.parametrize("changes", [{"embed_dim": 32}, {"kernel_size": 5}, {"mlp_ratio": 2.0}])
def test_other_sizes(tmp_path, changes):
    """All weights of other shapes are initialized, the others loaded."""
    model = small()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["embed_dim"] == 16
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModel.from_pretrained(tmp_path, **changes)
    loaded = AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **changes)
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    assert loaded(image((64, 64))).pooler_output.isfinite().all()


# ----- tools -----


@pytest.mark.parametrize("kind", ["DinatForImageClassification", "NatBackbone"])
def test_traced_with_gradients_and_other_sizes(kind):
    model = small(kind, return_dict=False)
    traced = torch.jit.trace(model, image((64, 64)))
    for size in ((64, 64), (96, 70)):
        found, expected = (flatten(m(image(size))) for m in (traced, model))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    flatten(traced(image((96, 70))))[-1].sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "rpb" in name)


def flatten(outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else [x for output in outputs for x in flatten(output)]
