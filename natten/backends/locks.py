"""Locks on open files, for one process at a time. The system releases them when the process ends, however it ends.

`try_lock` raises BlockingIOError if another process holds the lock, and other OSErrors if the file system has no locks.
`lock` waits for the lock, `unlock` releases it.
"""

from __future__ import annotations

import os
import sys
import time

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 20  # beyond the content, which others could not read if it were locked

    def try_lock(descriptor: int) -> None:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error

    def unlock(descriptor: int) -> None:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

    def lock(descriptor: int) -> None:
        while True:
            try:
                return try_lock(descriptor)
            except BlockingIOError:
                time.sleep(0.05)

else:
    import fcntl

    def try_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    def lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def write_holder(descriptor: int, text: str) -> None:
    """Replace the content of a locked file, which tells others who holds the lock."""
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text.encode())


def read_holder(descriptor: int) -> str:
    """Return what the holder of a lock wrote into the file, at most 1000 bytes."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 1000).decode(errors="replace")
