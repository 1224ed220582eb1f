"""How families make their models: timm's way, with weights that come by natzoo's own road."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from natzoo.checkpoints.sources import locate


def build(cls: type[nn.Module], variant: str, pretrained: bool, maps: Sequence[int], **kwargs: Any) -> nn.Module:
    """A registered model, or with features_only its feature extractor.

    Args:
        cls: the family's class.
        variant: registered name.
        pretrained: whether to load weights: those of `pretrained_cfg`, which knows the published ones by their tag.
        maps: those that a feature extractor gives unless asked for others.
        kwargs: of timm.create_model and of the family.
    """
    if pretrained:
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        if not cfg.state_dict:
            # With this timm calls load_pretrained(file) of the model.
            overlay = {**overlay, "source": "", "file": str(locate(_where(cfg, variant))), "custom_load": True}
            kwargs["pretrained_cfg_overlay"] = overlay
    feature_cfg = {"out_indices": tuple(maps), "feature_cls": "getter"}
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _where(cfg: Any, variant: str) -> str:
    """What `locate` takes, in timm's order."""
    if cfg.source == "hf-hub":
        return f"hf-hub:{cfg.hf_hub_id}"
    if cfg.file:
        return cfg.file
    if cfg.url:
        return cfg.url
    if cfg.hf_hub_id:
        return f"hf-hub:{cfg.hf_hub_id}"
    raise ValueError(f"{variant} has no published weights: use pretrained=False.")
