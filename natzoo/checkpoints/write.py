"""Write files atomically: after a crash at any point, either the complete old file or the complete new one exists."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from natzoo.checkpoints.record import RECORD

DIGEST = "sha256"  # key of the metadata of a .safetensors file with the hash of its content


# ---------------------------------------------------------------------------------------------------------------------
# Any file
# ---------------------------------------------------------------------------------------------------------------------


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name in the same folder, sync it to disk, and rename it.

    Of several writers at a time, the last one to finish wins. A killed process leaves its temporary file behind;
    `natzoo.runs.lock_folder` deletes those of checkpoints.

    Args:
        path: the file; an existing one is replaced only by a complete new one.
        write: function that writes the content to an open binary file.

    Raises:
        OSError: if the folder is missing, full or not writable; names the file. An existing file is unchanged.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        text = f"{path} could not be written ({error.strerror}); an existing file is unchanged."
        raise OSError(error.errno, text) from error
    sync(path.parent)


def copy_atomically(source: Path, path: Path) -> None:
    """Create or replace a file as a hard link to another one, or as its copy on file systems without hard links."""
    temporary = _temporary(path)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Return an unused name in the folder of a file."""
    return path.with_name(f".{path.name[:60]}.{secrets.token_hex(6)}.tmp")


def write_folder(folder: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, sync it to disk, and rename it.

    Args:
        folder: the folder, which appears only when it is complete.
        write: function that writes the content into an empty folder.

    Raises:
        FileExistsError: if the folder already exists and is not empty.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists; choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        complete = Path(temporary) / folder.name
        complete.mkdir()
        write(complete)
        for path in (*complete.rglob("*"), complete):
            sync(path)
        os.replace(complete, folder)
    sync(folder.parent)


def write_table(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file with a header line, atomically.

    Raises:
        OSError: as in `write_atomically`.
    """
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def sync(path: Path) -> None:
    """Force the content of a file or folder to disk; do nothing on file systems that do not support it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def write_checkpoint(path: str | os.PathLike, checkpoint: dict[str, Any]) -> None:
    """Write tensors and plain data with torch.save, atomically.

    Raises:
        OSError: as in `write_atomically`.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch reports a full disk as a RuntimeError
            is_full = shutil.disk_usage(Path(path).parent).free < 2**20
            if not is_full and "DataLoader worker" in str(error):  # raised by a signal handler, unrelated to the file
                raise
            reason = os.strerror(errno.ENOSPC) if is_full else str(error).splitlines()[0]
            raise OSError(errno.ENOSPC if is_full else None, reason) from error

    write_atomically(path, write)


def write_weights(path: str | os.PathLike, weights: dict[str, Tensor], record: dict[str, Any] | None = None) -> None:
    """Write weights atomically, in the format of the file name extension.

    Args:
        path: .safetensors; .pth, .pt or .bin for torch.save; .pkl for detectron2, a plain pickle of NumPy arrays.
        weights: weights in any layout.
        record: plain data that describes their model, as in `record_of`; `read_checkpoint` returns it. A .pkl file
            cannot store it.

    Raises:
        ValueError: if the extension is unknown, or if a .pkl file would contain bfloat16.
        OSError: as in `write_atomically`.
    """
    # Copied, because neither format allows two views of the same memory.
    weights = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()
    }
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        text = None if record is None else json.dumps(record)
        metadata = {"format": "pt", DIGEST: digest(weights, text)}
        if text is not None:
            metadata[RECORD] = text
        write_atomically(path, lambda file: file.write(save(weights, metadata)))
    elif suffix in (".pth", ".pt", ".bin"):
        write_checkpoint(path, weights if record is None else {"state_dict": weights, RECORD: record})
    elif suffix == ".pkl":
        if any(value.dtype is torch.bfloat16 for value in weights.values()):
            raise ValueError(f"{path} cannot contain bfloat16, which NumPy lacks; use float32 or .safetensors.")
        arrays = {name: value.numpy() for name, value in weights.items()}
        content = {"model": arrays, "__author__": "natzoo", "matching_heuristics": True}
        write_atomically(path, lambda file: pickle.dump(content, file))
    else:
        raise ValueError(f"{path} has the unknown extension {suffix!r}; use .safetensors, .pth, .pt, .bin or .pkl.")


def digest(weights: Mapping[str, Tensor], record: str | None) -> str:
    """Return the SHA-256 of weights and the text of their record, which a .safetensors file has no checksum of."""
    total = hashlib.sha256((record or "").encode())
    for name, value in sorted(weights.items()):
        total.update(f"\0{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        total.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
