"""The random changes that training makes to its images: timm's, as the options say."""

from __future__ import annotations

import argparse
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform, resolve_data_config
from torch import nn


def preprocessing(args: argparse.Namespace, model: nn.Module, record: dict[str, Any] | None = None) -> dict[str, Any]:
    """Size, crop and colours of evaluation: from the options, else from a checkpoint's record, else the model's own.

    Returns:
        input_size [channels, height, width] in pixels, crop_pct, interpolation, mean and std.
    """
    given = {name: getattr(args, name, None) for name in ("img_size", "crop_pct", "interpolation", "mean", "std")}
    given = {key: value for key, value in given.items() if value is not None}
    recorded = (record or {}).get("preprocessing", {})
    if "img_size" in given:
        recorded = {key: value for key, value in recorded.items() if key != "input_size"}
    config = resolve_data_config({**recorded, **given}, model=model)
    kept = ("input_size", "crop_pct", "interpolation", "mean", "std")
    return {name: list(value) if isinstance(value := config[name], tuple) else value for name in kept}


def evaluation_transform(config: dict[str, Any]):
    """PIL image -> normalised tensor, as `preprocessing` says."""
    return create_transform(is_training=False, **config)


def training_transform(args: argparse.Namespace, config: dict[str, Any]):
    """PIL image -> augmented, normalised tensor, as the options say.

    Raises:
        ValueError: if timm does not know --aa.
    """
    try:
        return create_transform(
            config["input_size"],
            is_training=True,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            auto_augment=None if args.aa == "none" else args.aa,
            interpolation=args.train_interpolation,
            mean=config["mean"],
            std=config["std"],
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except AssertionError as error:
        raise ValueError(f"--aa {args.aa} is not an augmentation that timm knows: try rand-m9-mstd0.5-inc1.") from error


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize, but 0 bits make a black image, as they did before Pillow 13 refused them.

    RandAugment of magnitude 9 with noise, as in the published recipes, draws 0 bits for one image in some hundreds.
    """
    return image.point(lambda _: 0) if bits == 0 else _TIMMS_POSTERIZE(image, bits)


_TIMMS_POSTERIZE = auto_augment.posterize
for _name, _operation in auto_augment.NAME_TO_OP.items():
    if _operation is _TIMMS_POSTERIZE:
        auto_augment.NAME_TO_OP[_name] = _posterize
