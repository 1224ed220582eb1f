"""SIGTERM and SIGUSR1, how schedulers of clusters say that a run's time is over, and Ctrl-C: it saves and leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Under torchrun, one Ctrl-C may reach a process from the terminal and from torchrun: only a later one is another.
_TWICE_S = 2.0


class Interrupted(Exception):
    """Raised where a run leaves because of a signal."""


class SignalHandler:
    """While entered, notes the signals instead of dying of them; from `handle_ctrl_c` on Ctrl-C too, but not a second.

    Attributes:
        received: the first signal, or None.
        name: what to call it.
        status: the exit status of a process that leaves because of it, or because another process was told to.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str:
        return self.received.name if self.received else "a signal to another process"

    @property
    def status(self) -> int:
        return 128 + (self.received or signal.SIGTERM)

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():  # Python has signals handled there alone
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def handle_ctrl_c(self) -> None:
        """Makes Ctrl-C a signal to save and leave, where there is now something to save; a second one ends at once."""
        is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as in a shell's background
        if self._previous and not is_ignored and signal.SIGINT not in self._previous:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nleaving after this step; Ctrl-C again leaves at once\n")  # print is not for handlers
            return
        is_another = now - self._since > (_TWICE_S if "RANK" in os.environ else 0)
        if self.received == signal.SIGINT and number != signal.SIGUSR1 and is_another:  # torchrun's second is SIGTERM
            raise KeyboardInterrupt


def ignore_signals_in_worker(_: int = 0) -> None:
    """Makes a loading process deaf to the signals, unless its own parent sends SIGTERM to end it.

    They reach every process of a job. A loader that died of one would take the run with it in the middle of a step; one
    that ignored them all could not be ended.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
