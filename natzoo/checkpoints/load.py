"""Loading weights into models: all of them or none, with a report that can be read."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import nn

from natzoo.checkpoints.read import read_weights


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Loads a weight file into a model; every parameter must be there, and nothing else.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, or is of another model; lists what is missing, unexpected or of another
            shape. The model is then unchanged.
    """
    weights = read_weights(path)
    own = model.state_dict()
    complaints = [
        _complain("missing", own.keys() - weights.keys()),
        _complain("unexpected", weights.keys() - own.keys()),
        _complain(
            "of another shape",
            (
                f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
                for name in own.keys() & weights.keys()
                if weights[name].shape != own[name].shape
            ),
        ),
    ]
    complaints = [complaint for complaint in complaints if complaint]
    if complaints:
        text = "; ".join(complaints)
        raise ValueError(f"{path} is of another model than the {type(model).__name__} built here: {text}.")
    model.load_state_dict(weights)


def _complain(what: str, names: Iterable[str], shown: int = 4) -> str:
    names = sorted(names)
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what}: {', '.join(names[:shown])}{more}"
