"""tools/flops.py on registered models and on configs."""

import csv
from pathlib import Path

import flops
import pytest
from openmmlab_extra import MISSING

CONFIGS = Path(__file__).parents[2] / "configs"
needs_openmmlab = pytest.mark.skipif(bool(MISSING), reason="the extra openmmlab is not installed")


def test_table_of_models(capsys):
    flops.main(["nat_mini", "dinat_large_384"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert rows[0].split()[:10] == ["nat_mini", "224", "x", "224", "19.98", "M", "2.7", "G", "5.4", "G"]
    assert rows[1].split()[:6] == ["dinat_large_384", "384", "x", "384", "200.94", "M"]
    assert float(rows[1].split()[6]) == pytest.approx(89.7, rel=0.01)


def test_another_size(capsys):
    flops.main(["nat_mini", "vit_tiny_patch16_224", "--size", "448", "448"])
    nat, vit = capsys.readouterr().out.splitlines()[1:]
    assert float(nat.split()[6]) == pytest.approx(4 * 2.7, rel=0.02)
    assert float(vit.split()[6]) > 4 * 1.3  # has a fixed size, and its attention grows quadratically


def test_per_layer_by_hand(tmp_path, capsys):
    """The stem and the first attention layer: 56 x 56 tokens, 2 heads of 32, windows of 49 tokens."""
    flops.main(["nat_mini", "--per-layer", "6", "--csv", str(tmp_path / "layers.csv")])
    assert "    levels.0 " in capsys.readouterr().out
    with (tmp_path / "layers.csv").open(newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    tokens = 56 * 56
    found = lambda name: [int(rows[name][key]) for key in ("parameters", "macs", "activations")]  # noqa: E731
    products = 112 * 112 * 32 * 27 + tokens * 64 * 32 * 9
    assert found("patch_embed.proj") == [32 * 28 + 64 * 289, products, 112 * 112 * 32 + tokens * 64]
    attention = found("levels.0.blocks.0.attn")
    assert attention[0] == 4 * 64 * 64 + 4 * 64 + 2 * 13 * 13
    assert attention[1:] == [tokens * (4 * 64 * 64 + 2 * 64 * 49), tokens * (3 + 1 + 1) * 64]
    stages = [found(f"levels.{number}") for number in range(4)]
    assert [sum(column) for column in zip(*stages, strict=True)] == found("levels")
    whole = [found("patch_embed"), found("levels"), found("norm"), found("head")]
    assert [sum(column) for column in zip(*whole, strict=True)] == found("")
    assert int(rows[""]["flops"]) == 2 * int(rows[""]["macs"])


@pytest.mark.parametrize(("what", "error"), [("nat_huge", ValueError), ("nothing.py", FileNotFoundError)])
def test_unknown_names(what, error):
    with pytest.raises(error, match=what):
        flops.main([what])


@needs_openmmlab
def test_config(capsys):
    flops.main([str(CONFIGS / "segmentation" / "coco_ade_upernet_nat.py"), "--per-layer", "1"])
    model, *parts = capsys.readouterr().out.splitlines()[1:]
    assert model.split()[:4] == ["coco_ade_upernet_nat", "192", "x", "192"]
    macs = {line.split()[0]: float(line.split()[3]) for line in parts}
    assert macs["backbone"] + macs["decode_head"] == pytest.approx(float(model.split()[6]), abs=0.1)


@needs_openmmlab
@pytest.mark.parametrize(
    "model",
    [
        "roi_head=dict(mask_head=None, mask_roi_extractor=None)",
        "_delete_=True, type='FCOS', backbone=_base_.model.backbone, neck=_base_.model.neck, "
        "bbox_head=dict(type='FCOSHead', num_classes=1, in_channels=64, feat_channels=64)",
    ],
)
def test_detector_without_masks(tmp_path, capsys, model):
    base = CONFIGS / "detection" / "nuclei_mask_rcnn_nat.py"
    (tmp_path / "boxes.py").write_text(f'_base_ = "{base}"\nmodel = dict({model})\n')
    flops.main([str(tmp_path / "boxes.py"), "--per-layer", "2"])
    whole, *parts = capsys.readouterr().out.splitlines()[1:]
    names = [line.split()[0] for line in parts]
    assert any("bbox_head" in name for name in names) and not any("mask" in name for name in names)
    backbone = next(line for line in parts if line.split()[0] == "backbone")
    assert float(whole.split()[6]) > float(backbone.split()[3])
