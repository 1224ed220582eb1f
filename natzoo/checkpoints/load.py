"""Loading weights into models: all of them or none, with a report that can be read."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor, nn


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike, new_classifier: bool = False
) -> bool:
    """Loads weights into a model; every parameter must be there, and nothing else.

    Args:
        model: a timm model.
        weights: what `read_weights` returned.
        path: the file that they are from, for the messages.
        new_classifier: whether a classifier for another number of classes is left as it is in the model.

    Returns:
        Whether the classifier was left so.

    Raises:
        ValueError: if the weights are of another model; lists what is missing, unexpected or of another shape. The
            model is then unchanged.
    """
    own = model.state_dict()
    other_shape = {name for name in own.keys() & weights.keys() if weights[name].shape != own[name].shape}
    classifier = f"{model.default_cfg['classifier']}." if new_classifier else None
    is_left = bool(classifier and other_shape) and all(name.startswith(classifier) for name in other_shape)
    if is_left:
        weights = {name: own[name] if name.startswith(classifier) else value for name, value in weights.items()}
        other_shape = set()
    complaints = [
        _complain("missing", own.keys() - weights.keys()),
        _complain("unexpected", weights.keys() - own.keys()),
        _complain(
            "of another shape",
            (f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}" for name in other_shape),
        ),
    ]
    text = "; ".join(complaint for complaint in complaints if complaint)
    if text:
        raise ValueError(f"{path} is of another model than the {type(model).__name__} built here: {text}.")
    model.load_state_dict(weights)
    return is_left


def _complain(what: str, names: Iterable[str], shown: int = 4) -> str:
    names = sorted(names)
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what}: {', '.join(names[:shown])}{more}"
