"""Reading plain pickles, as detectron2 writes them (Mask2Former's .pkl), without running what they may ask for.

A pickle is a program: it names functions and calls them. The reader here knows the few that make NumPy arrays, checks
what it is asked to call them with, and refuses any other. So a file can hold dicts, lists, tuples, strings, bytes,
numbers and arrays of numbers.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


def load_plain_pickle(path: Path) -> Any:
    """What a pickle holds, arrays as tensors.

    Raises:
        pickle.UnpicklingError: if it asks for anything but plain data and arrays of numbers.
        Exception: of any kind, if it is damaged.
    """
    with path.open("rb") as file:
        return _to_tensors(_PlainUnpickler(file).load())


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin1")  # of Python 2, from which detectron2's first weights are

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if allowed is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed

    def persistent_load(self, identity: Any) -> Any:
        raise pickle.UnpicklingError("it refers to things outside of the file")


class _Array(np.ndarray):
    """Stands for numpy.ndarray, so that its own constructor cannot be called."""

    def __new__(cls, *arguments: Any) -> _Array:
        raise pickle.UnpicklingError("it makes an array in an unusual way")


def _reconstruct(kind: type, shape: tuple, code: bytes) -> np.ndarray:
    """An empty array, which the pickle then fills: NumPy checks that shape and bytes agree."""
    if kind is not _Array or shape != (0,) or code not in (b"b", "b"):
        raise pickle.UnpicklingError("it makes an array in an unusual way")
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _dtype(code: str, *flags: Any) -> np.dtype:
    return np.dtype(_checked_code(code))


def _scalar(dtype: np.dtype, content: bytes | str) -> Any:
    content = content.encode("latin1") if isinstance(content, str) else content
    dtype = np.dtype(_checked_code(dtype.str.lstrip("<>|=")))
    if len(content) != dtype.itemsize:
        raise pickle.UnpicklingError("a number has the wrong size")
    return np.frombuffer(content, dtype)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How protocols before 3 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes something other than bytes")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    """How those protocols write empty bytes."""
    if arguments:
        raise pickle.UnpicklingError("it makes bytes in an unusual way")
    return b""


def _frombuffer(content: bytes, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    """How protocol 5 writes arrays. NumPy checks that shape and bytes agree."""
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _checked_code(code: Any) -> str:
    if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
        raise pickle.UnpicklingError(f"it holds an array of {code!r}, which are no numbers")
    return code


_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): OrderedDict,
}


def _to_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    if isinstance(value, dict):
        return {key: _to_tensors(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_tensors(item) for item in value)
    return value
