"""Read and write model folders of transformers: config.json, model.safetensors and preprocessor_config.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BitImageProcessor, CLIPImageProcessor, DeiTImageProcessor, ViTImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from natzoo.checkpoints.keys import to_hf
from natzoo.checkpoints.write import write_folder, write_weights
from natzoo.hf.configuration import FIELDS, DinatConfig, NatConfig
from natzoo.hf.export import from_timm, image_processor, make_config
from natzoo.hf.modeling import DinatBackbone, NatBackbone, arguments_of
from natzoo.models import NAT, DiNAT_s, Isotropic
from natzoo.schema import Rule, check_values, integer, mapping, number, one_of, optional, sequence, shown, text

# A registered model per class; the arguments in a record turn it into any other model of the class.
_MODELS = {NAT: "nat_mini", DiNAT_s: "dinat_s_tiny", Isotropic: "nat_isotropic_small"}
# The processors of transformers that only resize, crop the center and normalize.
_PROCESSORS = {
    "Bit": BitImageProcessor,
    "CLIP": CLIPImageProcessor,
    "DeiT": DeiTImageProcessor,
    "ViT": ViTImageProcessor,
}
_MAX_JSON = 2**25  # bytes


def save_folder(
    model: NAT | DiNAT_s | Isotropic, folder: str | os.PathLike, classes: Sequence[str] | None = None
) -> None:
    """Write a classifier as a folder of transformers, atomically.

    Args:
        model: as for `from_timm`; its `pretrained_cfg` defines the preprocessing.
        folder: the new folder.
        classes: class names; None for those of ImageNet-1K if the number of classes matches.

    Raises:
        ValueError: as in `from_timm`, or if the number of names differs from the number of classes.
        FileExistsError: if the folder already exists and is not empty.
    """
    exported = from_timm(model)
    if classes is not None:
        if len(classes) != model.num_classes:
            raise ValueError(f"classes has {len(classes)} names, but the model has {model.num_classes} classes.")
        exported.config.id2label = dict(enumerate(classes))
        exported.config.label2id = {name: index for index, name in enumerate(classes)}

    def write(target: Path) -> None:
        exported.save_pretrained(target)
        image_processor(model).save_pretrained(target)

    write_folder(Path(folder), write)


def save_backbone_folder(model: NAT | DiNAT_s, weights: dict[str, Tensor], folder: str | os.PathLike) -> None:
    """Write the backbone of a detector or segmenter as a folder of transformers, atomically.

    The configuration selects the feature maps of all stages.

    Args:
        model: a classifier with the same sizes; may be on the meta device.
        weights: weights under their published names, including norm0, norm1, ...
        folder: the new folder.

    Raises:
        ValueError: if the weights do not match a backbone of that size.
        FileExistsError: if the folder already exists and is not empty.
    """
    config = make_config(model)
    config.out_features = config.stage_names[1:]
    kind = DinatBackbone if isinstance(config, DinatConfig) else NatBackbone

    def write(target: Path) -> None:
        config.architectures = [kind.__name__]
        config.save_pretrained(target)
        write_weights(target / "model.safetensors", to_hf(weights, ""))
        try:
            _, found = kind.from_pretrained(target, output_loading_info=True)
        except RuntimeError as error:  # raised by transformers for other shapes
            raise ValueError(f"weights do not match the backbone: {str(error).splitlines()[0]}") from error
        different = sorted(found["missing_keys"] | found["unexpected_keys"])
        if different:
            raise ValueError(f"weights do not match the backbone: {len(different)} names differ: {different[0]}, ...")

    write_folder(Path(folder), write)


def read_record(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Return the description of the model in a folder, in the format of `record_of`; None if not a Nat or Dinat.

    Only plain data is read: the folder cannot make transformers run code, and no model is built.

    Raises:
        ValueError: if its configuration or preprocessing is invalid; names the file and the field.
    """
    path = Path(folder) / "config.json"
    content = _read_json(path)
    config_class = next(
        (kind for kind in (NatConfig, DinatConfig) if kind.model_type == content.get("model_type")), None
    )
    if config_class is None:
        return None
    check_values(str(path), content, FIELDS, required=())
    try:
        config = config_class(**{name: content[name] for name in FIELDS if name in content})
        kind, arguments = arguments_of(config)
    except ValueError as error:
        raise ValueError(f"{path} is invalid: {str(error).splitlines()[0]}") from error
    names = [config.id2label[index] for index in range(config.num_labels)]
    return {
        "model": _MODELS[kind] if config.kernel_size else "vitrpb_small",
        "model_kwargs": arguments,
        "num_classes": config.num_labels,
        "classes": None if names == [f"LABEL_{index}" for index in range(len(names))] else names,
        "preprocessing": _preprocessing(Path(folder), config.num_channels),
    }


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: if the file is not a regular one of at most 32 MB, or contains anything else.
    """
    if not path.is_file() or path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{path} is not a regular file of at most {_MAX_JSON} bytes; download it again.")
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({str(error).splitlines()[0]}); download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a {type(content).__name__}; it must contain a JSON object.")
    return content


_PIXELS = integer(1, 100_000)
_LENGTHS = Rule(
    "a number of pixels, or a dictionary of them",
    lambda value: _PIXELS.holds(value) or (mapping().holds(value) and all(map(_PIXELS.holds, value.values()))),
)
_CHANNELS = Rule(
    "a number, or one per channel",
    lambda value: number(-1e6, 1e6).holds(value) or sequence(number(-1e6, 1e6), 1, 1000).holds(value),
)
_PROCESSOR: dict[str, Rule] = {
    "image_processor_type": optional(text(100)),
    "feature_extractor_type": optional(text(100)),
    "size": optional(_LENGTHS),
    "crop_size": optional(_LENGTHS),
    "resample": optional(integer(0, 5)),
    "image_mean": optional(_CHANNELS),
    "image_std": optional(_CHANNELS),
    "do_center_crop": optional(one_of(True, False)),
}


def _preprocessing(folder: Path, channels: int) -> dict[str, Any]:
    """Return a folder's preprocessing with the names of timm's `pretrained_cfg`; empty if it defines none."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return {}
    content = _read_json(path)
    check_values(str(path), content, _PROCESSOR, required=())
    try:
        # Built from the checked fields alone, with the defaults of its class.
        processor = _processor_class(content)(
            **{name: content[name] for name in _PROCESSOR if content.get(name) is not None}
        )
        size = dict(processor.size)
        crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else size
        height, width = (crop.get(side, size.get("shortest_edge")) for side in ("height", "width"))
        return {
            "input_size": [channels, height, width],
            "crop_pct": min(height, width) / size.get("shortest_edge", min(height, width)),
            "interpolation": PILImageResampling(processor.resample).name.lower(),
            "mean": _per_channel(processor.image_mean, channels),
            "std": _per_channel(processor.image_std, channels),
        }
    except Exception as error:  # processors of transformers raise errors of any type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not supported: {reason:.300}; use a processor that crops or resizes.") from error


def _processor_class(content: dict[str, Any]) -> type[BaseImageProcessor]:
    name = content.get("image_processor_type") or content.get("feature_extractor_type") or "ViTImageProcessor"
    family = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name)
    if family not in _PROCESSORS:
        raise ValueError(f"image_processor_type is {shown(name)}")
    return _PROCESSORS[family]


def _per_channel(value: Any, channels: int) -> list[float]:
    return [value] * channels if isinstance(value, (int, float)) else list(value)
