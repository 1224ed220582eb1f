"""One writer per run: the lock of a run's folder."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from natten.backends import locks
from natzoo.command_line import create_folder

_LOCK_NAME = ".lock"
_PATIENCE_S = 5.0  # a killed run on a GPU takes seconds to end
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

_held: set[int] = set()  # descriptors of the locks of this process


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create the folder of a run and keep all other runs out of it until the end of the block.

    The lock ends with this process, however it ends. A stopped process keeps it. Temporary files of checkpoints that a
    killed process left in the folder are deleted. On file systems without locks, a warning is printed.

    Args:
        folder: the folder; removed at the end if it is still empty.

    Raises:
        ValueError: if another run uses the folder; names its host and process.
        OSError: if the folder is not writable.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _acquire(folder)
    _held.add(descriptor)
    try:
        for path in folder.glob(".*.pth*.tmp"):
            path.unlink(missing_ok=True)
        yield
    finally:
        if descriptor in _held:  # false in a forked process
            _held.remove(descriptor)
            if sys.platform == "win32":  # it cannot delete open files
                os.close(descriptor)
                with contextlib.suppress(OSError):  # another run has it
                    (folder / _LOCK_NAME).unlink(missing_ok=True)
            else:
                (folder / _LOCK_NAME).unlink(missing_ok=True)
                os.close(descriptor)
            with contextlib.suppress(OSError):  # not empty
                for path in created:
                    path.rmdir()


def _acquire(folder: Path) -> int:
    """Return the descriptor of the locked file of a folder."""
    path, end = folder / _LOCK_NAME, time.monotonic() + _PATIENCE_S
    while True:
        create_folder(folder, "--work-dir")
        try:
            descriptor = os.open(path, _FLAGS, 0o666)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            locks.try_lock(descriptor)
        except BlockingIOError as error:
            holder = locks.read_holder(descriptor).strip()
            os.close(descriptor)
            if time.monotonic() >= end:
                raise ValueError(
                    f"{folder} is used by another run ({ascii(holder)[1:-1] or 'unknown process'}); wait until it "
                    "ends, stop it, or choose another --work-dir."
                ) from error
            time.sleep(0.1)
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            print(f"Warning: {folder} is on a file system without locks; start only one run in it.", file=sys.stderr)
        if _is_same_file(descriptor, path):
            locks.write_holder(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n")
            return descriptor
        os.close(descriptor)  # the former holder has removed this file


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _release_inherited() -> None:
    """Close the locks in a forked process: a data-loading worker must not keep them longer than its run."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_inherited)
