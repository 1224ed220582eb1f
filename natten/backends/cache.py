"""The cache of compiled kernels: private folders, and files that are either complete or absent.

The folders are, in order: NATTEN_CACHE_DIR, then `natten` in XDG_CACHE_HOME (default ~/.cache). Loading a library
executes its code, so a folder that another user owns or can write to is rejected.

Each file ends with the SHA-256 of its content, which loaders ignore. Without this check, loading a truncated library
would crash the process instead of raising an error.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK_TIMEOUT_S = 120  # a suspended process may hold the lock forever
_DIGEST_BYTES = hashlib.sha256().digest_size

log = logging.getLogger("natten")


def folders() -> Iterator[Path]:
    """Yield the cache folders, the preferred one first. They need not exist."""
    chosen = os.environ.get("NATTEN_CACHE_DIR")
    if chosen:
        yield Path(os.path.expanduser(chosen)).absolute()
    else:
        log.debug("NATTEN_CACHE_DIR is not set")
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if base.is_absolute():  # false without a home folder; the XDG specification ignores relative paths
        yield base / "natten"


def check(folder: Path) -> None:
    """Check that a folder, if it exists, belongs to this user alone and can hold executable code.

    Raises:
        OSError: with the reason, if it does not.
    """
    try:
        status = folder.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        raise OSError("not a folder")
    if status.st_uid != os.geteuid():
        raise OSError("owned by another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("writable by other users; run chmod go-w")
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError("on a file system mounted noexec")


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
    """Let one process at a time compile into a folder.

    The lock only saves work. Where locks are not supported, or after a timeout, the caller continues without it.

    Raises:
        OSError: if the folder is not writable.
    """
    import fcntl

    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + _LOCK_TIMEOUT_S
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # explicitly, because a forked child may still hold the file open
        os.close(descriptor)


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


def is_complete(path: Path) -> bool:
    """Return whether a file exists exactly as `store` wrote it."""
    return read(path) is not None


def read(path: Path) -> bytes | None:
    """Return the content that was given to `store`, or None if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    content, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None
