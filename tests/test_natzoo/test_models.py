"""Every registered model has timm's interface and the results of the original implementation."""

import ast
import copy
import functools
import json
from pathlib import Path

import pytest
import timm
import torch
from deterministic import fill, image
from timm.optim import param_groups_layer_decay

import natzoo
from natzoo.models import NAT, DiNAT, DiNAT_s, Isotropic
from natzoo.models._layers import NeighborhoodBlock

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN_MODELS = json.loads((GOLDENS / "models.json").read_text())
NAMES = timm.list_models(["nat_*", "dinat_*", "vitrpb_*"])
BIG = ("base", "large")  # slow to test, and different only in size
SLOW_IF_BIG = [
    pytest.param(name, marks=pytest.mark.slow) if any(word in name for word in BIG) else name for name in NAMES
]
CLASSES = 10

# Exact numbers of parameters.
PARAMETERS = {
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_large_21k": 232_976_131,
    "dinat_large_21k_11x11": 233_176_867,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "dinat_s_large_21k": 228_565_093,
    "nat_isotropic_small": 21_999_736,
    "nat_isotropic_base": 86_465_800,
    "dinat_isotropic_small": 21_999_736,
    "dinat_isotropic_base": 86_465_800,
    "vitrpb_small": 22_080_376,
    "vitrpb_base": 86_627_080,
}


@pytest.fixture(scope="module", params=SLOW_IF_BIG)
def model(request):
    """Create each model once, with random weights and 10 classes; tests modify a copy."""
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=CLASSES).eval()


def random_images(height=64, width=64, channels=3, batch=1):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def name_of(model):
    return model.default_cfg["architecture"]


def reductions(model):
    return [info["reduction"] for info in model.feature_info]


def blocks_of(model):
    """Return the names of all blocks, in order."""
    return [name for name, module in model.named_modules() if isinstance(module, NeighborhoodBlock)]


# ----- results of the original implementation -----


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_logits_and_gradients_match_the_original(name):
    golden = GOLDEN_MODELS[name]
    model = timm.create_model(name).eval()
    fill(model)
    x = image((224, 224)).requires_grad_()
    logits = model(x)
    torch.testing.assert_close(logits[0], torch.tensor(golden["logits"]), atol=2e-4, rtol=0)
    logits.logsumexp(-1).sum().backward()
    parameters = dict(model.named_parameters())
    for key, (norm, _) in golden["rpb_grad_norm_sum"].items():
        assert parameters[key].grad.norm().item() == pytest.approx(norm, rel=1e-3), key
    assert x.grad.norm().item() == pytest.approx(golden["input_grad_norm"], rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_keys_shapes_and_parameters_match_the_published_weights(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    shapes = json.loads((GOLDENS / "state_dicts.json").read_text()).get(name)
    if "21k" in name:  # for these only the number of parameters is known
        assert shapes is None
    else:
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_all_models_are_registered():
    assert sorted(NAMES) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", ["dinat_large.in22k_ft_in1k", "dinat_large_384.in22k_ft_in1k"])
def test_tag_does_not_change_the_architecture(name):
    with torch.device("meta"):
        tagged, plain = timm.create_model(name), timm.create_model(name.split(".")[0])
    assert str(tagged) == str(plain)
    assert tagged.pretrained_cfg["tag"] == "in22k_ft_in1k"
    assert tagged.pretrained_cfg["url"].startswith("https://")


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_protocol_of_the_published_weights(name):
    cfg = timm.get_pretrained_cfg(name)
    size, crop = (384, 1.0) if "384" in name else (224, 0.875)
    assert cfg.input_size == (3, size, size)
    classes = 21841 if "21k" in name else 1000
    assert (cfg.crop_pct, cfg.interpolation, cfg.num_classes) == (crop, "bicubic", classes)


# ----- interface -----


def test_forward_and_backward(model):
    model = copy.deepcopy(model).train()
    logits = model(random_images(batch=2))
    assert logits.shape == (2, CLASSES)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_any_size(model):
    with torch.inference_mode():
        assert model(random_images(97, 130)).shape == (1, CLASSES)
        reduction = reductions(model)[-1]
        size = (-(-97 // reduction), -(-130 // reduction))
        assert model.forward_features(random_images(97, 130)).shape == (1, *size, model.num_features)


def test_forward_intermediates(model):
    x = random_images(64, 96)
    with torch.inference_mode():
        final, maps = model.forward_intermediates(x, norm=True)
        torch.testing.assert_close(final, model.forward_features(x))
        torch.testing.assert_close(maps[-1], final.permute(0, 3, 1, 2))
        chosen = model.forward_intermediates(
            x, indices=[0, 2], stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        unnormalized = model.forward_intermediates(x, intermediates_only=True)
    for info, feature in zip(model.feature_info, maps, strict=True):
        assert feature.shape == (1, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])
    torch.testing.assert_close(chosen[0], unnormalized[0].permute(0, 2, 3, 1))
    torch.testing.assert_close(chosen[1], unnormalized[2].permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_features_only(model):
    features = timm.create_model(name_of(model), features_only=True, out_indices=(1, 3)).eval()
    missing, unexpected = features.load_state_dict(
        {f"model.{k}": v for k, v in model.state_dict().items()}, strict=False
    )
    assert not missing
    for key in unexpected:  # layers after the last map
        part = key.split(".")
        assert part[1] in ("norm", "head") or (part[1] == "layers" and int(part[2]) > 3), key
    x = random_images(64, 96)
    with torch.inference_mode():
        maps = features(x)
        expected = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert features.feature_info.channels() == [feature.shape[1] for feature in maps]
    assert features.feature_info.reduction() == [reductions(model)[1], reductions(model)[3]]
    for feature, reference in zip(maps, expected, strict=True):
        torch.testing.assert_close(feature, reference)


def test_classifier_can_be_replaced_and_removed(model):
    x = random_images()
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert pooled.shape == (1, model.num_features)
        torch.testing.assert_close(model.get_classifier()(pooled), model(x))
        changed = copy.deepcopy(model)
        changed.reset_classifier(3)
        assert changed(x).shape == (1, 3)
        changed.reset_classifier(0)
        torch.testing.assert_close(changed(x), pooled)
        changed.reset_classifier(0, global_pool="")
        side = 64 // reductions(model)[-1]
        assert changed(x).shape == (1, side, side, model.num_features)


def test_poolings(model):
    x = random_images()
    with torch.inference_mode():
        features = model.forward_features(x)
        mean, largest = features.mean((1, 2)), features.flatten(1, 2).max(1).values
        for name, expected in {"avg": mean, "max": largest, "avgmax": (mean + largest) / 2}.items():
            changed = copy.deepcopy(model)
            changed.reset_classifier(0, global_pool=name)
            torch.testing.assert_close(changed(x), expected)


def test_creation_without_classifier_and_with_one_channel(model):
    changed = timm.create_model(name_of(model), num_classes=0, in_chans=1).eval()
    with torch.inference_mode():
        assert changed(random_images(channels=1)).shape == (1, model.num_features)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    gradients, calls = [], []
    for enable in (False, True):
        copied = copy.deepcopy(model).train()
        for module in copied.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        copied.set_grad_checkpointing(enable)
        count = []
        first = copied.get_submodule(blocks_of(model)[0])
        first.attn.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        copied(random_images()).square().sum().backward()
        calls.append(len(count))
        gradients.append([p.grad for p in copied.parameters()])
    assert calls == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_layer_decay_groups_and_weight_decay(model):
    rpb = {name for name, _ in model.named_parameters() if name.endswith("rpb")}
    assert model.no_weight_decay() == rpb
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.9)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    blocks = blocks_of(model)
    assert scale[id(parameters["head.weight"])] == 1.0
    stem = next(name for name in parameters if name.startswith("patch_embed.proj"))
    assert scale[id(parameters[stem])] == pytest.approx(0.9 ** (len(blocks) + 1))
    for name, parameter in parameters.items():
        if ".downsample." in name:  # same group as the block before it
            last = [block for block in blocks if block.startswith(name.split(".downsample.")[0])][-1]
            assert scale[id(parameter)] == scale[id(parameters[f"{last}.attn.rpb"])]


# ----- arguments -----

SMALL = {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3, "num_classes": 5}


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"num_heads": (1, 2, 4)}, "num_heads.*depths"),
        ({"dilations": [[1]]}, "dilations.*depths"),
        ({"dilations": [[1], [1]]}, r"dilations\[1\].*depths\[1\]"),
        ({"embed_dim": 17}, "dim"),
        ({"global_pool": "token"}, "global_pool.*avgmax"),
        ({"output_stride": 16}, "output_stride.*out_indices"),
        ({"output_stride": 8, "features_only": True}, "output_stride.*out_indices"),
    ],
)
def test_contradictory_arguments(kwargs, names):
    kwargs = {**SMALL, "num_heads": (2, 2), **kwargs}
    with pytest.raises(ValueError, match=names):
        timm.create_model("nat_mini", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [({"dilations": (1, 2)}, "dilations.*depth"), ({"dilations": (1,), "kernel_size": None}, "dilations")],
)
def test_contradictory_arguments_of_isotropic_models(kwargs, names):
    with pytest.raises(ValueError, match=names):
        Isotropic(**{"depth": 1, **kwargs})


def test_unknown_argument():
    with pytest.raises(TypeError, match="wibble"):
        timm.create_model("nat_mini", wibble=1)


def test_no_class_attribute_is_a_partial():
    """Python 3.14 turns functools.partial objects in a class into methods."""
    found = [
        f"{path}:{statement.lineno}"
        for path in Path(natzoo.__file__).parent.rglob("*.py")
        for cls in ast.walk(ast.parse(path.read_text()))
        if isinstance(cls, ast.ClassDef)
        for statement in cls.body
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, ast.Call)
        if ast.unparse(statement.value.func).split(".")[-1] == "partial"
    ]
    assert not found
    for cls in {parent for model_class in (NAT, DiNAT, DiNAT_s, Isotropic) for parent in model_class.__mro__}:
        assert not [name for name, value in vars(cls).items() if isinstance(value, functools.partial)], cls
