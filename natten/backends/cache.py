"""The cache of compiled kernels: private folders, and files that are either complete or absent.

The folders are, in order: NATTEN_CACHE_DIR, then `natten` in XDG_CACHE_HOME (default ~/.cache; Windows: LOCALAPPDATA).
Loading a library executes its code, so a folder that another user owns or can write to is rejected. So is a folder that
contains a link in place of a file, or a file that another user owns or can write to: it was open to others before.
Files are opened once; what is checked through the descriptor is what is loaded.

Windows has no such modes. There only links are rejected, and a folder is as private as the one that contains it.

Each file ends with the SHA-256 of its content, which loaders ignore. Without this check, loading a truncated library
would crash the process instead of raising an error.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from natten.backends import locks

_PATIENCE_S = 60.0  # time of waiting for a lock before a message
_GRACE_S = 1.0  # time for the new holder of a lock to write its name
_DIGEST_BYTES = hashlib.sha256().digest_size

log = logging.getLogger("natten")


def folders() -> Iterator[Path]:
    """Yield the cache folders, the preferred one first. They need not exist."""
    chosen = os.environ.get("NATTEN_CACHE_DIR")
    if chosen:
        yield Path(os.path.expanduser(chosen)).absolute()
    else:
        log.debug("NATTEN_CACHE_DIR is not set")
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if base.is_absolute():  # false without a home folder; the XDG specification ignores relative paths
        yield base / "natten"


def check(folder: Path) -> None:
    """Check that a folder, if it exists, belongs to this user alone and can hold executable code.

    Raises:
        OSError: with the reason, if it does not.
    """
    with suppress(FileNotFoundError), _open_folder(folder):
        pass


@contextmanager
def _open_folder(folder: Path) -> Iterator[int | None]:
    """Open a folder and check it through the descriptor. Windows cannot open folders, so there it is None.

    Raises:
        FileNotFoundError: if it does not exist.
        OSError: as in `check`.
    """
    if sys.platform == "win32":
        if not stat.S_ISDIR(_status_without_links(folder).st_mode):
            raise OSError("not a folder")
        yield None
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except NotADirectoryError:
        raise OSError("not a folder") from None
    try:
        problem = _foreign(os.fstat(descriptor))
        if problem:
            raise OSError(f"{problem}; delete it, or set NATTEN_CACHE_DIR to another folder")
        if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise OSError("on a file system mounted noexec")
        yield descriptor
    finally:
        os.close(descriptor)


def _status_without_links(path: Path) -> os.stat_result:
    status = os.lstat(path)
    if getattr(status, "st_reparse_tag", 0):  # of symbolic links, junctions and other substitutes
        raise OSError(f"{path.name} is a link; delete it")
    return status


def _foreign(status: os.stat_result) -> str | None:
    """Return how another user controls a file or folder, or None."""
    if sys.platform == "win32":
        return None
    if status.st_uid != os.geteuid():
        return "owned by another user"
    return "writable by other users" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def open_checked(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file in a cache folder, and check both through their descriptors.

    Returns:
        The descriptor of a regular file that belongs to this user alone.

    Raises:
        FileNotFoundError: if the file or its folder does not exist.
        OSError: if it cannot be opened, or if another user controls the file or its folder.
    """
    with _open_folder(path.parent) as folder:
        if sys.platform == "win32":
            with suppress(FileNotFoundError):
                _status_without_links(path)
            return os.open(path, flags | os.O_BINARY, 0o600)
        try:
            # O_NONBLOCK: opening a named pipe would wait for a writer.
            descriptor = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=folder)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OSError(f"{path.name} in it is a link; delete the folder") from error
    status = os.fstat(descriptor)
    problem = _foreign(status) if stat.S_ISREG(status.st_mode) else "not a regular file"
    if problem:
        os.close(descriptor)
        raise OSError(f"{path.name} in it is {problem}; delete the folder")
    return descriptor


def make(folder: Path) -> None:
    """Create a folder and its missing parents, accessible to this user alone (mode 0700).

    Raises:
        OSError: if it cannot be created, or is rejected by `check`.
    """
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    check(folder)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Let one process at a time compile into a folder; others wait as long as it lives.

    The lock only saves work. Where locks are not supported, the caller continues without it.

    Raises:
        OSError: if the folder is not writable, or another user controls the lock.
    """
    path = folder / ".lock"
    descriptor = open_checked(path, os.O_RDWR | os.O_CREAT)
    try:
        last_seen = time.monotonic()
        reminder = last_seen + _PATIENCE_S
        while True:
            try:
                locks.try_lock(descriptor)
                locks.write_holder(descriptor, _identity(os.getpid()))
                break
            except BlockingIOError:
                holder = locks.read_holder(descriptor)
                if not _has_died(holder):
                    last_seen = time.monotonic()
                elif time.monotonic() > last_seen + _GRACE_S:  # a child that it forked still has the file open
                    break
                if time.monotonic() > reminder:
                    log.warning("waiting for process %s, which holds %s", holder, path)
                    reminder = math.inf
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        with suppress(OSError):
            locks.unlock(descriptor)  # explicitly, because a forked child may still hold the file open
        os.close(descriptor)


def _identity(process: int) -> str:
    return f"{process} on {socket.gethostname()}"


def _has_died(holder: str) -> bool:
    """Return whether the process of an `_identity` was one of this machine and has ended."""
    if sys.platform == "win32":  # it releases the locks of a process that ends
        return False
    number = holder.partition(" ")[0]
    if not number.isdigit() or holder != _identity(int(number)):
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:  # a process of another user
        return False
    return False


@contextmanager
def scratch() -> Iterator[Path]:
    """Create a private temporary folder and delete it at the end, but not in a forked child."""
    owner, folder = os.getpid(), tempfile.mkdtemp(prefix="natten-")
    try:
        yield Path(folder)
    finally:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)


def store(file: Path, path: Path) -> None:
    """Copy a file to a path in a cache folder atomically.

    Raises:
        OSError: if the folder is full or not writable. The path is then unchanged.
    """
    content = file.read_bytes()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as copy:
            copy.write(content)
            copy.write(hashlib.sha256(content).digest())
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path) -> bytes | None:
    """Return the content that was given to `store`, or None if the file is missing or damaged.

    Raises:
        OSError: as in `open_checked`.
    """
    try:
        descriptor = open_checked(path)
    except FileNotFoundError:
        return None
    try:
        return content(descriptor)
    finally:
        os.close(descriptor)


def content(descriptor: int) -> bytes | None:
    """Return the content that was given to `store` from an open file, or None if it is damaged."""
    with open(descriptor, "rb", closefd=False) as file:
        data = file.read()
    data, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    return data if hashlib.sha256(data).digest() == digest else None
