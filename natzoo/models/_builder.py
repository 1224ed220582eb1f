"""Build registered models: configurations for timm, and weights through natzoo.checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureDictNet, PretrainedCfg, build_model_with_cfg, generate_default_cfgs
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn

from natzoo.checkpoints import find_entry, locate, locate_entry, zoo_entries
from natzoo.checkpoints.adapt import published_names


def make_default_cfgs(names: Iterable[str], first_conv: str, reduction: int = 32) -> dict[str, Any]:
    """Return timm's `default_cfgs` of a model family, from natzoo/zoo.yaml and the papers' evaluation protocol.

    Args:
        names: registered names with timm's tag, "MODEL.TAG".
        first_conv: name of the convolution that processes the image.
        reduction: ratio of the image size to the size of the last feature map.

    Raises:
        ValueError: if a name is not in natzoo/zoo.yaml.
    """
    return generate_default_cfgs({name: _cfg(name, first_conv, reduction) for name in names})


def _cfg(name: str, first_conv: str, reduction: int) -> dict[str, Any]:
    entry = find_entry(name)
    size = entry.facts.get("size", 224)
    return {
        "url": entry.url,
        "num_classes": entry.facts.get("classes", 1000),
        "input_size": (3, size, size),
        "pool_size": (size // reduction, size // reduction),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
        "license": "mit",
    }


def build(
    model_cls: type[nn.Module], variant: str, pretrained: bool, default_out_indices: Sequence[int], **kwargs: Any
) -> Any:
    """Build a registered model, or its feature extractor if `features_only` is in kwargs.

    Args:
        model_cls: class of the model.
        variant: registered name.
        pretrained: load the weights that `pretrained_cfg` refers to, by default the published ones.
        default_out_indices: feature maps of a feature extractor, unless kwargs contain out_indices.
        kwargs: arguments of timm.create_model and of the model class.

    Returns:
        An instance of model_cls, or a feature extractor of timm: by default FeatureGetterNet, whose maps are NCHW; with
        feature_cls "hook" or "fx" its maps are NHWC.

    Raises:
        ValueError: if the arguments are invalid, there are no published weights, or the weights do not match.
        FileNotFoundError: if `pretrained_cfg` refers to a missing file.
        DownloadError: if the weights cannot be downloaded.
    """
    _check_feature_cls(kwargs)
    stride = kwargs.pop("output_stride", None)
    if stride not in (None, 32):
        raise ValueError(
            f"output_stride = {stride!r} is not supported: the windows of a stage are trained for its resolution; use "
            "out_indices to select feature maps with a smaller stride."
        )
    if pretrained:
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        if not cfg.state_dict:
            # custom_load makes timm call the model's load_pretrained(file).
            path = _locate_weights(cfg, variant, kwargs.get("cache_dir"))
            overlay = {**overlay, "source": "", "file": str(path), "custom_load": True}
            kwargs["pretrained_cfg_overlay"] = overlay
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(default_out_indices), "feature_cls": "getter"},
        **kwargs,
    )


def _check_feature_cls(kwargs: dict[str, Any]) -> None:
    """Raise ValueError if kwargs select a feature extractor of timm that calls the modules of a model one by one."""
    feature_cls = kwargs.get("feature_cls") if kwargs.get("features_only") else None
    if isinstance(feature_cls, type) and issubclass(feature_cls, FeatureDictNet):
        feature_cls = feature_cls.__name__
    if feature_cls in ("list", "dict", "FeatureListNet", "FeatureDictNet"):
        raise ValueError(f"feature_cls = {feature_cls!r} is not supported; use 'getter' (default), 'hook' or 'fx'.")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights under their published names; timm calls this for weights passed as a state_dict."""
    return published_names(state_dict)


def _locate_weights(cfg: PretrainedCfg, variant: str, cache_dir: str | None) -> Path:
    """Return the weight file of a configuration; its fields have the same priority as in timm."""
    entry = zoo_entries().get(variant)
    if cfg.source == "hf-hub":
        return locate(f"hf-hub:{cfg.hf_hub_id}", cache_dir)
    if cfg.file:
        return locate(cfg.file, cache_dir)
    if entry is not None and cfg.url == entry.url:
        return locate_entry(entry, cache_dir)
    if cfg.url:
        return locate(cfg.url, cache_dir)
    if cfg.hf_hub_id:
        return locate(f"hf-hub:{cfg.hf_hub_id}", cache_dir)
    raise ValueError(f"{variant} has no published weights; use pretrained=False.")
