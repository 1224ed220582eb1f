"""Files with the layout of the published detectors and segmenters, with random weights, load strictly."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from runs import load_config

import natzoo.openmmlab  # noqa: F401  registers the backbones
from natzoo.checkpoints import fit_detector, read_weights, write_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {"arch": None, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "embed_dim": 16, "dilations": None}
CHANNELS = [16, 32, 64, 128]


def small(name, **changes):
    """Build the model of a config with a tiny backbone."""
    cfg = load_config(CONFIGS / name)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(SMALL, init_cfg=None)
    for part in ("neck", "decode_head", "panoptic_head"):
        if part in cfg.model:
            cfg.model[part].in_channels = CHANNELS
    if "auxiliary_head" in cfg.model:
        cfg.model.auxiliary_head.in_channels = CHANNELS[2]
    cfg.merge_from_dict(changes)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    model.init_weights()
    return model


def predict(model, size=(64, 96)):
    """Return predictions for a random image."""
    from mmdet.structures import DetDataSample
    from mmseg.structures import SegDataSample

    kind = SegDataSample if hasattr(model, "decode_head") else DetDataSample
    sample = kind(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0), "pad_shape": size})
    image = torch.randint(0, 255, (3, *size), dtype=torch.uint8)
    with torch.no_grad():
        return model.test_step({"inputs": [image], "data_samples": [sample]})[0]


def random_weights(model):
    """Return random weights with the names and shapes of the model."""
    torch.manual_seed(1)
    return {
        name: torch.randn_like(value) * 0.05 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        if value.is_floating_point() and not name.endswith("running_var")
        else value.clone()
        for name, value in model.state_dict().items()
    }


def assert_loads(model, weights, path, **kwargs):
    fitted, notes = fit_detector(weights, model, path, **kwargs)
    model.load_state_dict(fitted, strict=True)
    return fitted, notes


# ----- mmdet 2 and mmseg 0 -----


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            "detection/mask_rcnn_nat_mini_3x.py",
            {
                "backbone.norm3.weight",
                "neck.lateral_convs.0.conv.weight",
                "neck.fpn_convs.3.conv.bias",
                "rpn_head.rpn_conv.weight",
                "rpn_head.rpn_cls.bias",
                "roi_head.bbox_head.shared_fcs.1.weight",
                "roi_head.bbox_head.fc_reg.weight",
                "roi_head.mask_head.convs.3.conv.weight",
                "roi_head.mask_head.upsample.weight",
                "roi_head.mask_head.conv_logits.bias",
            },
        ),
        (
            "detection/cascade_mask_rcnn_dinat_s_tiny_3x.py",
            {
                "backbone.layers.0.downsample.norm.weight",
                "roi_head.bbox_head.2.shared_convs.3.conv.weight",
                "roi_head.bbox_head.0.shared_convs.0.bn.running_var",
                "roi_head.bbox_head.1.shared_fcs.0.weight",
                "roi_head.bbox_head.2.fc_cls.weight",
                "roi_head.mask_head.2.conv_logits.weight",
            },
        ),
        (
            "segmentation/upernet_dinat_mini_160k.py",
            {
                "decode_head.psp_modules.3.1.conv.weight",
                "decode_head.bottleneck.bn.running_mean",
                "decode_head.lateral_convs.2.conv.weight",
                "decode_head.fpn_convs.2.bn.weight",
                "decode_head.fpn_bottleneck.conv.weight",
                "decode_head.conv_seg.bias",
                "auxiliary_head.convs.0.conv.weight",
                "auxiliary_head.conv_seg.weight",
            },
        ),
    ],
)
def test_checkpoints_of_mmdet_2_and_mmseg_0(config, expected, tmp_path):
    """Current releases use the same names. `expected` lists some of them."""
    model = small(config)
    weights = random_weights(model)
    assert expected <= weights.keys()
    path = tmp_path / "published.pth"
    meta = {"mmdet_version": "2.19.0", "epoch": 36, "CLASSES": ("a", "b"), "PALETTE": None, "config": "model = 1"}
    write_checkpoint(path, {"meta": meta, "state_dict": {f"module.{k}": v for k, v in weights.items()}})
    fitted, notes = assert_loads(model, read_weights(path), path)
    assert notes == []
    for name, value in weights.items():
        assert torch.equal(fitted[name], value), name
    found = predict(model)
    results = found.seg_logits.data if "seg_logits" in found else found.pred_instances.scores
    assert results.isfinite().all()


# ----- Mask2Former of detectron2 -----

M2F = {
    "pixel_decoder.input_convs.{n}.conv": "pixel_decoder.input_proj.{n}.0",
    "pixel_decoder.input_convs.{n}.gn": "pixel_decoder.input_proj.{n}.1",
    "pixel_decoder.lateral_convs.0.conv": "pixel_decoder.adapter_1",
    "pixel_decoder.lateral_convs.0.gn": "pixel_decoder.adapter_1.norm",
    "pixel_decoder.output_convs.0.conv": "pixel_decoder.layer_1",
    "pixel_decoder.output_convs.0.gn": "pixel_decoder.layer_1.norm",
    "pixel_decoder.mask_feature": "pixel_decoder.mask_features",
    "pixel_decoder.encoder.layers.{n}.self_attn.{x}": "pixel_decoder.transformer.encoder.layers.{n}.self_attn.{x}",
    "pixel_decoder.encoder.layers.{n}.ffn.layers.0.0": "pixel_decoder.transformer.encoder.layers.{n}.linear1",
    "pixel_decoder.encoder.layers.{n}.ffn.layers.1": "pixel_decoder.transformer.encoder.layers.{n}.linear2",
    "pixel_decoder.encoder.layers.{n}.norms.0": "pixel_decoder.transformer.encoder.layers.{n}.norm1",
    "pixel_decoder.encoder.layers.{n}.norms.1": "pixel_decoder.transformer.encoder.layers.{n}.norm2",
    "transformer_decoder.layers.{n}.cross_attn.attn.{x}": (
        "predictor.transformer_cross_attention_layers.{n}.multihead_attn.{x}"
    ),
    "transformer_decoder.layers.{n}.self_attn.attn.{x}": (
        "predictor.transformer_self_attention_layers.{n}.self_attn.{x}"
    ),
    "transformer_decoder.layers.{n}.norms.0": "predictor.transformer_cross_attention_layers.{n}.norm",
    "transformer_decoder.layers.{n}.norms.1": "predictor.transformer_self_attention_layers.{n}.norm",
    "transformer_decoder.layers.{n}.norms.2": "predictor.transformer_ffn_layers.{n}.norm",
    "transformer_decoder.layers.{n}.ffn.layers.0.0": "predictor.transformer_ffn_layers.{n}.linear1",
    "transformer_decoder.layers.{n}.ffn.layers.1": "predictor.transformer_ffn_layers.{n}.linear2",
    "transformer_decoder.post_norm": "predictor.decoder_norm",
    "query_feat": "predictor.query_feat",
    "query_embed": "predictor.query_embed",
    "level_embed": "predictor.level_embed",
    "cls_embed": "predictor.class_embed",
    "mask_embed.0": "predictor.mask_embed.layers.0",
    "mask_embed.2": "predictor.mask_embed.layers.1",
    "mask_embed.4": "predictor.mask_embed.layers.2",
}


def detectron2_name(name):
    """Return the name in detectron2's Mask2Former of a weight of mmdet or mmseg."""
    if name.startswith("backbone."):
        return name
    name = name.split(".", 1)[1]
    if name == "pixel_decoder.level_encoding.weight":
        return "sem_seg_head.pixel_decoder.transformer.level_embed"
    for ours, theirs in M2F.items():
        pattern = re.escape(ours).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{x\}", r"(?P<x>[a-z_.]+?)")
        match = re.fullmatch(pattern + r"(?P<leaf>\.weight|\.bias|_weight|_bias)", name)
        if match:
            return "sem_seg_head." + theirs.format(**{"n": "", "x": "", **match.groupdict()}) + match["leaf"]
    raise KeyError(name)


SHRINK = {
    "instance": {"model.panoptic_head.num_queries": 7},
    "panoptic": {"model.panoptic_head.num_queries": 7},
    "semantic": {"model.decode_head.num_queries": 7},
}


@pytest.mark.parametrize(
    "dataset_and_task",
    [
        ("coco", "panoptic"),
        ("ade20k", "panoptic"),
        ("cityscapes", "panoptic"),
        ("coco", "instance"),
        ("ade20k", "semantic"),
    ],
    ids="-".join,
)
def test_checkpoints_of_detectron2(dataset_and_task, tmp_path):
    dataset, task = dataset_and_task
    model = small(f"segmentation/mask2former_dinat_large_{dataset}_{task}.py", **SHRINK[task])
    weights = random_weights(model)
    theirs = {detectron2_name(name): value for name, value in weights.items()}
    theirs["criterion.empty_weight"] = torch.ones(3)
    path = tmp_path / "published.pkl"
    content = {"model": {k: v.numpy() for k, v in theirs.items()}, "__author__": "x", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    fitted, notes = assert_loads(model, read_weights(path), path)
    assert len(notes) == 1
    assert fitted.keys() == model.state_dict().keys()
    for name, value in weights.items():
        if "cls_embed" not in name:
            assert torch.equal(fitted[name], value), name
    head = "decode_head" if task == "semantic" else "panoptic_head"
    rows = fitted[f"{head}.cls_embed.bias"].numpy()
    assert np.array_equal(rows, weights[f"{head}.cls_embed.bias"].numpy()[class_order(dataset, task, len(rows))])
    found = predict(model)
    if task == "instance":
        assert found.pred_instances.scores.isfinite().all()
    elif task == "semantic":
        assert found.seg_logits.data.isfinite().all()
    else:
        assert found.pred_panoptic_seg.sem_seg.shape[-2:] == (64, 96)


def class_order(dataset, task, rows):
    """Return the row of each mmdet class in detectron2's classifier, found by the names and colors of the datasets."""
    classes = list(range(rows - 1))
    if (dataset, task) == ("cityscapes", "panoptic"):
        from mmseg.datasets import CityscapesDataset

        from natzoo.openmmlab.panoptic_data import CityscapesPanopticDataset

        names = list(CityscapesDataset.METAINFO["classes"])
        classes = [names.index(name) for name in CityscapesPanopticDataset.METAINFO["classes"]]
    if (dataset, task) == ("ade20k", "panoptic"):
        from mmdet.datasets.ade20k import ADE20KInstanceDataset
        from mmseg.datasets import ADE20KDataset

        # Names of instance classes differ from those of semantic classes, but their colors agree.
        colors = [tuple(color) for color in ADE20KDataset.METAINFO["palette"]]
        things = []
        for color in ADE20KInstanceDataset.METAINFO["palette"]:
            things.append(next(i for i, c in enumerate(colors) if c == tuple(color) and i > max(things, default=-1)))
        classes = [*things, *(index for index in range(150) if index not in things)]
    return [*classes, rows - 1]


# ----- checkpoints of wrapped models and of another model -----


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_of_data_parallel_and_compiled_detectors(prefix):
    model = small("detection/mask_rcnn_nat_mini_3x.py")
    weights = random_weights(model)
    fitted, notes = assert_loads(model, {prefix + name: value for name, value in weights.items()}, "x.pth")
    assert notes == []
    assert all(torch.equal(fitted[name], value) for name, value in weights.items())


def test_a_weight_with_and_without_prefix():
    model = small("detection/mask_rcnn_nat_mini_3x.py")
    name, value = next(iter(model.state_dict().items()))
    with pytest.raises(ValueError, match=r"x\.pth"):
        fit_detector({name: value, f"module.{name}": value}, model, "x.pth")


def test_checkpoint_of_another_backbone_is_rejected():
    model = small("detection/mask_rcnn_nat_mini_3x.py")
    other = small("detection/mask_rcnn_dinat_s_tiny_3x.py")
    with pytest.raises(ValueError, match=r"x\.pth"):
        fit_detector(other.state_dict(), model, "x.pth")


def test_layers_for_other_classes_are_skipped_on_request():
    """For fine-tuning; otherwise such a checkpoint is rejected."""
    three = {"model.roi_head.bbox_head.num_classes": 3, "model.roi_head.mask_head.num_classes": 3}
    model, weights = small("detection/mask_rcnn_nat_mini_3x.py", **three), small("detection/mask_rcnn_nat_mini_3x.py")
    with pytest.raises(ValueError, match=r"roi_head\.bbox_head\.fc_cls\.bias"):
        fit_detector(weights.state_dict(), model, "x.pth")
    _, notes = assert_loads(model, weights.state_dict(), "x.pth", new_classes=True)
    assert len(notes) == 1
    for layer in ("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits"):
        assert layer in notes[0]
