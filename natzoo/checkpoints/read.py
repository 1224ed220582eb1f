"""Reading weight files without ever running code from them."""

from __future__ import annotations

import json
import os
import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from safetensors import safe_open
from torch import Tensor

from natzoo.checkpoints.pickles import load_plain_pickle
from natzoo.checkpoints.record import RECORD

# Where training scripts put the weights, best first: an average of the weights is what one evaluates and publishes.
_WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_DTYPES |= {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Everything a .pth, .pth.tar, .pt, .bin or .safetensors file holds, or a plain pickle (.pkl), on the CPU.

    Beside tensors and plain data it may hold an argparse.Namespace, in which timm's training script keeps its options.
    Of a .safetensors file the weights alone, or where `write_weights` left a record, both, as state_dict and record.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it may not or cannot be read.
        ValueError: if it is truncated, holds anything else, or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: check the path.")
    with path.open("rb") as file:  # what the system refuses is said in its words
        start = file.read(100)
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{path} is a web page, not a checkpoint: get it again, from an address that gives the file.")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix == ".pkl":
            checkpoint = load_plain_pickle(path)
        else:
            if start.startswith(b"PK"):
                _refuse_compressed(path)
            with torch.serialization.safe_globals([Namespace]):
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
        ValueError: naming the file, if there are none, or if one is no dense array of real numbers.
    """
    # The methods of dict itself, because a pickle may give an OrderedDict attributes of the same names.
    for wrapper in _WRAPPERS:
        if isinstance(dict.get(checkpoint, wrapper), dict):
            checkpoint = dict.get(checkpoint, wrapper)
            break
    entries = dict.items(checkpoint)
    weights = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        names = ", ".join(str(name) for name, _ in list(entries)[:5]) or "none"
        raise ValueError(f"{path} holds no weights; its entries: {names}.")
    for name, value in weights.items():
        if not _is_dense(value):
            raise ValueError(f"{path} is damaged or made to harm: {name} is no dense array of real numbers.")
    return weights


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights of a file, as `weights_of`.

    Raises:
        FileNotFoundError, OSError, ValueError: as `read_checkpoint` and `weights_of`.
    """
    return weights_of(read_checkpoint(path), path)


def _refuse_compressed(path: Path) -> None:
    """Raises ValueError if a zip file unpacks to more than its own size: torch.save compresses nothing."""
    with ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"it is compressed, as torch.save never does, and would unpack to {unpacked} bytes")


def _is_dense(value: Tensor) -> bool:
    """Whether a tensor holds what its shape says: a file can also describe one of 10**12 times the same number."""
    if value.layout is not torch.strided or value.is_meta or value.dtype not in _DTYPES:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _reason(error: Exception) -> str:
    """The first sentence of a library's error, which may run over many lines; of torch's, the one that says why."""
    text = str(error)
    asked = re.search(r"GLOBAL ([\w.]+)", text)
    if asked:
        return f"it asks for {asked[1]}"
    lines = text.split("WeightsUnpickler error: ")[-1].strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
