"""Read and write model folders of transformers: config.json, model.safetensors and preprocessor_config.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor
from transformers.image_utils import PILImageResampling

from natzoo.checkpoints.keys import to_hf
from natzoo.checkpoints.write import write_folder, write_weights
from natzoo.hf.configuration import DinatConfig
from natzoo.hf.export import from_timm, image_processor, make_config
from natzoo.hf.modeling import DinatBackbone, NatBackbone, arguments_of
from natzoo.models import NAT, DiNAT_s, Isotropic

# A registered model per class; the arguments in a record turn it into any other model of the class.
_MODELS = {NAT: "nat_mini", DiNAT_s: "dinat_s_tiny", Isotropic: "nat_isotropic_small"}


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

    Raises:
        ValueError: if a field of its configuration is invalid.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("nat", "dinat"):
        return None
    kind, arguments = arguments_of(config)
    name = _MODELS[kind] if config.kernel_size else "vitrpb_small"
    names = [config.id2label[index] for index in range(config.num_labels)]
    return {
        "model": name,
        "model_kwargs": arguments,
        "num_classes": config.num_labels,
        "classes": None if names == [f"LABEL_{index}" for index in range(len(names))] else names,
        "preprocessing": _preprocessing(Path(folder), config.num_channels),
    }


def _preprocessing(folder: Path, channels: int) -> dict[str, Any]:
    """Return a folder's preprocessing with the names of timm's `pretrained_cfg`; empty if it defines none."""
    if not (folder / "preprocessor_config.json").exists():
        return {}
    processor = AutoImageProcessor.from_pretrained(folder)
    size = dict(processor.size)
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else size
    height, width = (crop.get(side, size.get("shortest_edge")) for side in ("height", "width"))
    return {
        "input_size": [channels, height, width],
        "crop_pct": min(height, width) / size.get("shortest_edge", min(height, width)),
        "interpolation": PILImageResampling(processor.resample).name.lower(),
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }
