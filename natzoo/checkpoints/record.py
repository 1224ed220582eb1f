"""What a checkpoint says of itself: of which model it is, its classes, and how pictures are prepared."""

from __future__ import annotations

import os
from typing import Any

import timm

RECORD = "record"  # its entry in a checkpoint

# Arguments of timm.create_model that name files or addresses, which no checkpoint may choose.
_REFUSED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def record_of(checkpoint: dict[str, Any], path: str | os.PathLike) -> dict[str, Any] | None:
    """The record that train.py or tools/convert.py left in a checkpoint; None if there is none.

    Returns:
        model, its registered name; model_kwargs, its arguments; num_classes; classes, their names or None; and
        preprocessing, of evaluation.

    Raises:
        ValueError: naming the file, if it is damaged or names a model or arguments that it may not.
    """
    if RECORD not in checkpoint:
        return None
    record = checkpoint[RECORD]
    kinds = {"model": str, "model_kwargs": dict, "num_classes": int, "preprocessing": dict}
    for name, kind in kinds.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise ValueError(f"{path} has a damaged record of its model: its {name} is missing or no {kind.__name__}.")
    if not timm.is_model(record["model"]):
        raise ValueError(f"{path} says that it is of the model {record['model']!r}, which is none that timm knows.")
    refused = sorted(_REFUSED & record["model_kwargs"].keys())
    if refused:
        raise ValueError(f"{path} asks for {', '.join(refused)} of its model, which no checkpoint may choose.")
    return {"classes": None, **record}
