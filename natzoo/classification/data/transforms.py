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
        args: options; those of `add_input_options`, model_kwargs, crop_pct, interpolation, mean and std are used if
            present and not None.
        model: the model.
        record: record of a checkpoint.

    Returns:
        input_size ([channels, height, width] in pixels), crop_pct, interpolation, mean and std. Gray images have the
        average mean and std of the three colors.

    Raises:
        ValueError: if the model of the record takes another number of channels.
    """
    names = ("img_size", "input_size", "crop_pct", "interpolation", "mean", "std")
    given = {key: value for key in names if (value := getattr(args, key, None)) is not None}
    recorded = (record or {}).get("preprocessing", {})
    channels = requested_channels(args) or recorded.get("input_size", [3])[0]
    if "input_size" in recorded and channels != recorded["input_size"][0]:
        raise ValueError(f"--in-chans {channels} does not fit the model, which takes {recorded['input_size'][0]}.")
    if given.keys() & {"img_size", "input_size"}:
        recorded = {key: value for key, value in recorded.items() if key != "input_size"}
    config = {**recorded, **given, "in_chans": channels}
    colors = {key: config.pop(key) for key in ("mean", "std") if key in config}
    config = {**resolve_data_config(config, model=model), **colors}
    config["input_size"] = [channels, *config["input_size"][1:]]
    for key in ("mean", "std"):
        config[key] = (
            list(config[key]) if len(config[key]) == channels else [sum(config[key]) / len(config[key])] * channels
        )
    return {name: config[name] for name in ("input_size", "crop_pct", "interpolation", "mean", "std")}


def requested_channels(args: argparse.Namespace) -> int | None:
    """Return the number of image channels that --in-chans, --input-size or --model-kwargs in_chans=N requests.

    Raises:
        ValueError: if two of them disagree, or --img-size and --input-size do.
    """
    size, side = getattr(args, "input_size", None), getattr(args, "img_size", None)
    if size and side and size[1:] != [side, side]:
        raise ValueError(f"--img-size {side} and --input-size {size[1]} {size[2]} disagree; remove one of them.")
    requested = {
        "--in-chans": getattr(args, "in_chans", None),
        "--input-size": size and size[0],
        "--model-kwargs in_chans": (getattr(args, "model_kwargs", None) or {}).get("in_chans"),
    }
    found = {option: channels for option, channels in requested.items() if channels is not None}
    if not all(isinstance(channels, int) for channels in found.values()):
        raise ValueError(f"--model-kwargs in_chans={found['--model-kwargs in_chans']!r:.50} is not an integer.")
    if len(set(found.values())) > 1:
        raise ValueError(f"{' and '.join(found)} disagree about the number of channels; remove one of them.")
    return next(iter(found.values()), None)


def evaluation_transform(config: dict[str, Any], normalize: bool = True) -> Transform:
    """Create the transform of evaluation from what `preprocessing` returned.

    Args:
        config: what `preprocessing` returned.
        normalize: return normalized float32 images; if False, uint8 images that `Normalize` normalizes on the device.

    Raises:
        ValueError: if the model takes neither gray nor color images.
    """
    return _from_color(create_transform(is_training=False, normalize=normalize, **config), config)


def _from_color(transform: Any, config: dict[str, Any]) -> Transform:
    """Return a transform of color images that makes them gray first if the model takes one channel."""
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"--in-chans {channels} does not fit images, which have 3 channels, or 1 if gray.")
    if channels == 1:
        transform.transforms.insert(0, _to_gray)
    return transform


def _to_gray(image: Image.Image) -> Image.Image:
    return image.convert("L")


def training_transform(args: argparse.Namespace, config: dict[str, Any]) -> Transform:
    """Create the random transform of training, which returns uint8 images; `TrainingBatches` does the rest.

    Args:
        args: the options.
        config: what `preprocessing` returned.

    Raises:
        ValueError: if timm does not know --aa, or the model takes neither gray nor color images.
    """
    try:
        transform = create_transform(
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
            normalize=False,
        )
        return _from_color(transform, config)
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
