"""Image transforms of training and evaluation, created by timm from the options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform, resolve_data_config
from torch import Tensor, nn

Transform = Callable[[Image.Image], Tensor]


def preprocessing(args: argparse.Namespace, model: nn.Module, record: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the preprocessing of evaluation: from the options, else from the record, else from the model.

    Args:
        args: options; img_size, crop_pct, interpolation, mean and std are used if present and not None.
        model: the model.
        record: record of a checkpoint.

    Returns:
        input_size ([channels, height, width] in pixels), crop_pct, interpolation, mean and std.
    """
    given = {name: getattr(args, name, None) for name in ("img_size", "crop_pct", "interpolation", "mean", "std")}
    given = {key: value for key, value in given.items() if value is not None}
    recorded = (record or {}).get("preprocessing", {})
    if "img_size" in given:
        recorded = {key: value for key, value in recorded.items() if key != "input_size"}
    config = resolve_data_config({**recorded, **given}, model=model)
    kept = ("input_size", "crop_pct", "interpolation", "mean", "std")
    return {name: list(value) if isinstance(value := config[name], tuple) else value for name in kept}


def evaluation_transform(config: dict[str, Any]) -> Transform:
    """Create the transform of evaluation from what `preprocessing` returned."""
    return create_transform(is_training=False, **config)


def training_transform(args: argparse.Namespace, config: dict[str, Any]) -> Transform:
    """Create the random transform of training.

    Args:
        args: the options.
        config: what `preprocessing` returned.

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
        raise ValueError(f"--aa {args.aa} is unknown to timm; use for example rand-m9-mstd0.5-inc1.") from error


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Call timm's posterize, but return a black image for 0 bits, which Pillow 13 refuses.

    RandAugment of magnitude 9 with noise, as in the published recipes, draws 0 bits about once in a few hundred images.
    """
    return image.point(lambda _: 0) if bits == 0 else _TIMM_POSTERIZE(image, bits)


_TIMM_POSTERIZE = auto_augment.posterize
for _name, _operation in auto_augment.NAME_TO_OP.items():
    if _operation is _TIMM_POSTERIZE:
        auto_augment.NAME_TO_OP[_name] = _posterize
