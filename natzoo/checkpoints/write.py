"""Writing files so that a crash at any byte leaves either the old file or the new one, whole."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from natzoo.checkpoints.record import RECORD


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file under a temporary name beside it, forces it to the disk, and renames it.

    The temporary name is always the same, so that what a killed process left is overwritten by the next write; a file
    has one writer at a time.

    Args:
        path: where the file will be; an older one there is replaced only by a complete new one.
        write: writes the content to the open binary file that it is given.

    Raises:
        OSError: naming the file, if the folder is missing, full or not writable; an older file is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
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
        text = f"{path} could not be written; what was there before is unharmed ({error.strerror})."
        raise OSError(error.errno, text) from error
    sync(path.parent)


def write_folder(folder: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Writes a folder under a temporary name, forces it to the disk, and renames it.

    Args:
        folder: where it will be; it appears when all of it is written.
        write: writes the content into the empty folder that it is given.

    Raises:
        FileExistsError: if there is such a folder already and it is not empty.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already: choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        write(whole)
        for path in (*whole.rglob("*"), whole):
            sync(path)
        os.replace(whole, folder)
    sync(folder.parent)


def write_table(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file with a line of column names atomically; raises OSError as `write_atomically`."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_checkpoint(path: str | os.PathLike, checkpoint: dict[str, Any]) -> None:
    """Writes a dict of tensors, numbers, strings and containers of them with torch.save, atomically."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # how torch reports a full disk, in words of its own
            is_full = shutil.disk_usage(Path(path).parent).free < 2**20
            if not is_full and "DataLoader worker" in str(error):  # it has nothing to do with the file
                raise
            reason = os.strerror(errno.ENOSPC) if is_full else str(error).splitlines()[0]
            raise OSError(errno.ENOSPC if is_full else None, reason) from error

    write_atomically(path, write)


def write_weights(path: str | os.PathLike, weights: dict[str, Tensor], record: dict[str, Any] | None = None) -> None:
    """Writes weights atomically, in the form that the name's ending tells.

    Args:
        path: .safetensors; .pth, .pt or .bin for torch.load; .pkl for detectron2, a plain pickle of NumPy arrays.
        weights: of any layout.
        record: plain data that says of which model they are, as train.py's checkpoints have it; `read_checkpoint` gives
            it back. A .pkl has no place for it.

    Raises:
        ValueError: on another ending; on bfloat16 in a .pkl.
        OSError: as `write_atomically`.
    """
    # Copies, since neither format may hold two views of one memory.
    weights = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()
    }
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        metadata = {"format": "pt"} if record is None else {"format": "pt", RECORD: json.dumps(record)}
        write_atomically(path, lambda file: file.write(save(weights, metadata)))
    elif suffix in (".pth", ".pt", ".bin"):
        write_checkpoint(path, weights if record is None else {"state_dict": weights, RECORD: record})
    elif suffix == ".pkl":
        if any(value.dtype is torch.bfloat16 for value in weights.values()):
            raise ValueError(
                f"{path} cannot hold bfloat16, which NumPy has not: use float32, float16 or another ending."
            )
        arrays = {name: value.numpy() for name, value in weights.items()}
        content = {"model": arrays, "__author__": "natzoo", "matching_heuristics": True}
        write_atomically(path, lambda file: pickle.dump(content, file))
    else:
        raise ValueError(
            f"{path} ends in {suffix!r}, which is no form of weights: .safetensors, .pth, .pt, .bin, .pkl."
        )


def sync(path: Path) -> None:
    """Makes a file's content, or a rename in a folder, durable on file systems that can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
