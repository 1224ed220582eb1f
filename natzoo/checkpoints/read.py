"""Read weight files without ever running code from them.

PyTorch files are read by torch.load(weights_only=True), .safetensors files by safetensors. Plain pickles, which
detectron2 writes (Mask2Former's .pkl), need the restricted reader at the end of this file.

A file may neither describe more than it holds nor be damaged: what it takes to read it is in proportion to its size,
and checksums are verified where the format has them.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import pickletools
import re
import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal
from zipfile import ZipFile

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from natzoo.checkpoints.record import RECORD
from natzoo.checkpoints.write import DIGEST, digest
from natzoo.schema import parts_of, shown

# Entries that contain the weights, by priority: averaged weights are the ones to evaluate and publish.
_WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_DTYPES |= {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_MAX_SHARING = 8  # how often a file may refer to each of its bytes on average; detectors share heads between stages
_CHUNK = 2**20
_PROGRAMS = {".onnx", ".pt2", ".xml", ".engine"}
_MAX_RECORD = 2**24  # bytes of JSON in a .safetensors file
# torch.load calls these, but no checkpoint needs them: they allocate what they are told, or copy what they are given.
_REFUSED_GLOBALS = re.compile(
    r"(builtins|__builtin__)\.bytearray|torch(\.cuda)?\.\w*Tensor|torch\._utils\._rebuild_device_tensor_\w+"
)
# These copy too, but few of them are needed: learning-rate schedules count their milestones.
_RARE_GLOBALS = re.compile(r"collections\.Counter|_codecs\.encode|(builtins|__builtin__)\.set")
_MAX_RARE = 16


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read everything that a .pth, .pth.tar, .pt, .bin, .safetensors or plain pickle (.pkl) file contains.

    Args:
        path: the file. It may contain tensors, plain data, and an argparse.Namespace, in which timm's training script
            stores its options.

    Returns:
        The content, with all tensors on the CPU. For .safetensors: the weights, or if `write_weights` stored a record
        with them, {"state_dict": weights, "record": record}.

    Raises:
        FileNotFoundError: if the file does not exist.
        OSError: if the file cannot be read.
        ValueError: if the file is truncated, contains anything else, or is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {problem}; check the path.")
    with path.open("rb") as file:  # outside of the try block: errors of the system pass unchanged
        start = file.read(100)
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{path} is a web page, not a checkpoint; download the file itself.")
    if path.suffix.lower() in _PROGRAMS:
        raise ValueError(f"{path} is an exported program, not a checkpoint; use the checkpoint that it was made from.")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix == ".pkl":
            checkpoint = _read_plain_pickle(path)
        else:
            _check_torch_file(path, is_zip=start.startswith(b"PK"))
            with torch.serialization.safe_globals([Namespace]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it contains more than plain data, and unpickling it could run code ({_reason(error)})."
        ) from error
    except Exception as error:  # damaged bytes can cause any error in the parsers
        raise ValueError(
            f"{path} is truncated or not a checkpoint; check the path, or download it again ({_reason(error)})."
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} contains a {type(checkpoint).__name__}; a checkpoint must be a dict of tensors.")
    try:
        for part in parts_of(checkpoint):
            if isinstance(part, (Tensor, OrderedDict)):
                vars(part).clear()  # a pickle can set attributes, which hide methods
    except ValueError as error:
        raise ValueError(f"{path} is refused: {error}; a checkpoint has tensors and options.") from error
    return checkpoint


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the weights in a file: averaged ones if there are any, else the model's.

    Raises:
        FileNotFoundError, OSError, ValueError: as in `read_checkpoint` and `weights_of`.
    """
    return weights_of(read_checkpoint(path), path)


def weights_of(checkpoint: dict[str, Any], path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the weights in the result of `read_checkpoint`: averaged ones if there are any, else the model's.

    Args:
        checkpoint: the result of `read_checkpoint`.
        path: the file, for messages.

    Raises:
        ValueError: if there are no weights, or if one of them is not a dense tensor of real numbers.
    """
    for wrapper in _WRAPPERS:
        wrapped = checkpoint.get(wrapper)
        if isinstance(wrapped, dict):
            checkpoint = wrapped
            break
    entries = checkpoint.items()
    weights = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        names = ", ".join(shown(name) for name, _ in list(entries)[:5]) or "none"
        raise ValueError(f"{path} contains no weights; its entries: {names}.")
    for name, value in weights.items():
        if not is_dense(value):
            raise ValueError(f"{path} is damaged or malicious: {shown(name)} is not a dense tensor of real numbers.")
    stored = sum(
        {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in weights.values()}.values()
    )
    claimed = sum(value.nbytes for value in weights.values())
    if claimed > _MAX_SHARING * stored:
        raise ValueError(f"{path} is refused: its weights take {claimed} bytes but share {stored} stored ones.")
    return weights


def is_dense(value: Tensor) -> bool:
    """Return whether a tensor stores every number of its shape; a small file can declare a single one as 10**12."""
    if value.layout is not torch.strided or value.is_meta or value.dtype not in _DTYPES:
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt", device="cpu") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        metadata = file.metadata() or {}
    record = metadata.get(RECORD)
    if DIGEST in metadata and metadata[DIGEST] != digest(weights, record):
        raise ValueError("its content does not match its own hash")
    if record is not None and len(record) > _MAX_RECORD:
        raise ValueError(f"its record has more than {_MAX_RECORD} characters")
    return weights if record is None else {"state_dict": weights, RECORD: json.loads(record)}


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch files
# ---------------------------------------------------------------------------------------------------------------------


def _check_torch_file(path: Path, is_zip: bool) -> None:
    """Check a file before torch.load reads it.

    Raises:
        ValueError: if a zip file unpacks to more than its own size, or if the checksum of a part is wrong.
        pickle.UnpicklingError: as in `_check_pickle`.
        Exception: any type, if the file is damaged.
    """
    if not is_zip:  # up to five pickles in a row, then numbers without a checksum
        with path.open("rb") as file:
            size = path.stat().st_size
            for _ in range(5):
                if file.tell() < size:
                    _check_pickle(file)
        return
    with ZipFile(path) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > path.stat().st_size:
            raise ValueError(f"it is compressed, which torch.save never does, and would unpack to {unpacked} bytes")
        for entry in entries:
            if entry.CRC == 0:  # torch.save can be told to write no checksum
                del entry.CRC
            with archive.open(entry) as file:  # verifies the checksum at the end of the file
                if entry.filename.endswith("data.pkl"):
                    _check_pickle(io.BytesIO(file.read()))
                while file.read(_CHUNK):
                    pass


def _check_pickle(file: BinaryIO) -> None:
    """Check that a pickle only uses functions that checkpoints need, and that it cannot multiply what it contains.

    Raises:
        pickle.UnpicklingError: if it does.
    """
    memo: dict[Any, str] = {}  # where the pickle keeps functions
    function = ""  # that the last operation has put on the stack
    expected: list[str] = []  # next operations, after an OrderedDict: it may only be created empty
    rare = 0
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if function and name in ("BINPUT", "LONG_BINPUT"):
            memo[argument], function = function, ""
            continue
        if expected and expected.pop() != name:
            raise pickle.UnpicklingError("it requests collections.OrderedDict with content")
        if name == "GLOBAL":
            function = str(argument).replace(" ", ".")
        else:
            function = memo.get(argument, "") if name in ("BINGET", "LONG_BINGET") else ""
        rare += bool(_RARE_GLOBALS.fullmatch(function))
        if _REFUSED_GLOBALS.fullmatch(function) or rare > _MAX_RARE:
            raise pickle.UnpicklingError(f"it requests {function}")
        if function == "collections.OrderedDict":
            expected = ["REDUCE", "EMPTY_TUPLE"]


def _reason(error: Exception) -> str:
    """Shorten a library's error to the sentence that states the reason."""
    text = str(error)
    requested = re.search(r"GLOBAL ([\w.]+)", text)
    if requested:
        return f"it requests {requested[1]}"
    lines = text.split("WeightsUnpickler error: ")[-1].strip().splitlines() or [type(error).__name__]
    line = lines[0].split(". ")[0].rstrip(".")
    return "".join(character if character.isprintable() else "?" for character in line[:300])


# ---------------------------------------------------------------------------------------------------------------------
# Plain pickles
#
# A pickle is a program: it names functions and calls them. This reader knows only the functions that create NumPy
# arrays, checks their arguments, and refuses all others. So a file can only contain dicts, lists, tuples, strings,
# bytes, numbers and arrays of numbers.
# ---------------------------------------------------------------------------------------------------------------------


def _read_plain_pickle(path: Path) -> Any:
    """Return the content of a pickle, with arrays converted to tensors.

    Raises:
        pickle.UnpicklingError: if it requests anything other than plain data and arrays of numbers.
        Exception: any type, if it is damaged.
    """
    # Mapped into memory: a file object allocates as many bytes as the pickle claims to contain.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        unpickler = _PlainUnpickler(content)
        return _Converter(unpickler.budget).convert(unpickler.load())


class _PlainUnpickler(pickle._Unpickler):
    """Restricted unpickler, based on the pure-Python one: the C one allocates as large a memo as the file claims."""

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]

    def __init__(self, file: mmap.mmap):
        super().__init__(file, encoding="latin1")  # detectron2's first weights were written by Python 2
        self.budget = _Budget(_MAX_SHARING * len(file))

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if allowed is None:
            raise pickle.UnpicklingError(f"it requests {module}.{name}")
        return self._encode if allowed is _encode else allowed

    def _encode(self, text: str, encoding: str) -> bytes:
        self.budget.spend(len(text))
        return _encode(text, encoding)

    def persistent_load(self, identity: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of the file")

    def load_build(self) -> None:
        """Set the state of an array or a dtype; drop the attributes of an OrderedDict."""
        target = self.stack[-2]
        if type(target) is OrderedDict:
            self.stack.pop()
        elif isinstance(target, (_Array, _Dtype)):
            super().load_build()  # type: ignore[misc]
        else:
            raise pickle.UnpicklingError(f"it sets attributes of a {type(target).__name__}")

    def load_bytearray8(self) -> None:
        """Allocate only as many bytes as the file has."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


class _Array:
    """Placeholder for an array while its pickle is read, so that NumPy only sees checked arguments."""

    content: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, is_fortran, content = state
        self.content = _make_array(content, dtype, shape, "F" if is_fortran else "C")


class _Dtype:
    """Placeholder for a numeric dtype."""

    order = "<"

    def __init__(self, code: str, *flags: Any):
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"it contains an array of dtype {code!r}, which is not numeric")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]
        if self.order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"it contains numbers in the unknown byte order {self.order!r}")

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


def _make_array(content: bytes | str | list, dtype: _Dtype, shape: tuple, order: Literal["C", "F"]) -> np.ndarray:
    """Check the arguments and create an array."""
    content = content.encode("latin1") if isinstance(content, str) else content  # protocols 0 to 2 may write text
    if not (
        isinstance(dtype, _Dtype)
        and isinstance(content, (bytes, bytearray))
        and isinstance(shape, tuple)
        and all(type(length) is int and length >= 0 for length in shape)
        and order in ("C", "F")
    ):
        raise pickle.UnpicklingError("it creates an array in an unusual way")
    if len(content) != prod(shape) * dtype.numpy().itemsize:
        raise pickle.UnpicklingError(f"it contains {len(content)} bytes for an array {shape} of {dtype.code}")
    return np.frombuffer(content, dtype.numpy()).reshape(shape, order=order)


# Replacements for the functions that NumPy's pickles call.


def _reconstruct(kind: type, shape: tuple, code: bytes) -> _Array:
    """Create an empty array; `__setstate__` fills it."""
    if kind is not _Array:
        raise pickle.UnpicklingError("it creates an array in an unusual way")
    return _Array()


def _frombuffer(content: bytes, dtype: _Dtype, shape: tuple, order: Literal["C", "F"]) -> np.ndarray:
    """Create an array, in protocol 5."""
    return _make_array(content, dtype, shape, order)


def _scalar(dtype: _Dtype, content: bytes | str) -> Any:
    return _make_array(content, dtype, (), "C").item()


def _encode(text: str, encoding: str) -> bytes:
    """Create bytes, in protocols 0 to 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes something other than bytes")
    return text.encode("latin1")


def _empty_bytes(*arguments: Any) -> bytes:
    """Create empty bytes, in protocols 0 to 2."""
    if arguments:
        raise pickle.UnpicklingError("it creates bytes in an unusual way")
    return b""


_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("builtins", "bytes"): _empty_bytes,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Budget:
    """Limits the bytes that a pickle copies: it can refer to the same content any number of times."""

    def __init__(self, size: int):
        self.remaining = size

    def spend(self, size: int) -> None:
        self.remaining -= size
        if self.remaining < 0:
            raise pickle.UnpicklingError("it repeats its content many times")


class _Converter:
    """Converts the arrays in plain data to tensors, each object once.

    `converted` maps the id of an object to its result. Without it, a hundred bytes that describe nested lists, each
    containing the next one twice, would become a result with 2**100 entries.
    """

    def __init__(self, budget: _Budget):
        self.budget = budget
        self.converted: dict[int, Any] = {}

    def convert(self, value: Any) -> Any:
        if id(value) not in self.converted:
            self.converted[id(value)] = self._convert(value)
        return self.converted[id(value)]

    def _convert(self, value: Any) -> Any:
        if isinstance(value, _Array):
            if value.content is None:
                raise pickle.UnpicklingError("it contains an array without content")
            value = value.content
        if isinstance(value, np.ndarray):
            self.budget.spend(value.nbytes)
            return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        if isinstance(value, dict):
            return {key: self.convert(item) for key, item in dict.items(value)}
        if isinstance(value, (list, tuple)):
            return type(value)(self.convert(item) for item in value)
        if value is None or type(value) in (bool, int, float, complex, str, bytes, bytearray):
            return value
        raise pickle.UnpicklingError(f"it contains a {type(value).__name__}, which is not plain data")
