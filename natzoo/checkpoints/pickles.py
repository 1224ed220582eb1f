"""Reading plain pickles, as detectron2 writes them (Mask2Former's .pkl), without running what they may ask for.

A pickle is a program: it names functions and calls them. The reader here knows the few that make NumPy arrays, checks
what it is asked to call them with, and refuses any other. So a file can hold dicts, lists, tuples, strings, bytes,
numbers and arrays of numbers.
"""

from __future__ import annotations

import mmap
import pickle
import re
import struct
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch


def load_plain_pickle(path: Path) -> Any:
    """What a pickle holds, arrays as tensors.

    Raises:
        pickle.UnpicklingError: if it asks for anything but plain data and arrays of numbers.
        Exception: of any kind, if it is damaged.
    """
    # Mapped, since reading makes room for as many bytes as a pickle says that it has.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _to_tensors(_PlainUnpickler(content).load(), {})


class _PlainUnpickler(pickle._Unpickler):
    """The unpickler in Python: the one in C makes room for as many things as a file says that it will refer to."""

    def __init__(self, file: mmap.mmap):
        super().__init__(file, encoding="latin1")  # of Python 2, from which detectron2's first weights are

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if allowed is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed

    def persistent_load(self, identity: Any) -> Any:
        raise pickle.UnpicklingError("it refers to things outside of the file")

    def load_build(self) -> None:
        """Fills an array or a dtype; what attributes an OrderedDict had does not matter."""
        filled = self.stack[-2]
        if type(filled) is OrderedDict:
            self.stack.pop()
        elif isinstance(filled, (_Array, _Dtype)):
            super().load_build()
        else:
            raise pickle.UnpicklingError(f"it sets attributes of a {type(filled).__name__}")

    def load_bytearray8(self) -> None:
        """Makes room for what is there, not for what the file says is there."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


class _Array:
    """Stands for an array while its pickle is read: NumPy itself sees only what was checked."""

    content: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, in_columns, content = state
        self.content = _array(content, dtype, shape, "F" if in_columns else "C")


class _Dtype:
    """Stands for a dtype of numbers."""

    order = "<"

    def __init__(self, code: str, *flags: Any):
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, which are no numbers")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]
        if self.order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"it holds numbers in the unknown byte order {self.order!r}")

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


def _reconstruct(kind: type, shape: tuple, code: bytes) -> _Array:
    """An array that the pickle then fills."""
    if kind is not _Array:
        raise pickle.UnpicklingError("it makes an array in an unusual way")
    return _Array()


def _array(content: bytes | str | list, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    """An array of checked numbers; protocols before 3 may write their bytes as text."""
    content = content.encode("latin1") if isinstance(content, str) else content
    if not (
        isinstance(dtype, _Dtype)
        and isinstance(content, (bytes, bytearray))
        and isinstance(shape, tuple)
        and all(type(length) is int and length >= 0 for length in shape)
        and order in ("C", "F")
    ):
        raise pickle.UnpicklingError("it makes an array in an unusual way")
    if len(content) != prod(shape) * dtype.numpy().itemsize:
        raise pickle.UnpicklingError(f"it holds {len(content)} bytes for an array {shape} of {dtype.code}")
    return np.frombuffer(content, dtype.numpy()).reshape(shape, order=order)


def _frombuffer(content: bytes, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    """How protocol 5 writes arrays."""
    return _array(content, dtype, shape, order)


def _scalar(dtype: _Dtype, content: bytes | str) -> Any:
    return _array(content, dtype, (), "C").item()


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


_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): OrderedDict,
}


def _to_tensors(value: Any, done: dict[int, Any]) -> Any:
    """Plain data with tensors in place of arrays.

    `done` holds what came of each part by its id. A hundred bytes can stand for a list of two lists, each of the same
    two lists, and so on: those must not be made 2**100 times.
    """
    if id(value) not in done:
        done[id(value)] = _convert(value, done)
    return done[id(value)]


def _convert(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, _Array):
        if value.content is None:
            raise pickle.UnpicklingError("it holds an array without content")
        value = value.content
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    if isinstance(value, dict):
        return {key: _to_tensors(item, done) for key, item in dict.items(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_tensors(item, done) for item in value)
    if value is None or type(value) in (bool, int, float, complex, str, bytes, bytearray):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, which is no plain data")
