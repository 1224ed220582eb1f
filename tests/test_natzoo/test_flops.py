"""MACs of the published models compared with the papers, and FLOPs compared with MACs."""

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

import natzoo  # noqa: F401  registers the models
from natten.flops import add_natten_handle, get_flops
from natzoo.checkpoints import zoo_entries

# Billions of MACs for one image at the published resolution; the papers write FLOPs.
CLASSIFIERS = {name: entry.facts for name, entry in zoo_entries().items() if entry.task == "classification"}
PUBLISHED = {name: facts["macs"] for name, facts in CLASSIFIERS.items() if "macs" in facts}
QUICK = ("nat_mini", "dinat_mini")  # the others take two minutes together


def blank_image(model, device="cpu"):
    return torch.zeros(1, *model.default_cfg["input_size"], device=device)


def flops(call):
    """Return the FLOPs counted by torch."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_models_with_published_macs():
    assert PUBLISHED.keys() == {name for name in timm.list_models(["*nat_*", "vitrpb_*"]) if "21k" not in name}
    assert len(PUBLISHED) == 22


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED])
def test_macs_match_the_papers(name):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        giga_macs = get_flops(model, blank_image(model), disable_warnings=True) / 1e9
    assert giga_macs == pytest.approx(PUBLISHED[name], abs=0.1, rel=0.003)


def test_flops_are_twice_the_macs():
    """Exactly, except that only fvcore counts LayerNorm and the relative position bias."""
    model = timm.create_model("dinat_mini").eval()
    x = blank_image(model)
    with torch.no_grad():
        counter = add_natten_handle(FlopCountAnalysis(model, x))
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        macs = counter.by_operator()
        assert macs.keys() == {"conv", "linear", "attention_forward", "layer_norm", "rpb"}
        assert flops(lambda: model(x)) == 2 * (macs["conv"] + macs["linear"] + macs["attention_forward"])


@pytest.mark.parametrize("name", ["nat_mini", "dinat_small", "dinat_large_384_11x11"])
def test_flops_of_a_training_step(name):
    """Backward costs twice the forward FLOPs, attention 2.5 times; the image needs no gradient."""
    with torch.device("meta"):
        model = timm.create_model(name)
    x = blank_image(model, "meta")
    with FlopCounterMode(display=False) as forward:
        logits = model(x)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    ran, first_conv = forward.get_flop_counts()["Global"], model.patch_embed.proj[0]
    attention = ran[torch.ops.natten.attention_forward]
    height, width = blank_image(model).shape[-2:]
    gradient_of_image = 2 * first_conv.weight.numel() * (height // 2) * (width // 2)
    expected = 2 * forward.get_total_flops() + attention // 2 - gradient_of_image
    assert backward.get_total_flops() == expected
    assert backward.get_flop_counts()["Global"][torch.ops.natten.attention_backward] == attention * 5 // 2


def test_attention_flops_of_the_first_stage():
    """56 x 56 tokens, 2 heads of 32 channels, windows of 49 keys, three blocks."""
    with torch.device("meta"):
        model = timm.create_model("nat_mini").eval()
    with FlopCounterMode(display=False) as counter:
        model.levels[0].forward_blocks(torch.empty(1, 56, 56, 64, device="meta"))
    assert counter.get_flop_counts()["Global"][torch.ops.natten.attention_forward] == 3 * 4 * 56 * 56 * 2 * 32 * 49
