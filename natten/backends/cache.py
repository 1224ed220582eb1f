"""Where compiled kernels are kept: folders that only this user may write, and files that are whole or not there.

The folders, in order: NATTEN_CACHE_DIR; natten in XDG_CACHE_HOME, or in ~/.cache. Loading a library runs it, so a
folder that someone else owns or may write is refused.

A file ends with the SHA-256 of what stands before it, which loaders ignore: loading a truncated library does not fail,
it kills the process.
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

_PATIENCE_S = 120  # a stopped process may hold the lock for ever
_DIGEST_BYTES = hashlib.sha256().digest_size

log = logging.getLogger("natten")


def folders() -> Iterator[Path]:
    """The folders that may keep compiled kernels, the preferred one first; they need not exist."""
    chosen = os.environ.get("NATTEN_CACHE_DIR")
    if chosen:
        yield Path(os.path.expanduser(chosen)).absolute()
    else:
        log.debug("NATTEN_CACHE_DIR is not set")
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if base.is_absolute():  # else there is no home, or XDG_CACHE_HOME is void as its specification says
        yield base / "natten"


def check(folder: Path) -> None:
    """Makes sure that a folder, if it exists, belongs to this user alone and may hold code.

    Raises:
        OSError: saying what is wrong with it.
    """
    try:
        status = folder.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        raise OSError("it is not a folder")
    if status.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("others may write into it; chmod go-w mends that")
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError("its file system is mounted noexec")


def make(folder: Path) -> None:
    """Makes a folder and those above it that are missing, each for this user alone (0700).

    Raises:
        OSError: if it cannot be made, or is not fit for code.
    """
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    check(folder)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lets one process compile at a time. It only saves work: where locks fail or take too long, goes on without.

    Raises:
        OSError: if the folder cannot be written.
    """
    import fcntl

    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + _PATIENCE_S
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
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # for a child forked meanwhile too, which keeps the file open
        os.close(descriptor)


@contextmanager
def scratch() -> Iterator[Path]:
    """A private temporary folder. A forked child leaves it alone."""
    owner, folder = os.getpid(), tempfile.mkdtemp(prefix="natten-")
    try:
        yield Path(folder)
    finally:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)


def store(file: Path, path: Path) -> None:
    """Puts a copy of a file at a path of a cache folder, at once as a whole.

    Raises:
        OSError: if the folder is full or cannot be written; the path is then as before.
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


def is_whole(path: Path) -> bool:
    """Whether a file is there as `store` wrote it."""
    return read(path) is not None


def read(path: Path) -> bytes | None:
    """What `store` was given; None if the file is not there, or not as it wrote it."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    content, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None
