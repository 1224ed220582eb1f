"""Damaged copies of valid input, and the one outcome that a reader may have on them.

A test damages a valid file a few thousand times and passes each copy to the reader:

    outcomes = check_reader(read, damaged_bytes(valid, 2000), names="_info.json")

Every call must succeed, or raise ValueError or FileNotFoundError with one line that names the file, within 10 seconds
of CPU time and 1 GB.
"""

from __future__ import annotations

import contextlib
import copy
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Replacements for values of JSON, YAML and pickled data.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**15, -(10**30), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "0", "x", "\x1b[31m", "\udcff", "a\nb", "a\0b", "..", "/", "/dev/zero", "pipe:touch OWNED", "é" * 2000),
    *([], [[]], [None], [0] * 2000, {}, {"": {}}, {"x": None}, [[[[[[[[[[]]]]]]]]]]),
)
# Replacements for parts of a file.
ODD_BYTES = (
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\t", b" ", b"-", b"0", b"9" * 5000, b"1e999", b"NaN"),
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b"'",
        b":",
        b",",
        b"#",
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!int ",
        b"!!python/object:os.x ",
    ),
    *(b"[" * 100_000, b'{"a":' * 20_000, b"../", b"/dev/zero", b"pipe:touch OWNED", b"\x1b[31m", b"\xed\xb0\x80"),
)


class _TooSlow(BaseException):
    """Not an Exception, because readers turn those into messages."""


def damaged_bytes(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield copies of a file with one to four changes each: bytes replaced, inserted, removed, repeated or swapped."""
    draw = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 4))):
            start = draw.randrange(len(damaged) + 1)
            end = min(len(damaged), start + draw.choice((0, 1, 2, 4, 16, 200)))
            kind = draw.randrange(5)
            if kind == 0:
                damaged[start:end] = bytes(draw.randrange(256) for _ in range(end - start))
            elif kind == 1:
                damaged[start:end] = draw.choice(ODD_BYTES)
            elif kind == 2:
                damaged[start:end] = damaged[start:end] * draw.choice((0, 2, 50))
            elif kind == 3:
                damaged[start:end] = reversed(damaged[start:end])
            else:
                del damaged[draw.choice((start, end)) :]
        yield bytes(damaged)


def damaged_values(value: T, count: int, seed: int = 0, odd: Iterable[Any] = ODD_VALUES) -> Iterator[T]:
    """Yield copies of plain data with one or two changes each: values replaced, removed, repeated or renamed."""
    draw, odd = random.Random(seed), tuple(odd)
    for _ in range(count):
        holder = [copy.deepcopy(value)]
        for _ in range(draw.choice((1, 1, 2))):
            container, key = draw.choice(list(_places(holder)))
            kind = draw.randrange(6) if container is not holder else 0
            if kind <= 2:
                container[key] = copy.deepcopy(draw.choice(odd))
            elif kind == 3:
                del container[key]
            elif kind == 4:
                container[key] = [container[key]] * draw.choice((1, 2, 3))
            elif isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            else:
                container[draw.choice(("", "x", 0, f"{key} "))] = container.pop(key)
        yield holder[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in plain data with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def check_reader(
    read: Callable[[T], object],
    damaged: Iterable[T],
    names: str | Path,
    errors: tuple[type[Exception], ...] = (ValueError, FileNotFoundError),
    seconds: float = 10,
) -> Counter[str]:
    """Call a reader on damaged input, and check that it succeeds or raises one line that names the file.

    Args:
        read: the reader.
        damaged: its inputs.
        names: text in each message.
        errors: the errors that it may raise.
        seconds: limit of CPU time per call.

    Returns:
        the number of calls that "succeeded" and that were "refused".
    """
    outcomes: Counter[str] = Counter()
    for number, value in enumerate(damaged):
        message = None
        try:
            with limited(seconds):
                read(value)
        except errors as error:
            message = str(error)
        except BaseException as error:
            raise AssertionError(f"case {number} raised {type(error).__name__}: {error!s:.300}") from error
        outcomes["succeeded" if message is None else "refused"] += 1
        if message is not None:
            assert str(names) in message, f"case {number}: {message!r:.500}"
            assert "\n" not in message and len(message) < 1500, f"case {number}: {message!r:.500}"
    return outcomes


@contextlib.contextmanager
def limited(seconds: float = 10, memory: int = 2**30) -> Iterator[None]:
    """Limit the CPU time and the additional memory of a block in the main thread: `_TooSlow` or MemoryError ends it.

    A block that waits, as for a FIFO, ends after 120 seconds: the process may be suspended at times.
    """

    def stop(number: int, frame: object) -> None:
        raise _TooSlow(f"took more than {seconds} s of CPU time, or waited for 120 s")

    status = Path("/proc/self/status").read_text()
    used = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData")))
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, 120)}
    previous = {number: signal.signal(number, stop) for number, _ in timers.values()}
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, limits[1]))
    for timer, (_, limit) in timers.items():
        signal.setitimer(timer, limit)
    start = time.process_time()
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert time.process_time() - start < seconds, f"took more than {seconds} s"  # code in C may delay the signal
