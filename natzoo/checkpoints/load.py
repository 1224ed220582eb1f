"""Loading weights into models: all of them or none, with a report that can be read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from natzoo.checkpoints.adapt import adapt


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike, new_classifier: bool = False
) -> list[str]:
    """Loads weights into a model, made to fit as `adapt` says; then every parameter must be there, and nothing else.

    Args:
        model: a model of natzoo.
        weights: what `read_weights` returned.
        path: the file that they are from, for the messages.
        new_classifier: whether a classifier for another number of classes is left as it is in the model.

    Returns:
        Sentences that say what was changed.

    Raises:
        ValueError: if the weights are of another model; lists what is missing, unexpected or of another shape. The
            model is then unchanged.
    """
    try:
        weights, notes = adapt(weights, model, new_classifier)
    except ValueError as error:
        raise ValueError(f"{path} is of no model that is known here: {error}") from error
    check_fit(model, weights, path)
    model.load_state_dict(weights)
    return notes


def check_fit(model: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Says what is wrong with weights for a model: ValueError if they are not all of its weights, and nothing else."""
    own = model.state_dict()
    other_shape = (name for name in own.keys() & weights.keys() if weights[name].shape != own[name].shape)
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
    broken = _complain("not finite", (name for name, value in weights.items() if not value.isfinite().all()))
    if broken:
        warnings.warn(f"{path} is damaged, or from training that failed: it has weights {broken}.", stacklevel=3)


def _complain(what: str, names: Iterable[str], shown: int = 4) -> str:
    names = sorted(names)
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what}: {', '.join(names[:shown])}{more}"
