"""Count parameters, MACs and activations of a config's model for one image, with the conventions of the papers.

Detectors: backbone, neck, proposal network, box heads on 1000 boxes and mask heads (if any) on 100, in every stage.
One-stage detectors: backbone, neck and box head.
Segmenters: backbone and decode head, without the auxiliary head. Matrix products, convolutions and attention are
counted; RoIAlign, norms and resizing are not.
"""

from __future__ import annotations

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from natzoo.counting import Layer, count

_BOXES, _MASKS = 1000, 100
_DETECTION_SIZE = (800, 1280)  # height and width of the published MACs of detectors


def count_config(cfg: Config, size: tuple[int, int] | None = None) -> tuple[list[Layer], tuple[int, int]]:
    """Count the model of a config and each of its modules.

    Args:
        cfg: a config for mmdet or mmseg.
        size: height and width of the image in pixels; None for the size of the published figures.

    Returns:
        The counts of the model and of each module, and the height and width of the image.

    Raises:
        ValueError: if the model is not a detector with anchors or points, an encoder-decoder or a Mask2Former.
    """
    init_default_scope(cfg.default_scope)
    size = size or _published_size(cfg)
    # Mask2Former inspects the values of its masks, so it cannot run on the meta device.
    is_mask2former = "Mask2Former" in cfg.model.type + cfg.model.get("decode_head", {}).get("type", "")
    device = "cpu" if is_mask2former else "meta"
    with torch.device(device):
        model = MODELS.build(cfg.model).eval()
        image = torch.zeros(1, 3, *size)
        return count(model, lambda: _run(model, image)), size


def _published_size(cfg: Config) -> tuple[int, int]:
    """Return 800 x 1280 for detectors; for segmenters, the test size if images are resized, else the crop size."""
    if cfg.default_scope == "mmdet":
        return _DETECTION_SIZE
    resizes = [step["scale"] for step in cfg.get("test_pipeline", ()) if step["type"] == "Resize" and "scale" in step]
    if resizes:
        width, height = resizes[0]
        return height, width
    return tuple(cfg.model.data_preprocessor.size)


def _run(model: nn.Module, image: Tensor) -> None:
    maps = model.backbone(image)
    if hasattr(model, "decode_head"):
        is_mask2former = hasattr(model.decode_head, "pixel_decoder")
        samples = ([_make_sample(image)],) if is_mask2former else ()
        model.decode_head(maps, *samples)
    elif hasattr(model, "panoptic_head"):
        model.panoptic_head(maps, [_make_sample(image)])
    elif hasattr(model, "roi_head"):
        model.rpn_head(model.neck(maps))
        _run_roi_head(model.roi_head)
    else:
        from mmdet.models.detectors import SingleStageDetector

        if isinstance(model, SingleStageDetector):
            model.bbox_head(model.neck(maps) if model.with_neck else maps)
            return
        raise ValueError(
            f"model.type {type(model).__name__} is not supported; use a one- or two-stage detector, or a segmenter."
        )


def _run_roi_head(head: nn.Module) -> None:
    for name, boxes in (("bbox", _BOXES), ("mask", _MASKS)):
        if not getattr(head, f"with_{name}"):
            continue
        heads, extractors = getattr(head, f"{name}_head"), getattr(head, f"{name}_roi_extractor")
        if not isinstance(heads, nn.ModuleList):
            heads, extractors = [heads], [extractors]
        for stage, extractor in zip(heads, extractors, strict=True):
            side = extractor.roi_layers[0].output_size
            stage(torch.zeros(boxes, extractor.out_channels, *side))


def _make_sample(image: Tensor):
    """Return the image size in the form that Mask2Former's head reads."""
    from mmdet.structures import DetDataSample

    size = tuple(image.shape[-2:])
    return DetDataSample(metainfo={"batch_input_shape": size, "img_shape": size, "pad_shape": size})
