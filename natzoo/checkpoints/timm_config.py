"""Read config.json of repositories and folders in timm's form, as timm.models.push_to_hf_hub writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from natzoo import command_line
from natzoo.checkpoints.record import MAX_CLASSES
from natzoo.schema import Rule, check_values, integer, mapping, sequence, text

_MAX_BYTES = 2**25
_NAMES = sequence(text())
_RULES: dict[str, Rule] = {
    "architecture": text(200),
    "num_classes": integer(1, MAX_CLASSES),
    "model_args": mapping(),
    "pretrained_cfg": mapping(),
    "label_names": Rule(
        f"{_NAMES.expected}, or a dictionary of them",
        lambda value: _NAMES.holds(list(value.values()) if isinstance(value, dict) else value),
    ),
}
_PREPROCESSING = ("input_size", "crop_pct", "interpolation", "mean", "std")


def read_timm_record(path: Path) -> dict[str, Any] | None:
    """Return the description of the model in timm's config.json, for `record_of`, which checks it further.

    Raises:
        ValueError: if the file is not JSON, or has invalid values; names the file and the field.

    Returns:
        None if the file is not in timm's form.
    """
    content = command_line.read_json(path, "download it again", limit=_MAX_BYTES)
    if not isinstance(content, dict) or "architecture" not in content:
        return None
    check_values(str(path), content, _RULES, required=("architecture", "num_classes"))
    config, names = content.get("pretrained_cfg", {}), content.get("label_names")
    return {
        "model": content["architecture"],
        "model_kwargs": content.get("model_args", {}),
        "num_classes": content["num_classes"],
        "classes": list(names.values()) if isinstance(names, dict) else names,
        "preprocessing": {name: config[name] for name in _PREPROCESSING if name in config},
    }
