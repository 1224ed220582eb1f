"""Checkpoints of train.py as pretrained weights of timm models."""

import pytest
import timm
import torch

from natzoo.checkpoints import read_checkpoint, read_weights
from natzoo.classification import train

SMALL = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3}


@pytest.mark.parametrize("average", [False, True])
def test_checkpoints_of_a_run_are_pretrained_weights(tiny, run_folder, average):
    """The averaged weights if there are any; also for a feature extractor."""
    train.main(tiny(*(["--model-ema", "--model-ema-decay", "0.5"] if average else []), epochs=1))
    for name in ("last.pth", "best.pth"):
        path = run_folder / name
        expected = read_checkpoint(path)["model_ema" if average else "model"]
        arguments = {**SMALL, "pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
        model = timm.create_model("nat_mini", **arguments, num_classes=3)
        features = timm.create_model("nat_mini", **arguments, features_only=True, out_indices=(0, 1))
        for key, value in expected.items():
            assert torch.equal(model.state_dict()[key], value), key
            assert torch.equal(read_weights(path)[key], value), key
        key = "levels.1.blocks.0.attn.rpb"
        assert torch.equal(features.state_dict()[f"model.{key}"], expected[key])
