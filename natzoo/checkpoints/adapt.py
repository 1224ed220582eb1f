"""Load weights into models that differ from the one they were trained with.

The model may differ in the names of its parameters, number of classes, input channels, window size or image size.
All other differences are errors.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable

import torch.nn.functional as F
from timm.models import adapt_input_conv
from torch import Tensor, nn

from natzoo.checkpoints.keys import from_detectron2, from_hf, is_detectron2, is_hf

_STAGE_NORM = re.compile(r"norm\d\.")  # one per feature map, in backbones for detection and segmentation
_POSITION_INDEX = "relative_position_index"  # buffer of ViT-rpb, a function of the map size
# Layers with one row or one map per class, in detectors and segmenters.
_CLASS_LAYER = re.compile(r"(fc_cls|fc_reg|mask_head(\.\d)?\.conv_logits|conv_seg|cls_embed)\.(weight|bias)$")


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike, new_classifier: bool = False
) -> list[str]:
    """Load weights into a model, strictly, after adapting them as described in `adapt`.

    Args:
        model: a model of natzoo.
        weights: the result of `read_weights`.
        path: file the weights come from, for messages.
        new_classifier: keep the model's classifier if the weights have another number of classes.

    Returns:
        One sentence per adaptation.

    Raises:
        ValueError: if the weights belong to another model; the message lists missing and unexpected weights and those
            of another shape. The model is then unchanged.
    """
    try:
        weights, notes = adapt(weights, model, new_classifier)
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint of a known model: {error}") from error
    check_fit(model, weights, path)
    model.load_state_dict(weights)
    return notes


def check_fit(model: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Check that weights match a model's names and shapes exactly; warn about weights that are not finite.

    Raises:
        ValueError: if they do not match; the message lists missing and unexpected weights and those of another shape.
    """
    own = model.state_dict()
    other_shape = (name for name in own.keys() & weights.keys() if weights[name].shape != own[name].shape)
    problems = [
        _list_names("missing", own.keys() - weights.keys()),
        _list_names("unexpected", weights.keys() - own.keys()),
        _list_names(
            "of another shape",
            (f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}" for name in other_shape),
        ),
    ]
    text = "; ".join(filter(None, problems))
    if text:
        raise ValueError(f"{path} does not match this {type(model).__name__}: {text}.")
    broken = _list_names("not finite", (name for name, value in weights.items() if not value.isfinite().all()))
    if broken:
        warnings.warn(f"{path} contains weights that are {broken}; training may have diverged.", stacklevel=3)


def _list_names(problem: str, names: Iterable[str], shown: int = 4) -> str:
    names = sorted(names)
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{problem} ({len(names)}): {', '.join(names[:shown])}{more}"


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def published_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under their published names.

    Data-parallel, compiled, OpenMMLab and Hugging Face layouts are accepted. From a detector or segmenter, only the
    backbone is returned.

    Raises:
        ValueError: if the weights have Hugging Face's layout but belong to another model; or as in `unwrapped`.
    """
    weights = unwrapped(weights)
    prefix = backbone_prefix(weights)
    if prefix:
        weights = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    return from_hf(weights) if is_hf(weights) else weights


def unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the prefixes of data-parallel (`module.`) and compiled (`_orig_mod.`) models.

    Raises:
        ValueError: if two weights end up with the same name.
    """
    names = {name: re.sub(r"^(?:module\.|_orig_mod\.)+", "", name) for name in weights}
    if len(set(names.values())) < len(names):
        raise ValueError("a weight occurs twice, with and without the prefix `module.` or `_orig_mod.`")
    return {names[name]: value for name, value in weights.items()}


def backbone_prefix(names: Iterable[str]) -> str:
    """Return the prefix of a backbone's weights in detectors and segmenters of OpenMMLab and transformers, else ""."""
    for name in names:
        if name.startswith("backbone."):
            return "backbone."
        prefix, found, _ = name.partition("embeddings.patch_embeddings.projection.")
        if found and prefix not in ("", "nat.", "dinat."):
            return prefix
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers and backbones
# ---------------------------------------------------------------------------------------------------------------------


def adapt(
    weights: dict[str, Tensor], model: nn.Module, new_classifier: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Adapt weights to a model.

    - Names: converted to the published ones, as in `published_names`.
    - Window size: bias tables are resized by interpolation, as published for 7x7 to 11x11 windows.
    - Input channels: the first convolution's weights are summed or repeated, as in timm.
    - Classes: with `new_classifier`, a classifier with another number of classes keeps the model's own values. A model
      without a classifier ignores the one in the weights.
    - Norms: a backbone for detection and segmentation has norm0 to norm3 instead of the final norm. Loading a
      classifier keeps the backbone's own norms. With `new_classifier`, loading a backbone into a classifier keeps the
      classifier's own final norm.

    Args:
        weights: weights in any supported layout.
        model: a model of natzoo.
        new_classifier: keep the model's own classifier if the weights have another number of classes.

    Returns:
        The adapted weights, which `check_fit` has yet to check, and one sentence per adaptation.

    Raises:
        ValueError: as in `published_names`.
    """
    own = model.state_dict()
    cfg = getattr(model, "default_cfg", None) or {}
    weights = published_names(weights)
    notes: list[str] = []
    _adapt_bias_tables(weights, own, notes)
    _adapt_first_conv(weights, own, cfg.get("first_conv"), notes)
    _adapt_classifier(weights, own, cfg.get("classifier", "head"), new_classifier, notes)
    _adapt_norms(weights, own, new_classifier, notes)
    return weights, notes


def resize_rpb(rpb: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a bias table [heads, 2K-1, 2K-1] to `size` by bicubic interpolation; keeps its dtype.

    The published weights for 11x11 windows were made from those for 7x7 windows this way. Swin uses the same method
    (arXiv:2103.14030).
    """
    if isinstance(size[0], int) and rpb.shape[1:] == size:  # a traced program takes any size
        return rpb
    return F.interpolate(rpb[None].float(), size=size, mode="bicubic", align_corners=False)[0].to(rpb.dtype)


def _adapt_bias_tables(weights: dict[str, Tensor], own: dict[str, Tensor], notes: list[str]) -> None:
    sizes = set()
    for name in own.keys() & weights.keys():
        old, new = weights[name], own[name]
        if name.endswith(_POSITION_INDEX):
            weights[name] = new
        elif name.endswith("rpb") and old.shape != new.shape and old.dim() == 3 and old.shape[0] == new.shape[0]:
            weights[name] = resize_rpb(old, (new.shape[1], new.shape[2]))
            sizes.add((*old.shape[1:], *new.shape[1:]))
    for a, b, c, d in sorted(sizes):
        notes.append(f"resized the relative position bias from {a}x{b} to {c}x{d}")


def _adapt_first_conv(weights: dict[str, Tensor], own: dict[str, Tensor], first: str | None, notes: list[str]) -> None:
    name = f"{first}.weight"
    if name not in own or name not in weights:
        return
    old, new = weights[name], own[name]
    if old.dim() == new.dim() and old.shape[1] == 3 and old.shape[1] != new.shape[1]:
        weights[name] = adapt_input_conv(new.shape[1], old)
        notes.append(f"converted the first convolution from 3 to {new.shape[1]} input channels")


def _adapt_classifier(
    weights: dict[str, Tensor], own: dict[str, Tensor], classifier: str, new_classifier: bool, notes: list[str]
) -> None:
    theirs = {name for name in weights if name.startswith(f"{classifier}.")}
    ours = {name for name in own if name.startswith(f"{classifier}.")}
    if theirs and not ours:
        for name in theirs:
            del weights[name]
        return
    differs = any(name not in weights or weights[name].shape != own[name].shape for name in ours)
    if differs and new_classifier:
        _keep_own(weights, own, ours, theirs - ours)
        classes = own[f"{classifier}.weight"].shape[0]
        reason = "the checkpoint has another number" if theirs else "the checkpoint has no classifier"
        notes.append(f"kept the new classifier for {classes} classes: {reason}")


def _adapt_norms(weights: dict[str, Tensor], own: dict[str, Tensor], new_classifier: bool, notes: list[str]) -> None:
    ours = {name for name in own if _STAGE_NORM.match(name)}
    theirs = {name for name in weights if _STAGE_NORM.match(name)}
    if ours and not theirs:
        _keep_own(weights, own, ours, [name for name in weights if name.startswith("norm.") and name not in own])
        notes.append("kept the new norms of the feature maps: the checkpoint is a classifier, which has none")
    elif theirs and not ours and new_classifier:
        _keep_own(weights, own, [name for name in own if name.startswith("norm.") and name not in weights], theirs)
        notes.append("kept the new final norm: the checkpoint is a backbone, which has one norm per feature map")


def _keep_own(weights: dict[str, Tensor], own: dict[str, Tensor], kept: Iterable[str], removed: Iterable[str]) -> None:
    """Delete the weights in `removed`, and replace those in `kept` with the model's own values."""
    for name in removed:
        del weights[name]
    weights.update({name: own[name] for name in kept})


# ---------------------------------------------------------------------------------------------------------------------
# Detectors and segmenters
# ---------------------------------------------------------------------------------------------------------------------


def fit_detector(
    weights: dict[str, Tensor], model: nn.Module, path: str | os.PathLike, new_classes: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Adapt the weights of a whole detector or segmenter to a model built by mmdet or mmseg.

    Args:
        weights: from mmdet or mmseg, any version, or from Mask2Former in detectron2.
        model: a model built by mmdet or mmseg.
        path: file the weights come from, for messages.
        new_classes: keep the model's own values in layers for another number of classes, to fine-tune.

    Returns:
        The weights under the model's names, and one sentence per adaptation.

    Raises:
        ValueError: as in `unwrapped`; or as in `check_fit`, if the weights belong to another model.
    """
    try:
        weights = unwrapped(weights)
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}.") from error
    notes = []
    if is_detectron2(weights):
        weights = from_detectron2(weights, is_panoptic=hasattr(model, "panoptic_head"))
        notes.append("converted the names and the order of classes from detectron2")
    if new_classes:
        notes += _keep_class_layers(weights, model.state_dict())
    check_fit(model, weights, path)
    return weights, notes


def _keep_class_layers(weights: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    kept = [
        name
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape and _CLASS_LAYER.search(name)
    ]
    weights.update({name: own[name] for name in kept})
    layers = sorted({name.rsplit(".", 1)[0] for name in kept})
    return [f"kept new layers for another number of classes: {', '.join(layers)}"] if layers else []
