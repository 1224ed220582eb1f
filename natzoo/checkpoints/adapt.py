"""Weights made to fit a model that differs from the one they are of: in names, classes, input channels or window."""

from __future__ import annotations

import re
from collections.abc import Iterable

from timm.models import adapt_input_conv
from torch import Tensor, nn

from natzoo.checkpoints.keys import from_hf, is_hf
from natzoo.checkpoints.rpb import resize_rpb

_STAGE_NORM = re.compile(r"norm\d\.")  # of a backbone for detection and segmentation
_INDEX = "relative_position_index"  # of ViT-rpb: follows from the size of the map


def published_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their published names, whatever layout they have: data-parallel, compiled, OpenMMLab, Hugging Face.

    Of a detector or segmenter the backbone alone is taken.

    Raises:
        ValueError: if weights are of Hugging Face's layout but not its models, or as `unwrapped`.
    """
    weights = unwrapped(weights)
    prefix = backbone_prefix(weights)
    if prefix:
        weights = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    return from_hf(weights) if is_hf(weights) else weights


def unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without what data-parallel and compiled models put before their names.

    Raises:
        ValueError: if two have one name.
    """
    names = {name: re.sub(r"^(?:module\.|_orig_mod\.)+", "", name) for name in weights}
    if len(set(names.values())) < len(names):
        raise ValueError("it has the same weights twice, with and without module. or _orig_mod. before their names.")
    return {names[name]: value for name, value in weights.items()}


def backbone_prefix(names: Iterable[str]) -> str:
    """What the names of a backbone begin with in a detector or segmenter of OpenMMLab or transformers; "" in others."""
    for name in names:
        if name.startswith("backbone."):
            return "backbone."
        prefix, found, _ = name.partition("embeddings.patch_embeddings.projection.")
        if found and prefix not in ("", "nat.", "dinat."):
            return prefix
    return ""


def adapt(
    weights: dict[str, Tensor], model: nn.Module, new_classifier: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights for a model, and sentences that say what was changed.

    - Names become the published ones, as by `published_names`.
    - A bias table of another window is stretched, as published for 7x7 to 11x11 windows.
    - The first convolution takes other numbers of input channels: colours are summed or repeated, as timm does.
    - With `new_classifier` a classifier of other classes is left as it is in the model; a model without one takes none.
    - A backbone for detection and segmentation, with norm0 .. norm3, takes those of a classifier, which has none of
      them, and leaves out its final norm. With `new_classifier` a classifier likewise takes those of a backbone, all
      but its final norm.

    What differs otherwise is left for the caller to refuse.

    Raises:
        ValueError: as `published_names`.
    """
    own = model.state_dict()
    about = getattr(model, "default_cfg", None) or {}
    weights = published_names(weights)
    notes: list[str] = []
    _take_tables(weights, own, notes)
    _take_first_convolution(weights, own, about.get("first_conv"), notes)
    _take_classifier(weights, own, about.get("classifier", "head"), new_classifier, notes)
    _take_stage_norms(weights, own, new_classifier, notes)
    return weights, notes


def _take_tables(weights: dict[str, Tensor], own: dict[str, Tensor], notes: list[str]) -> None:
    sizes = set()
    for name in own.keys() & weights.keys():
        old, new = weights[name], own[name]
        if name.endswith(_INDEX):
            weights[name] = new
        elif name.endswith("rpb") and old.shape != new.shape and old.dim() == 3 and old.shape[0] == new.shape[0]:
            weights[name] = resize_rpb(old, tuple(new.shape[1:]))
            sizes.add((*old.shape[1:], *new.shape[1:]))
    for a, b, c, d in sorted(sizes):
        notes.append(f"the relative position bias was stretched from {a}x{b} to {c}x{d}")


def _take_first_convolution(
    weights: dict[str, Tensor], own: dict[str, Tensor], first: str | None, notes: list[str]
) -> None:
    name = f"{first}.weight"
    if name not in own or name not in weights:
        return
    old, new = weights[name], own[name]
    if old.dim() == new.dim() and old.shape[1] == 3 and old.shape[1] != new.shape[1]:
        weights[name] = adapt_input_conv(new.shape[1], old)
        notes.append(f"the first convolution was made to take {new.shape[1]} channels instead of 3")


def _take_classifier(
    weights: dict[str, Tensor], own: dict[str, Tensor], classifier: str, new_classifier: bool, notes: list[str]
) -> None:
    theirs = {name for name in weights if name.startswith(f"{classifier}.")}
    ours = {name for name in own if name.startswith(f"{classifier}.")}
    if theirs and not ours:
        for name in theirs:
            del weights[name]
    elif (
        new_classifier and ours and any(name not in weights or weights[name].shape != own[name].shape for name in ours)
    ):
        for name in theirs - ours:
            del weights[name]
        weights.update({name: own[name] for name in ours})
        classes = own[f"{classifier}.weight"].shape[0]
        their = "another number" if theirs else "none"
        notes.append(f"the classifier starts anew: it has {classes} classes, but the weights have {their}")


def _take_stage_norms(
    weights: dict[str, Tensor], own: dict[str, Tensor], new_classifier: bool, notes: list[str]
) -> None:
    ours = {name for name in own if _STAGE_NORM.match(name)}
    theirs = {name for name in weights if _STAGE_NORM.match(name)}
    if ours and not theirs:
        _exchange(weights, own, ours, [name for name in weights if name.startswith("norm.") and name not in own])
        notes.append("the norms of the stages' maps start anew: a classifier has none")
    elif theirs and not ours and new_classifier:
        _exchange(weights, own, [name for name in own if name.startswith("norm.") and name not in weights], theirs)
        notes.append("the final norm starts anew: a backbone for detection and segmentation has one for each map")


def _exchange(weights: dict[str, Tensor], own: dict[str, Tensor], taken: Iterable[str], removed: Iterable[str]) -> None:
    """Takes some weights from the model itself in place of others."""
    for name in removed:
        del weights[name]
    weights.update({name: own[name] for name in taken})
