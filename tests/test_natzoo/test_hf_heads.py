"""natzoo.hf's backbones inside the detectors and segmenters of transformers: forward, backward, save and load."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")  # of the matchers

from natzoo import hf  # noqa: E402

SIDE = 64
STAGES = ("stage1", "stage2", "stage3", "stage4")


def backbone(kind="dinat", stages=STAGES, channels=3):
    config = hf.NatConfig if kind == "nat" else hf.DinatConfig
    dilations = {} if kind == "nat" else {"dilations": [[2], [1], [1], [1]]}
    sizes = {
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "embed_dim": 16,
        "kernel_size": 3,
        "drop_path_rate": 0.0,
    }
    return config(**sizes, **dilations, num_channels=channels, out_features=list(stages))


def boxes():
    return [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])}] * 2


def masks():
    return {"mask_labels": [torch.ones(1, SIDE, SIDE)] * 2, "class_labels": [torch.tensor([1])] * 2}


def upernet(kind):
    options = {"hidden_size": 16, "auxiliary_in_channels": 64, "auxiliary_channels": 16, "num_labels": 3}
    config = transformers.UperNetConfig(backbone_config=backbone(kind), **options)
    return transformers.UperNetForSemanticSegmentation(config), {"labels": torch.ones(2, SIDE, SIDE).long()}


def mask2former(kind):
    options = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2}
    options |= {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
    options |= {"num_queries": 4, "train_num_points": 64, "num_labels": 3}
    config = transformers.Mask2FormerConfig(backbone_config=backbone(kind), **options)
    return transformers.Mask2FormerForUniversalSegmentation(config), masks()


def maskformer(kind):
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32, "num_queries": 4}
    config = transformers.MaskFormerConfig(
        backbone_config=backbone(kind),
        decoder_config=transformers.DetrConfig(**layers, **heads),
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=3,
    )
    return transformers.MaskFormerForInstanceSegmentation(config), masks()


def oneformer(kind):
    options = {"num_queries": 4, "hidden_dim": 64, "conv_dim": 64, "mask_dim": 64, "num_attention_heads": 2}
    options |= {"encoder_feedforward_dim": 16, "dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 3}
    options |= {"query_dec_layers": 1, "train_num_points": 64, "num_labels": 3, "is_training": True}
    options |= {"text_encoder_width": 64, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 99}
    options |= {"text_encoder_context_length": 8, "text_encoder_n_ctx": 2, "task_seq_len": 8}
    config = transformers.OneFormerConfig(backbone_config=backbone(kind), **options)
    inputs = {**masks(), "task_inputs": torch.ones(2, 8).long(), "text_inputs": torch.ones(2, 2, 8).long()}
    return transformers.OneFormerForUniversalSegmentation(config), inputs


_DETR = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 32}
_DETR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 4, "num_labels": 3}


def detr(kind):
    config = transformers.DetrConfig(backbone_config=backbone(kind, STAGES[-1:]), **_DETR)
    return transformers.DetrForObjectDetection(config), {"labels": boxes()}


def deformable_detr(kind):
    options = {**_DETR, "decoder_layers": 2}
    config = transformers.DeformableDetrConfig(backbone_config=backbone(kind, STAGES[1:]), **options)
    return transformers.DeformableDetrForObjectDetection(config), {"labels": boxes()}


def rt_detr(kind, version=""):
    options = {"d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_labels": 3}
    options |= {"encoder_in_channels": [32, 64, 128], "decoder_in_channels": [32, 32, 32], "num_queries": 8}
    options |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 2, "num_denoising": 4}
    config = getattr(transformers, f"RTDetr{version}Config")(backbone_config=backbone(kind, STAGES[1:]), **options)
    return getattr(transformers, f"RTDetr{version}ForObjectDetection")(config), {"labels": boxes()}


def rt_detr_v2(kind):
    return rt_detr(kind, "V2")


def vitmatte(kind):
    """Its images have the trimap as fourth channel. It has no loss."""
    options = {"hidden_size": 64, "convstream_hidden_sizes": [8, 8, 8], "fusion_hidden_sizes": [16, 8, 8, 8]}
    config = transformers.VitMatteConfig(backbone_config=backbone(kind, STAGES[2:3], channels=4), **options)
    return transformers.VitMatteForImageMatting(config), {}


def dpt(kind):
    """DPT's hybrid form, with a ViT on the third stage, as wide as the last; its plain form needs a ViT's tokens."""
    config = transformers.DPTConfig(
        is_hybrid=True,
        backbone_config=backbone(kind, STAGES[:3]),
        backbone_featmap_shape=[1, 64, 4, 4],
        image_size=SIDE,
        neck_hidden_sizes=[16, 32, 24, 24],
        neck_ignore_stages=[0, 1],
        reassemble_factors=[1, 1, 1, 0.5],
        backbone_out_indices=[0, 0, 1, 2],
        **{"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32},
        **{"fusion_hidden_size": 16, "readout_type": "project"},
    )
    return transformers.DPTForDepthEstimation(config), {}


HEADS = [upernet, mask2former, maskformer, oneformer, detr, deformable_detr, rt_detr, rt_detr_v2, vitmatte, dpt]


def find_backbone(model):
    (found,) = {module for module in model.modules() if isinstance(module, (hf.NatBackbone, hf.DinatBackbone))}
    return found


@pytest.mark.parametrize("kind", ["nat", "dinat"])
@pytest.mark.parametrize("make", HEADS, ids=lambda make: make.__name__)
def test_forward_backward_save_and_load(make, kind, tmp_path):
    torch.manual_seed(0)
    model, labels = make(kind)
    model.train()
    part = find_backbone(model)
    pixels = torch.randn(2, part.config.num_channels, SIDE, SIDE)
    output = model(pixels, **labels)
    loss = output.loss
    if loss is None:
        loss = (output.alphas if make is vitmatte else output.predicted_depth).square().mean()
    loss.backward()
    assert loss.isfinite()
    first = part.encoder.levels[0].blocks[0].attn
    assert first.rpb.grad.abs().sum() > 0 and first.qkv.weight.grad.isfinite().all()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(find_backbone(again)) is (hf.NatBackbone if kind == "nat" else hf.DinatBackbone)
    weights, loaded = model.state_dict(), again.state_dict()
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(weights[name], loaded[name]) for name in weights)
