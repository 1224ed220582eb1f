"""Stop a run between two steps on SIGTERM, SIGUSR1 (sent by cluster schedulers) or Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import TracebackType
from typing import Any

_WARNINGS = tuple(filter(None, (getattr(signal, "SIGUSR1", None),)))  # Windows has none
SIGNALS = (signal.SIGTERM, *_WARNINGS)
# Under torchrun, one Ctrl-C may arrive twice, from the terminal and from torchrun. Later signals are new ones.
_REPEAT_S = 2.0


class Interrupted(Exception):
    """Raised when a run stops because of a signal."""


class SignalHandler:
    """Context manager that records signals instead of letting them end the process.

    Ctrl-C is recorded only after `handle_ctrl_c`, and only once: the second one raises KeyboardInterrupt.

    Attributes:
        received: the first signal, or None.
        name: its name, for messages.
        exit_status: exit status of a process that stops because of it, or because another process received one.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str:
        return self.received.name if self.received else "a signal to another process"

    @property
    def exit_status(self) -> int:
        return 128 + (self.received or signal.SIGTERM)

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def handle_ctrl_c(self) -> None:
        """Record Ctrl-C as well, from now on; call it when there is something to save."""
        is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # in a background job of a shell
        if self._previous and not is_ignored and signal.SIGINT not in self._previous:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._record)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping after this step; press Ctrl-C again to stop now\n")  # print is not reentrant
            return
        is_new = now - self._received_at > (_REPEAT_S if "RANK" in os.environ else 0)
        # torchrun sends SIGTERM for the second Ctrl-C.
        if self.received == signal.SIGINT and number not in _WARNINGS and is_new:
            raise KeyboardInterrupt


def ignore_signals_in_worker(_: int = 0) -> None:
    """Make a data-loading worker ignore the signals, except a SIGTERM from its own parent.

    A scheduler signals every process of a job. A worker that died of it would end the run in the middle of a step; a
    worker that ignored every SIGTERM could not be stopped.
    """
    for number in (*_WARNINGS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
