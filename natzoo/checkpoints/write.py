"""Writing files so that a crash at any byte leaves either the old file or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


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
    _sync_folder(path.parent)


def write_checkpoint(path: str | os.PathLike, checkpoint: dict[str, Any]) -> None:
    """Writes a dict of tensors, numbers, strings and containers of them with torch.save, atomically."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # how torch reports a full disk, in words of its own
            is_full = shutil.disk_usage(Path(path).parent).free < 2**20
            reason = os.strerror(errno.ENOSPC) if is_full else str(error).splitlines()[0]
            raise OSError(errno.ENOSPC if is_full else None, reason) from error

    write_atomically(path, write)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable, on file systems that can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
