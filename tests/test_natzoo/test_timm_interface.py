"""What timm and torchvision expect of a model: feature extractors, classifiers, creation arguments, tracing."""

from __future__ import annotations

import io
import warnings

import pytest
import timm
import torch
from small_models import SMALL, small
from timm.models import FeatureListNet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.feature_extraction import create_feature_extractor

import natzoo  # noqa: F401  registers the models
from natzoo.checkpoints import write_checkpoint


def random_images(*size: int, batch: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def features(name: str, **kwargs) -> nn.Module:
    """Return a feature extractor with random weights."""
    torch.manual_seed(0)
    return timm.create_model(name, features_only=True, out_indices=(0, 1), **{**SMALL[name], **kwargs}).eval()


# ----- feature extractors -----


@pytest.mark.parametrize("feature_cls", ["hook", "fx"])
@pytest.mark.parametrize("name", SMALL)
def test_features_only(name, feature_cls):
    """The maps of the default, channels last."""
    x = random_images(64, 96)
    extractor, expected = features(name, feature_cls=feature_cls), features(name)
    assert extractor.output_fmt == "NHWC"
    maps = extractor(x)
    assert [feature.shape[-1] for feature in maps] == extractor.feature_info.channels()
    for feature, reference in zip(maps, expected(x), strict=True):
        torch.testing.assert_close(feature.permute(0, 3, 1, 2), reference)
    sum(feature.sum() for feature in maps).backward()


@pytest.mark.parametrize("feature_cls", ["list", "dict", FeatureListNet])
def test_features_only_of_other_kinds(feature_cls):
    with pytest.raises(ValueError, match="feature_cls"):
        features("nat_mini", feature_cls=feature_cls)


@pytest.mark.parametrize("name", SMALL)
def test_torchvision_feature_extractor(name):
    model = small(name)
    nodes = {info["module"]: f"map{index}" for index, info in enumerate(model.feature_info)}
    extractor = create_feature_extractor(model, {**nodes, "head": "logits"})
    for size in ((64, 96), (80, 33)):
        x = random_images(*size)
        found = extractor(x)
        torch.testing.assert_close(found.pop("logits"), model(x))
        expected = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
        for feature, reference in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(feature, reference)


# ----- classifiers -----


@pytest.mark.parametrize("training", [False, True])
def test_reset_classifier_keeps_mode_and_dtype(training):
    model = small(drop_rate=0.5).to(torch.float64).train(training)
    model.reset_classifier(7)
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))
    assert model.head.weight.dtype == torch.float64
    x = random_images(64, 64).double()
    assert torch.equal(model(x), model(x)) == (not training)
    assert model.head_drop.p == 0.5


def test_reset_classifier_on_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model("nat_mini", **SMALL["nat_mini"])
    model.reset_classifier(7)
    assert model.head.weight.is_meta


# ----- arguments -----


@pytest.mark.parametrize("name", SMALL)
def test_channels(name):
    assert small(name).in_chans == 3
    model = small(name, in_chans=5)
    assert model.in_chans == 5
    assert model(random_images(64, 64, channels=5)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_image_size(name):
    model = small(name, img_size=(64, 96))
    assert model(random_images(64, 96)).shape == (1, 5)


@pytest.mark.parametrize("name", SMALL)
def test_attention_dropout(name):
    model = small(name, attn_drop_rate=0.5)
    x = random_images(64, 64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("field", ["url", "file"])
def test_weights_of_a_pretrained_cfg_overlay(field, tmp_path):
    path = tmp_path / "weights.pth"
    model = small(seed=3)
    write_checkpoint(path, {"state_dict": model.state_dict()})
    location = f"file://{path}" if field == "url" else str(path)
    for kwargs in ({}, {"num_classes": 2}):
        loaded = timm.create_model(
            "nat_mini", pretrained=True, pretrained_cfg_overlay={field: location}, **{**SMALL["nat_mini"], **kwargs}
        )
        assert torch.equal(loaded.norm.weight, model.norm.weight)
        assert torch.equal(loaded.head.weight, model.head.weight) == (not kwargs)


# ----- tracing -----


@pytest.mark.parametrize("name", SMALL)
def test_traced_with_gradients_and_other_sizes(name):
    model = small(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, random_images(64, 64))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for size in ((64, 64), (96, 70), (48, 32)):
        x = random_images(*size, batch=2)
        found, expected = loaded(x), model(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        gradients = [torch.autograd.grad(out.sum(), m.parameters()) for out, m in ((found, loaded), (expected, model))]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", SMALL)
def test_script(name):
    model = small(name)
    for module in (model, next(module for module in model.modules() if hasattr(module, "rpb"))):
        with pytest.raises(ValueError, match=rf"{type(module).__name__}.*torch\.jit\.trace"):
            torch.jit.script(module)


@pytest.mark.parametrize("name", SMALL)
def test_fake_tensors(name):
    with FakeTensorMode():
        model = timm.create_model(name, **SMALL[name])
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 5)
