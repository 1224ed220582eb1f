"""Reading weight files without ever running code from them."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from natzoo.checkpoints.pickles import load_plain_pickle
from natzoo.checkpoints.write import RECORD

# Where training scripts put the weights, best first: an average of the weights is what one evaluates and publishes.
_WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Everything a .pth, .pth.tar, .pt, .bin or .safetensors file holds, or a plain pickle (.pkl), on the CPU.

    Of a .safetensors file the weights alone, or where `write_weights` left a record, both, as state_dict and record.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it may not or cannot be read.
        ValueError: if it is truncated, holds more than tensors and plain data, or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: check the path.")
    with path.open("rb"):  # what the system refuses is said in its words
        pass
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix == ".pkl":
            checkpoint = load_plain_pickle(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is not plain weights, and unpickling more could run code ({_reason(error)})."
        ) from error
    except Exception as error:  # damaged bytes meet any of the parsers' errors
        raise ValueError(f"{path} is truncated or no checkpoint: get it again ({_reason(error)}).") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, but a checkpoint is a dict of tensors.")
    return checkpoint


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt", device="cpu") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        record = (file.metadata() or {}).get(RECORD)
    return weights if record is None else {"state_dict": weights, RECORD: json.loads(record)}


def weights_of(checkpoint: dict[str, Any], path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in what `read_checkpoint` returned: the averaged ones if there are any, else the model's.

    Raises:
        ValueError: naming the file, if there are none.
    """
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint.get(wrapper), dict):
            checkpoint = checkpoint[wrapper]
            break
    weights = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not weights:
        entries = ", ".join(map(str, list(checkpoint)[:5])) or "none"
        raise ValueError(f"{path} holds no weights; its entries: {entries}.")
    return weights


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights of a file, as `weights_of`.

    Raises:
        FileNotFoundError, OSError, ValueError: as `read_checkpoint` and `weights_of`.
    """
    return weights_of(read_checkpoint(path), path)


def _reason(error: Exception) -> str:
    """The first sentence of a library's error, which may run over many lines."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
