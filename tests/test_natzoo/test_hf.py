"""natzoo.hf compared with the results and the interface of transformers' own Nat and Dinat."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from deterministic import array, image, value
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    OneFormerConfig,
    OneFormerModel,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    pipeline,
)

import natzoo.hf as hf
from natzoo.checkpoints import load_weights, read_weights
from natzoo.checkpoints.keys import to_hf
from natzoo.hf.export import make_config
from natzoo.models import NAT, DiNAT, DiNAT_s, Isotropic

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN = json.loads((GOLDENS / "hf.json").read_text())
BACKBONES = json.loads((GOLDENS / "backbones.json").read_text())  # from the original detection code
CONFIGS = {"nat": hf.NatConfig, "dinat": hf.DinatConfig}
ALL_STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]

# config.json of shi-labs/nat-mini-in1k-224, written by an older transformers, without labels.
HUB_CONFIG = {
    "architectures": ["NatForImageClassification"],
    "attention_probs_dropout_prob": 0.0,
    "depths": [3, 4, 6, 5],
    "drop_path_rate": 0.2,
    "embed_dim": 64,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 512,
    "image_size": 224,
    "initializer_range": 0.02,
    "kernel_size": 7,
    "layer_norm_eps": 1e-05,
    "layer_scale_init_value": 0.0,
    "mlp_ratio": 3.0,
    "model_type": "nat",
    "num_channels": 3,
    "num_heads": [2, 4, 8, 16],
    "num_layers": 4,
    "patch_norm": True,
    "patch_size": 4,
    "path_norm": True,
    "qkv_bias": True,
    "torch_dtype": "float32",
    "transformers_version": "4.26.0.dev0",
}


def small(kind="dinat", **changes):
    """Return a configuration with the sizes of the goldens, or with changes."""
    return CONFIGS[kind](**{**GOLDEN[f"{kind}-128x128"]["config"], **changes})


def hub_value(name, shape):
    if name.endswith("layer_scale_parameters"):
        return array(name, shape, 0.1, 0.5)
    return value(name, shape)


@pytest.fixture(params=CONFIGS)
def hub_folder(request, tmp_path):
    """Write a folder like those on the hub, with the names and values of the goldens."""
    kind = request.param
    weights = {name: torch.from_numpy(hub_value(name, shape)) for name, shape in GOLDEN[f"{kind}-state_dict"].items()}
    small(kind).save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ----- results of the original implementation -----


def test_outputs_match_the_original(hub_folder):
    model = AutoModelForImageClassification.from_pretrained(hub_folder).eval()
    golden = GOLDEN[f"{model.config.model_type}-128x128"]
    with torch.no_grad():
        out = model(image((128, 128), batch=2), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(out.logits, torch.tensor(golden["logits"]), atol=2e-4, rtol=0)
    for name, norms in (("hidden_states", "hidden_norms"), ("attentions", "attention_norms")):
        assert [list(x.shape) for x in getattr(out, name)] == golden[name]
        assert [x.norm().item() for x in getattr(out, name)] == pytest.approx(golden[norms], rel=1e-4)
    assert [list(x.shape) for x in out.reshaped_hidden_states] == golden["reshaped_hidden_states"]
    assert all(
        torch.equal(a.movedim(-1, 1), b) for a, b in zip(out.hidden_states, out.reshaped_hidden_states, strict=True)
    )


def test_saved_names_match_the_hub(hub_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("saved")
    AutoModelForImageClassification.from_pretrained(hub_folder).save_pretrained(target)
    before, after = (load_file(folder / "model.safetensors") for folder in (hub_folder, target))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_backbone_names_match_the_hub(tmp_path, kind):
    backbone = AutoBackbone.from_config(small(kind, out_features=ALL_STAGES[1:]))
    backbone.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: list(x.shape) for name, x in saved.items()} == GOLDEN[f"{kind}-backbone-state_dict"]
    assert same_weights(type(backbone).from_pretrained(tmp_path), backbone)


@pytest.mark.parametrize("name", BACKBONES)
def test_feature_maps_match_the_original(tmp_path, name):
    """With dilations up to 28, so that windows exceed the maps and the layers pad."""
    golden = BACKBONES[name]
    layout = "dinat_s" if name.startswith("dinat_s") else "nat"
    config = CONFIGS[name.split("_")[0]](**golden["config"], layout=layout, out_features=ALL_STAGES[1:])
    config.save_pretrained(tmp_path)
    published = {key: torch.from_numpy(value(key, shape)) for key, shape in golden["state_dict"].items()}
    save_file(to_hf(published, ""), tmp_path / "model.safetensors", metadata={"format": "pt"})
    kind = hf.DinatBackbone if name.startswith("dinat") else hf.NatBackbone
    backbone, information = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    for size, expected in golden["sizes"].items():
        with torch.no_grad():
            maps = backbone.eval()(image(tuple(map(int, size.split("x"))))).feature_maps
        assert [list(x.shape) for x in maps] == expected["shapes"]
        assert [x.norm().item() for x in maps] == pytest.approx(expected["norms"], rel=1e-4)
        for x, corner in zip(maps, expected["corner"], strict=True):
            torch.testing.assert_close(x[0, :4, -1, -1], torch.tensor(corner), atol=1e-4, rtol=1e-4)


# ----- interface of transformers -----


def test_auto_classes(hub_folder):
    name = "Nat" if AutoConfig.from_pretrained(hub_folder).model_type == "nat" else "Dinat"
    assert type(AutoConfig.from_pretrained(hub_folder)) is getattr(hf, f"{name}Config")
    assert type(AutoModel.from_pretrained(hub_folder)) is getattr(hf, f"{name}Model")
    assert type(AutoModelForImageClassification.from_pretrained(hub_folder)) is getattr(
        hf, f"{name}ForImageClassification"
    )
    assert type(AutoBackbone.from_config(AutoConfig.from_pretrained(hub_folder))) is getattr(hf, f"{name}Backbone")


def test_model_from_a_classifier_folder(hub_folder):
    model, information = AutoModel.from_pretrained(hub_folder, output_loading_info=True)
    assert not information["missing_keys"]
    whole = AutoModelForImageClassification.from_pretrained(hub_folder)
    assert same_weights(model, whole.base_model)
    out = model.eval()(image((97, 61)))
    assert out.last_hidden_state.shape == (1, 4, 2, 256)
    torch.testing.assert_close(out.pooler_output, out.last_hidden_state.mean((1, 2)))


def test_backbone_from_a_classifier_folder(hub_folder):
    """The norms of the feature maps are newly initialized."""
    kind = type(AutoBackbone.from_config(AutoConfig.from_pretrained(hub_folder)))  # AutoBackbone cannot
    backbone, information = kind.from_pretrained(
        hub_folder, out_features=["stem", "stage2", "stage4"], output_loading_info=True
    )
    assert {name.split(".")[0] for name in information["missing_keys"]} == {"hidden_states_norms"}
    assert backbone.channels == [32, 64, 256]
    out = backbone.eval()(image((100, 64)), output_hidden_states=True)
    assert [tuple(x.shape) for x in out.feature_maps] == [(1, 32, 25, 16), (1, 64, 13, 8), (1, 256, 4, 2)]
    normalized = nn.functional.layer_norm(out.hidden_states[2], (64,))
    torch.testing.assert_close(out.feature_maps[1], normalized.permute(0, 3, 1, 2))
    assert AutoBackbone.from_config(small())(image((64, 64))).hidden_states is None


def test_configuration_from_the_hub(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is hf.NatConfig
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (512, 4, [2, 4, 8, 16])
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert model.num_parameters() == 19_984_174 - 998 * 513  # two classes


def test_defaults_match_the_mini_models():
    for config, name in ((hf.NatConfig(num_labels=1000), "nat_mini"), (hf.DinatConfig(num_labels=1000), "dinat_mini")):
        with torch.device("meta"):
            made, known = AutoModelForImageClassification.from_config(config), timm.create_model(name)
        theirs, ours = made.config.to_dict(), make_config(known).to_dict()
        for field in ("id2label", "label2id", "drop_path_rate", "architectures"):  # the default of transformers is 0.1
            theirs.pop(field), ours.pop(field)
        assert json.dumps(theirs, sort_keys=True) == json.dumps(ours, sort_keys=True)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (torch.tensor([1, 3]), "single_label_classification"),
        (torch.rand(2, 10), "multi_label_classification"),
        (torch.rand(2, 10), "regression"),
    ],
)
def test_loss(labels, problem):
    model = hf.NatForImageClassification(small("nat", problem_type=problem))
    out = model(image((64, 64), batch=2), labels=labels)
    out.loss.backward()
    expected = {
        "single_label_classification": nn.functional.cross_entropy,
        "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
        "regression": nn.functional.mse_loss,
    }[problem]
    torch.testing.assert_close(out.loss, expected(out.logits, labels))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tuples_and_configured_outputs():
    model = hf.DinatForImageClassification(small(output_hidden_states=True, output_attentions=True)).eval()
    x = image((64, 64))
    out = model(x)
    assert len(out.hidden_states) == 5 and len(out.attentions) == 4
    for a, b in zip(model(x, return_dict=False), out.to_tuple(), strict=True):
        torch.testing.assert_close(a, b)
    assert model(x, output_hidden_states=False, output_attentions=False).to_tuple()[0].shape == (1, 10)


@pytest.mark.parametrize("attentions", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(attentions):
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = hf.DinatForImageClassification(small(drop_path_rate=0.0)).train()
        if enabled:
            model.activation_checkpointing_enable()
        assert model.is_activation_checkpointing == enabled
        model(image((64, 64)), output_attentions=attentions).logits.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["DinatForImageClassification", "DinatBackbone"])
def test_compile(kind):
    """In one graph, including attention weights and feature maps."""
    model = getattr(hf, kind)(small(depths=[1, 1], num_heads=[1, 2], dilations=[[2], [1]])).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = [m(image((64, 64)), output_attentions=True, output_hidden_states=True) for m in (model, compiled)]
    for found, expected in zip(*(out.to_tuple() for out in outputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_initialization_follows_the_configuration():
    model = hf.DinatForImageClassification(small(layer_scale_init_value=0.25, initializer_range=0.5, embed_dim=64))
    block = model.dinat.encoder.levels[1].blocks[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(block.gamma1, torch.full((128,), 0.25)) and torch.equal(block.gamma2, block.gamma1)
    assert not block.attn.qkv.bias.any() and torch.equal(block.norm1.weight, torch.ones(128))
    assert block.attn.rpb.std().item() > 0.3


def test_layers_follow_the_configuration():
    model = hf.NatModel(
        small("nat", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, hidden_act="relu", layer_norm_eps=1e-3)
    )
    block = model.encoder.levels[0].blocks[0]
    assert (model.dropout.p, block.mlp.drop1.p, block.mlp.drop2.p) == (0.1, 0.0, 0.1)
    assert (block.attn.attn_drop.p, block.attn.proj_drop.p) == (0.2, 0.2)
    assert isinstance(block.mlp.act, nn.ReLU)
    assert (block.norm1.eps, model.layernorm.eps, model.embeddings.norm.eps) == (1e-3, 1e-3, 1e-5)
    x = image((64, 64))
    assert not torch.equal(model.train()(x).pooler_output, model(x).pooler_output)


def test_other_number_of_labels(hub_folder):
    model = AutoModelForImageClassification.from_pretrained(hub_folder, num_labels=3, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 3


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"patch_size": 8}, "patch_size.*layout"),
        ({"layout": "wibble"}, "layout.*wibble"),
        ({"kernel_size": None}, "kernel_size"),
        ({"dilations": [[1], [1]]}, "dilations"),
        ({"layout": "isotropic", "patch_size": 16, "layer_scale_init_value": 0.0}, "depths.*num_heads"),
        ({"layout": "isotropic", "patch_size": 16}, "layer_scale_init_value"),
        (
            {
                "layout": "isotropic",
                "patch_size": 16,
                "layer_scale_init_value": 0,
                "depths": [3],
                "num_heads": [2],
                "dilations": None,
            },
            "dilations",
        ),
        ({"hidden_act": "wibble"}, "hidden_act.*wibble"),
    ],
)
def test_invalid_configuration(changes, names):
    with pytest.raises(ValueError, match=names):
        hf.DinatModel(small(**changes))


def test_invalid_images():
    model = hf.NatModel(small("nat"))
    with pytest.raises(ValueError, match="pixel_values"):
        model()
    with pytest.raises(ValueError, match=r"pixel_values.*\(1, 1, 64, 64\)"):
        model(torch.zeros(1, 1, 64, 64))


# ----- conversion from timm models and back -----


def variants():
    """Return one small model of each kind."""
    return [
        NAT(depths=(1, 2), num_heads=(2, 4), embed_dim=16, kernel_size=3, layer_scale=1e-5, num_classes=5),
        DiNAT(depths=(2, 2), num_heads=(2, 4), embed_dim=16, dilations=([1, 2], [1, 1]), drop_path_rate=0.2),
        DiNAT_s(depths=(2, 1), num_heads=(2, 4), embed_dim=16, dilations=([1, 4], [1]), mlp_ratio=2.0, num_classes=5),
        Isotropic(depth=2, num_heads=2, embed_dim=16, dilations=(1, 2), kernel_size=5, num_classes=5),
        Isotropic(depth=2, num_heads=2, embed_dim=16, kernel_size=None, img_size=(64, 96), num_classes=5, in_chans=3),
    ]


@pytest.mark.parametrize("index", range(5))
def test_timm_model_to_folder_and_back(tmp_path, index):
    model = variants()[index].eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = image((64, 96))
    with torch.no_grad():
        expected = model(x)
    hf.from_timm(model).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    out = loaded(x, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected, atol=1e-6, rtol=1e-6)
    assert len(out.attentions) == len(loaded.config.depths) == len(out.hidden_states) - 1
    assert torch.equal(out.attentions[0].sum(-1).round(decimals=4), torch.ones(out.attentions[0].shape[:-1]))
    again = variants()[index]
    assert load_weights(again, read_weights(tmp_path / "model.safetensors"), tmp_path) == []
    assert same_weights(again, model)


QUICK = ("nat_mini", "dinat_mini", "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small")  # the others are slow


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in timm.list_models(["nat_*", "dinat_*", "vitrpb_*"])
    ],
)
def test_every_model_has_a_configuration(name):
    """A model built from the configuration has the same weights."""
    with torch.device("meta"):
        model = timm.create_model(name)
        config = make_config(model)
        made = AutoModelForImageClassification.from_config(AutoConfig.for_model(**config.to_dict()))
        assert (type(config) is hf.DinatConfig) == name.startswith("dinat")
        assert made.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
        again = hf.from_timm(model)
    shapes = [{key: x.shape for key, x in m.state_dict().items()} for m in (made, again)]
    assert shapes[0] == shapes[1]
    assert config.num_labels == model.num_classes
    assert config.drop_path_rate > 0


def test_labels_and_preprocessing_of_a_published_model(tmp_path):
    model = timm.create_model("dinat_large_384", depths=(1, 1), num_heads=(1, 2), embed_dim=32, dilations=((1,), (1,)))
    assert hf.from_timm(model).config.id2label[0].startswith("tench")
    processor = hf.image_processor(model)
    processor.save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8))
    prepared = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt").pixel_values
    assert prepared.shape == (1, 3, 384, 384)
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    expected = timm.data.create_transform(**config)(picture)
    assert (prepared[0] - expected).abs().max() < 0.05  # torchvision resizes PIL images differently


@pytest.mark.parametrize(
    ("repository", "image_size", "expected"),
    [
        ("", 224, (256, 224)),
        ("", [384, 384], (384, 384)),
        ("shi-labs/dinat-mini-in1k-224", 224, (256, 224)),
        ("shi-labs/dinat-large-in22k-in1k-384", 224, (384, 384)),  # whose config.json may omit the size
    ],
)
def test_preprocessing_of_a_transformers_model(repository, image_size, expected):
    config = hf.DinatConfig(depths=[1], num_heads=[1], dilations=[[1]], embed_dim=32, image_size=image_size)
    config.name_or_path = repository
    processor = hf.image_processor(hf.DinatForImageClassification(config))
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == expected
    published = hf.image_processor(timm.create_model("nat_mini"))
    for name in ("image_mean", "image_std", "resample"):
        assert getattr(processor, name) == getattr(published, name)


def test_preprocessing_of_an_exported_model():
    model = timm.create_model("dinat_large_384", depths=(1, 1), num_heads=(1, 2), embed_dim=32, dilations=((1,), (1,)))
    assert hf.image_processor(hf.from_timm(model)).to_dict() == hf.image_processor(model).to_dict()


def test_preprocessing_of_other_models():
    with pytest.raises(ValueError, match="Linear"):
        hf.image_processor(nn.Linear(2, 2))
    gray = hf.NatForImageClassification(hf.NatConfig(depths=[1], num_heads=[1], embed_dim=32, num_channels=1))
    with pytest.raises(ValueError, match="num_channels"):
        hf.image_processor(gray)


def test_only_complete_classifiers_are_exported():
    for model in (nn.Linear(2, 2), NAT(depths=(1,), num_heads=(2,), global_pool="")):
        with pytest.raises(ValueError, match=type(model).__name__):
            hf.from_timm(model)


# ----- inside pipelines and detectors -----


def test_pipeline(tmp_path):
    model = NAT(depths=(1, 1), num_heads=(1, 2), embed_dim=32, num_classes=3)
    model.pretrained_cfg = timm.get_pretrained_cfg("nat_mini").to_dict()
    exported = hf.from_timm(model)
    exported.config.id2label = {0: "cat", 1: "dog", 2: "bird"}
    exported.save_pretrained(tmp_path)
    hf.image_processor(model).save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    result = classify(Image.new("RGB", (300, 200), "red"), top_k=3)
    assert {entry["label"] for entry in result} == {"cat", "dog", "bird"}
    assert sum(entry["score"] for entry in result) == pytest.approx(1, abs=1e-3)


def detector_config():
    return small(out_features=ALL_STAGES[1:], embed_dim=16, kernel_size=3)


def test_mask2former(tmp_path):
    """Forward, backward, and files, in which the backbone's weights have the names of the hub."""
    config = Mask2FormerConfig(
        backbone_config=detector_config(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_queries=4,
        train_num_points=64,
        num_labels=3,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    assert isinstance(model.model.pixel_level_module.encoder, hf.DinatBackbone)
    x = image((64, 64))
    out = model(x, mask_labels=[torch.ones(1, 64, 64)], class_labels=[torch.tensor([1])])
    out.loss.backward()
    assert out.loss.isfinite()
    assert model.model.pixel_level_module.encoder.encoder.levels[0].blocks[0].attn.rpb.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    prefix = "model.pixel_level_module.encoder.encoder.levels.0.layers.0."
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {f"{prefix}attention.self.query.weight", f"{prefix}layer_scale_parameters"} <= names
    again = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert same_weights(again, model)


# Kernel sizes and dilations of the published OneFormer-DiNAT configurations; COCO and ADE20K share theirs.
_LARGE_MAPS = [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2, 1, 2, 1]]
_ONEFORMER = {
    "coco": (11, _LARGE_MAPS),
    "ade20k": (11, _LARGE_MAPS),
    "cityscapes": (7, [[1, 18, 1], [1, 5, 1, 9], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]]),
}


@pytest.mark.parametrize("data", _ONEFORMER)
def test_published_oneformer_configurations(data):
    kernel_size, dilations = _ONEFORMER[data]
    backbone = hf.DinatConfig(
        embed_dim=192,
        depths=[3, 4, 18, 5],
        num_heads=[6, 12, 24, 48],
        kernel_size=kernel_size,
        dilations=dilations,
        mlp_ratio=2.0,
        drop_path_rate=0.3,
        out_features=ALL_STAGES[1:],
    )
    config = OneFormerConfig.from_dict(OneFormerConfig(backbone_config=backbone, is_training=False).to_dict())
    with torch.device("meta"):
        model = OneFormerModel(config)
    assert isinstance(model.pixel_level_module.encoder, hf.DinatBackbone)
    assert model.pixel_level_module.encoder.channels == [192, 384, 768, 1536]
    assert model.pixel_level_module.encoder.encoder.levels[0].blocks[1].attn.dilation == (dilations[0][1],) * 2


def test_oneformer_runs():
    config = OneFormerConfig(
        backbone_config=detector_config(),
        is_training=False,
        hidden_dim=32,
        mask_dim=32,
        conv_dim=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        num_queries=4,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        task_seq_len=7,
    )
    model = OneFormerModel(config)
    out = model(image((64, 64)), task_inputs=torch.zeros(1, 7))
    assert out.transformer_decoder_mask_predictions.isfinite().all()
    out.transformer_decoder_mask_predictions.sum().backward()
    assert model.pixel_level_module.encoder.encoder.levels[0].blocks[0].attn.rpb.grad.abs().sum() > 0


def test_without_transformers(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ModuleNotFoundError('no transformers', name='transformers')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport natzoo\nimport natzoo.hf"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode
    assert "ModuleNotFoundError: natzoo.hf" in result.stderr


# ----- names of files in plain state dicts, and configurations of transformers -----


def scrambled(model):
    """Return a copy of the model with other values in all parameters."""
    again = copy.deepcopy(model)
    for parameter in again.parameters():
        nn.init.normal_(parameter)
    return again


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.NatForImageClassification(small("nat", layer_scale_init_value=0.0)),
        lambda: hf.DinatForImageClassification(small(layer_scale_init_value=0.5)),
        lambda: hf.DinatModel(small(qkv_bias=False)),
        lambda: AutoBackbone.from_config(detector_config()),
        lambda: UperNetForSemanticSegmentation(uper_net_config(detector_config())),
    ],
    ids=["nat", "dinat", "model", "backbone", "segmenter"],
)
def test_load_state_dict_takes_the_names_of_files(tmp_path, make):
    model = scrambled(make())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() != model.state_dict().keys()
    for weights in (saved, model.state_dict()):
        again = scrambled(model)
        names = list(weights)
        again.load_state_dict(weights, strict=True)
        assert same_weights(again, model)
        assert list(weights) == names


def test_state_dict_without_a_part_of_a_weight(tmp_path):
    model = hf.DinatModel(small())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    query = next(name for name in saved if name.endswith("self.query.weight"))
    del saved[query]
    found = model.load_state_dict(saved, strict=False)
    (missing,) = found.missing_keys
    assert missing.endswith("attn.qkv.weight") and len(found.unexpected_keys) == 2


def uper_net_config(backbone):
    channels = {"auxiliary_in_channels": 4 * backbone.embed_dim, "auxiliary_channels": 16}
    return UperNetConfig(backbone_config=backbone, hidden_size=16, **channels)


def test_configuration_class_of_transformers():
    """Code may import it; the models are those of this package."""
    fields = {name: value for name, value in GOLDEN["dinat-128x128"]["config"].items() if name != "model_type"}
    config = transformers.DinatConfig(**fields, out_features=ALL_STAGES[1:])
    assert type(config) is not hf.DinatConfig
    for auto, kind in ((AutoModel, "Model"), (AutoModelForImageClassification, "ForImageClassification")):
        assert type(auto.from_config(config)) is getattr(hf, f"Dinat{kind}")
    backbone = AutoBackbone.from_config(config)
    assert type(backbone) is hf.DinatBackbone and backbone.channels == [32, 64, 128, 256]
    segmenter = UperNetForSemanticSegmentation(uper_net_config(config))
    assert type(segmenter.backbone) is hf.DinatBackbone
    assert segmenter.eval()(image((64, 64))).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"natzoo\.hf\.DinatConfig"):
        hf.DinatModel(config)
    with pytest.raises(ValueError, match=r"natzoo\.hf\.NatConfig"):
        hf.NatModel(config)


@pytest.mark.parametrize("way", ["resume", "best"])
@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_trainer_keeps_the_backbone(tmp_path, way, kind):
    pytest.importorskip("accelerate")
    if kind == "classifier":
        model = hf.DinatForImageClassification(small(num_labels=3))
        example = {"pixel_values": image((32, 32))[0], "labels": 1}
    else:
        model = UperNetForSemanticSegmentation(uper_net_config(detector_config()))
        example = {"pixel_values": image((64, 64))[0], "labels": torch.ones(64, 64, dtype=torch.int64)}

    def trainer(model, **changes):
        options = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "learning_rate": 1e-2, "save_strategy": "steps"}
        options |= {"eval_strategy": "steps", "report_to": [], "use_cpu": True, "disable_tqdm": True, **changes}
        arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **options)
        return Trainer(model, arguments, train_dataset=[example] * 4, eval_dataset=[example])

    if way == "best":
        run = trainer(model, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
        run.train()
        checkpoint = run.state.best_model_checkpoint
        assert checkpoint.endswith("-1")  # the loss falls
    else:
        trainer(model).train()
        model, checkpoint = scrambled(model), tmp_path / "checkpoint-2"
        trainer(model).train(resume_from_checkpoint=str(checkpoint))
    assert same_weights(model, type(model).from_pretrained(checkpoint))
