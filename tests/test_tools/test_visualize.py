"""Pictures of runs and of attention."""

import pytest
import timm
import torch
import visualize
from PIL import Image

import natzoo  # noqa: F401  registers the models
from natzoo.checkpoints import write_checkpoint

KWARGS = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "kernel_size": 3}
COLOURS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("dinat_mini", num_classes=2, dilations=[[2], [1]], **KWARGS).eval()


def test_curves(tmp_path, capsys):
    for name in ("nat", "dinat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.csv").write_text("epoch,train_loss,val_loss,top1\n0,2.0,1.9,30\n1,1.0,0.9,70\n")
    out = tmp_path / "pictures" / "curves.png"
    visualize.main(["curves", str(tmp_path / "nat"), str(tmp_path / "dinat"), "--out", str(out)])
    with Image.open(out) as image:
        assert image.size == (1500, 600)
    assert f"wrote {out}" in capsys.readouterr().out


def test_runs_without_figures(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no summary\.csv"):
        visualize.read_summary(tmp_path)
    (tmp_path / "summary.csv").write_text("epoch,top1\n")
    with pytest.raises(ValueError, match="has no rows yet"):
        visualize.read_summary(tmp_path)


def test_weights_of_a_token_lie_in_its_window(model):
    attention = model.levels[0].blocks[0].attn
    weights = visualize.token_weights(attention, torch.randn(1, 8, 9, 16), row=0, column=4)
    assert weights.sum().item() == pytest.approx(1.0)
    expected = torch.zeros(8, 9, dtype=torch.bool)
    expected[0:6:2, 2:8:2] = True  # dilation 2: the window is moved down at the upper border
    assert torch.equal(weights > 0, expected)


def test_attention_of_a_checkpoint(model, tmp_path):
    preprocessing = {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bicubic", **COLOURS}
    record = {
        "model": "dinat_mini",
        "model_kwargs": {**KWARGS, "dilations": [[2], [1]]},
        "num_classes": 2,
        "classes": ["cat", "dog"],
        "preprocessing": preprocessing,
    }
    write_checkpoint(tmp_path / "best.pth", {"model": model.state_dict(), "record": record})
    Image.effect_noise((40, 40), 80).save(tmp_path / "a.png")
    out = tmp_path / "attention.png"
    picture, checkpoint = str(tmp_path / "a.png"), str(tmp_path / "best.pth")
    visualize.main(["attention", picture, picture, "--checkpoint", checkpoint, "--out", str(out)])
    with Image.open(out) as image:
        assert image.size == (1125, 780)


def test_evidence_and_window(model):
    number, evidence, (row, column), weights = visualize.evidence_and_window(model, torch.randn(1, 3, 32, 40))
    assert number in (0, 1)
    assert evidence.shape == weights.shape == (8, 10)
    assert evidence[row, column] == evidence.max()
    assert weights[row, column] > 0


def test_a_model_without_neighborhood_attention():
    swin = timm.create_model("resnet10t", num_classes=2).eval()
    with pytest.raises(ValueError, match="no stages with neighborhood attention"):
        visualize.evidence_and_window(swin, torch.randn(1, 3, 32, 32))
