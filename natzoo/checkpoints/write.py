"""Writing files so that a crash at any byte leaves either the old file or the new one, whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file under a temporary name beside it, forces it to the disk, and renames it.

    Args:
        path: where the file will be; an older one there is replaced only by a complete new one.
        write: writes the content to the open binary file that it is given.

    Raises:
        OSError: naming the file, if the folder is missing, full or not writable; an older file is then as it was.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        text = f"{path} could not be written; what was there before is unharmed ({error.strerror})."
        raise OSError(error.errno, text) from error


def write_checkpoint(path: str | os.PathLike, checkpoint: dict[str, Any]) -> None:
    """Writes a dict of tensors, numbers, strings and containers of them with torch.save, atomically."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch reports a full disk so, as the error it met behind it
            raise OSError(None, str(error).splitlines()[0]) from error

    write_atomically(path, write)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
