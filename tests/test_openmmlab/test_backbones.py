"""Backbones: agreement with the original implementation, options and pretrained weights."""

import json
from pathlib import Path

import pytest
import timm
import torch
from deterministic import fill, image
from mmengine.registry import MODELS

from natzoo.checkpoints import write_checkpoint
from natzoo.openmmlab import NAT, DiNAT_s

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "backbones.json").read_text())
TYPES = {"nat_mini": "NAT", "dinat_mini": "DiNAT", "dinat_s_tiny": "DiNAT_s"}
SMALL = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "embed_dim": 16, "kernel_size": 3}


@pytest.mark.parametrize("name", GOLDENS)
def test_parameters_match_published_checkpoints(name):
    model = MODELS.build({"type": TYPES[name], **GOLDENS[name]["config"]})
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == GOLDENS[name]["state_dict"]


@pytest.mark.parametrize("size", ["224x224", "200x312"])
@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_maps_match_original_implementation(name, size):
    golden = GOLDENS[name]["sizes"][size]
    model = MODELS.build({"type": TYPES[name], **GOLDENS[name]["config"]}).eval()
    fill(model)
    with torch.no_grad():
        maps = model(image(tuple(map(int, size.split("x")))))
    assert [list(x.shape) for x in maps] == golden["shapes"]
    for x, norm, total, corner in zip(maps, golden["norms"], golden["sums"], golden["corner"], strict=True):
        assert x.is_contiguous()
        assert x.double().norm().item() == pytest.approx(norm, rel=1e-4)
        assert x.double().sum().item() == pytest.approx(total, abs=1e-4 * norm)
        torch.testing.assert_close(x[0, :4, -1, -1], torch.tensor(corner), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_registered_in_mmdet_and_mmseg(scope):
    registries = pytest.importorskip(f"{scope}.registry")
    assert registries.MODELS.get("NAT") is registries.MODELS.get("DiNAT") is NAT
    assert registries.MODELS.get("DiNAT_s") is DiNAT_s


def test_arch_sets_sizes_of_classifier():
    with torch.device("meta"):
        model = NAT("dinat_tiny", dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]])
        classifier = timm.create_model("dinat_tiny")
    theirs = {key: value.shape for key, value in classifier.state_dict().items()}
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert theirs.keys() - ours.keys() == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert all(theirs[key] == ours[key] for key in theirs.keys() & ours.keys())
    assert model.levels[0].blocks[1].attn.dilation[0] == 28


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"arch": "dinat_s_tiny"}, "arch"),
        ({"arch": "nat_tiny"}, "embed_dim"),  # cannot be combined with SMALL
        ({"out_indices": (0, 4)}, "out_indices"),
        ({"out_indices": (1, 0)}, "out_indices"),
        ({"frozen_stages": 5}, "frozen_stages"),
    ],
)
def test_invalid_options_are_rejected(options, argument):
    with pytest.raises(ValueError, match=argument):
        NAT(**{**SMALL, **options})


def test_subset_of_maps():
    every, two = NAT(**SMALL).eval(), NAT(**SMALL, out_indices=(1, 3)).eval()
    assert {name for name, _ in two.named_children() if name.startswith("norm")} == {"norm", "norm1", "norm3"}
    two.load_state_dict({k: v for k, v in every.state_dict().items() if not k.startswith(("norm0", "norm2"))})
    x = image((64, 96))
    for mine, full in zip(two(x), every(x)[1::2], strict=True):
        torch.testing.assert_close(mine, full)


@pytest.mark.parametrize("make", [NAT, DiNAT_s])
@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (0, 3)])
def test_trainable_parameters_get_gradients(make, out_indices):
    """Layers after the last map are not trainable: DistributedDataParallel would wait for their gradients."""
    model = make(**SMALL, out_indices=out_indices).train()
    sum(x.sum() for x in model(image((64, 64)))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (parameter.grad is not None), name
    # Published files contain the layers after the last map too.
    assert f"{model.stages_name}.3.blocks.0.mlp.fc1.weight" in model.state_dict()


@pytest.mark.parametrize("make", [NAT, DiNAT_s])
@pytest.mark.parametrize("frozen_stages", [0, 2, 4])
def test_frozen_stages_are_not_trained(make, frozen_stages):
    torch.manual_seed(0)
    model = make(**SMALL, frozen_stages=frozen_stages)
    assert model.train() is model
    frozen = {f"{model.stages_name}.{stage}." for stage in range(frozen_stages)} | {"patch_embed."}
    frozen |= {f"norm{stage}." for stage in range(frozen_stages)}
    trained = [x for x in model(image((64, 64), batch=2)) if x.requires_grad]
    if trained:
        sum((x * torch.randn_like(x)).sum() for x in trained).backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(tuple(frozen))
        assert parameter.requires_grad is not is_frozen, name
        assert (parameter.grad is None) is is_frozen, name
    assert [stage.training for stage in model.stages] == [index >= frozen_stages for index in range(4)]


def test_gradient_checkpointing_keeps_gradients():
    torch.manual_seed(0)
    plain, saving = NAT(**SMALL).train(), NAT(**SMALL, with_cp=True).train()
    saving.load_state_dict(plain.state_dict())
    calls = {plain: 0, saving: 0}
    for model in (plain, saving):

        def count(*_, model=model):
            calls[model] += 1

        model.levels[0].blocks[0].attn.register_forward_pre_hook(count)
        sum(x.square().mean() * (i + 1) for i, x in enumerate(model(image((64, 64))))).backward()
    assert (calls[plain], calls[saving]) == (1, 2)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


# ----- weights -----


@pytest.fixture
def classifier(tmp_path):
    """Path and weights of a checkpoint of a small classifier with random weights."""
    model = timm.create_model("nat_mini", **SMALL, num_classes=5)
    for parameter in model.parameters():
        parameter.data.normal_()
    path = tmp_path / "classifier.pth"
    write_checkpoint(path, model.state_dict())
    return path, model.state_dict()


@pytest.mark.parametrize("how", ["init_cfg", "pretrained"])
def test_loads_weights_of_classifier(classifier, how):
    path, weights = classifier
    start = {
        "init_cfg": {"init_cfg": {"type": "Pretrained", "checkpoint": str(path)}},
        "pretrained": {"pretrained": str(path)},
    }
    model = MODELS.build({"type": "NAT", **SMALL, **start[how]})
    model.init_weights()
    own = model.state_dict()
    for name, value in weights.items():
        if not name.startswith(("norm.", "head.")):
            assert torch.equal(own[name], value), name
    assert torch.equal(own["norm2.weight"], torch.ones(64))


def test_position_bias_is_resized_to_another_window(classifier):
    path, _ = classifier
    model = NAT(**{**SMALL, "kernel_size": 5}, pretrained=str(path))
    model.init_weights()
    assert model.levels[0].blocks[0].attn.rpb.shape == (1, 9, 9)


def test_weights_of_another_backbone_are_rejected(classifier):
    path, _ = classifier
    model = DiNAT_s(**SMALL, pretrained=str(path))
    with pytest.raises(ValueError, match=r"classifier\.pth"):
        model.init_weights()


def test_init_cfg_of_mmengine():
    torch.manual_seed(0)
    model = NAT(**SMALL, init_cfg={"type": "Constant", "layer": "Linear", "val": 0.25})
    model.init_weights()
    assert (model.levels[0].blocks[0].mlp.fc1.weight == 0.25).all()


def test_missing_checkpoint():
    model = NAT(**SMALL, pretrained="nowhere/weights.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere/weights\.pth"):
        model.init_weights()
