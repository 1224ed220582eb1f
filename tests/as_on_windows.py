"""Run a program in a Python that lacks what Windows' Python lacks, with PyTorch and other packages left as they are.

    python tests/as_on_windows.py -c CODE [ARGUMENTS...]
    python tests/as_on_windows.py MODULE [ARGUMENTS...]

sys.platform says win32. The POSIX functions of os and signal and the POSIX modules are missing, and msvcrt locks bytes.
Paths, encodings, libraries and processes stay those of this system.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import runpy
import shutil
import signal
import sys
import types
from collections.abc import Callable
from unittest import mock

_OS = (
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "chown", "fchmod", "fchown", "fork", "forkpty", "geteuid",
    "getegid", "getuid", "getgid", "getpgid", "killpg", "mkfifo", "pread", "pwrite", "preadv", "pwritev",
    "register_at_fork", "sched_getaffinity", "sched_setaffinity", "setsid", "statvfs", "sysconf", "uname", "wait3",
    "wait4", "nice",
)  # fmt: skip
_SIGNAL = (
    "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGKILL", "SIGQUIT", "SIGPIPE", "SIGSTOP", "SIGCONT",
    "SIGTSTP", "alarm", "pthread_kill", "pthread_sigmask", "setitimer", "sigpending", "sigwait", "sigwaitinfo",
    "sigtimedwait", "SIG_BLOCK",
)  # fmt: skip
_MODULES = ("fcntl", "grp", "posix", "pwd", "resource", "termios", "tty", "pty")
# What commands need. They choose the parts for their system when they are imported.
_PACKAGES = (
    "torch",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "timm",
    "torchvision",
    "sklearn.metrics",
    "tqdm",
)
_PACKAGES += ("matplotlib.pyplot",)


def _fake_msvcrt() -> types.ModuleType:
    """Return msvcrt with a `locking` that locks bytes at the current position, with fcntl."""
    module = types.ModuleType("msvcrt")
    module.LK_UNLCK, module.LK_LOCK, module.LK_NBLCK = 0, 1, 2

    def locking(descriptor: int, mode: int, size: int) -> None:
        offset = os.lseek(descriptor, 0, os.SEEK_CUR)
        kind = fcntl.LOCK_UN if mode == module.LK_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(descriptor, kind, size, offset, os.SEEK_SET)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    module.locking = locking
    return module


def _find_as_here(*arguments: object, which: Callable = shutil.which, **named: object) -> str | None:
    """Find a program as on this system."""
    with mock.patch.object(sys, "platform", "linux"):
        return which(*arguments, **named)


def pretend(*packages: str) -> None:
    """Change this process, for good, after importing what is not to notice."""
    for name in packages:
        importlib.import_module(name)
    shutil.which = _find_as_here
    sys.modules["msvcrt"] = _fake_msvcrt()
    for name in _MODULES:
        sys.modules[name] = None
    for module, names in ((os, _OS), (signal, _SIGNAL)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    os.O_BINARY = 0
    sys.platform = "win32"


if __name__ == "__main__":
    pretend(*_PACKAGES)
    program, sys.argv = sys.argv[1], sys.argv[1:]
    if program == "-c":
        code = sys.argv.pop(1)
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
