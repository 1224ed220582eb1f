"""What the model of a config takes for one picture, as the published figures have it; on the meta device.

Of detectors: backbone, neck, proposals, and the heads on 1000 boxes, of which the first 100 get masks, in each stage.
Of segmenters: backbone and decode head. Matrix products and convolutions count; RoIAlign, norms and resizing do not.
"""

from __future__ import annotations

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from natzoo.counting import Layer, count

_BOXES, _MASKS = 1000, 100
_DETECTION_SIZE = (800, 1280)  # height and width of the published figures


def count_config(cfg: Config, size: tuple[int, int] | None = None) -> tuple[list[Layer], tuple[int, int]]:
    """A config's model and its modules with what they take, and the height and width that this is for.

    Raises:
        ValueError: if the model is none of those that this project has.
    """
    init_default_scope(cfg.default_scope)
    size = size or _published_size(cfg)
    # Mask2Former looks at its masks on the way, which the meta device has not.
    device = "cpu" if "Mask2Former" in cfg.model.type + cfg.model.get("decode_head", {}).get("type", "") else "meta"
    with torch.device(device):
        model = MODELS.build(cfg.model).eval()
        image = torch.zeros(1, 3, *size)
    with torch.device(device):
        return count(model, lambda: _run(model, image)), size


def _published_size(cfg: Config) -> tuple[int, int]:
    """Of segmenters the size that test pictures are made fit into, else that of training's crops."""
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
        samples = [_sample(image)]
        is_plain = not hasattr(model.decode_head, "pixel_decoder")
        model.decode_head(maps) if is_plain else model.decode_head(maps, samples)
    elif hasattr(model, "panoptic_head"):
        model.panoptic_head(maps, [_sample(image)])
    elif hasattr(model, "roi_head"):
        model.rpn_head(model.neck(maps))
        _run_roi_head(model.roi_head)
    else:
        raise ValueError(f"a {type(model).__name__} is no model whose arithmetic is counted here.")


def _run_roi_head(head: nn.Module) -> None:
    for name, boxes in (("bbox", _BOXES), ("mask", _MASKS)):
        heads, extractors = getattr(head, f"{name}_head"), getattr(head, f"{name}_roi_extractor")
        if not isinstance(heads, nn.ModuleList):
            heads, extractors = [heads], [extractors]
        for stage, extractor in zip(heads, extractors, strict=True):
            side = extractor.roi_layers[0].output_size
            stage(torch.zeros(boxes, extractor.out_channels, *side))


def _sample(image: Tensor):
    """What Mask2Former asks of a picture: its size."""
    from mmdet.structures import DetDataSample

    size = tuple(image.shape[-2:])
    return DetDataSample(metainfo={"batch_input_shape": size, "img_shape": size, "pad_shape": size})
