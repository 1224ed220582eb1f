"""Time the entries of a group in turns, round after round, together with the limits of the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.entry import Entry, LeftOut, Subject
from natten.profiler import Limits, Timer, schedule


class Timing(NamedTuple):
    """The measured times of an entry.

    Attributes:
        subject: what was timed.
        timer: its samples.
        limits: the limits of the machine in the same rounds.
    """

    subject: Subject
    timer: Timer
    limits: Limits

    @property
    def percent_of_matmul(self) -> float:
        """Rate of the minimal arithmetic as a percentage of the matrix product's."""
        return 1e5 * self.subject.work.gflop / self.timer.percentile(50) / self.limits.matmul_gflops

    @property
    def percent_of_limit(self) -> float:
        return self.limits.percent(self.subject.work, self.timer.percentile(50))


def time_group(
    entries: Iterable[Entry],
    make: Callable[[Entry], Subject],
    rounds: int,
    patience_s: float,
    title: str,
    leave_out: Callable[[Entry, str], None],
) -> dict[Entry, Timing]:
    """Time entries against each other.

    Args:
        entries: what to time.
        make: returns the code of an entry.
        rounds: number of samples of each.
        patience_s: a call that takes longer, in seconds, is sampled in fewer rounds.
        title: title of the progress bar.
        leave_out: called with each entry that cannot be timed, and the reason.
    """
    subjects = _make_all(entries, make, leave_out)
    if not subjects:
        return {}
    timers = {entry: _timer(entry, subject) for entry, subject in subjects.items()}
    limits: dict[tuple, Limits] = {}
    for entry in subjects:
        if _limits_key(entry) not in limits:
            limits[_limits_key(entry)] = Limits(entry.dtype, entry.device, entry.setting.threads, entry.precision)
    everyone = [*timers.values(), *(timer for limit in limits.values() for timer in limit.timers)]
    everyone += [limit.small_timer for limit in limits.values() if limit.small_timer is not None]
    for timer in tqdm(schedule(everyone, rounds, patience_s), desc=title, unit="sample", disable=None):
        timer.sample()
    return {entry: Timing(subjects[entry], timer, limits[_limits_key(entry)]) for entry, timer in timers.items()}


def _timer(entry: Entry, subject: Subject) -> Timer:
    context = partial(subject.context, entry)
    return Timer(subject.call, entry.device, subject.others, entry.setting.threads, context, subject.use_graph)


def _make_all(
    entries: Iterable[Entry], make: Callable[[Entry], Subject], leave_out: Callable[[Entry, str], None]
) -> dict[Entry, Subject]:
    """Return the subjects that run and whose results are right."""
    subjects = {}
    for entry in entries:
        torch.set_num_threads(entry.setting.threads)
        try:
            subject = make(entry)
            subject.check(subject.run(entry))
        except (LeftOut, ValueError, RuntimeError, MemoryError) as error:
            leave_out(entry, " ".join(str(error).split())[:300] or type(error).__name__)
        else:
            subjects[entry] = subject
    return subjects


def _limits_key(entry: Entry) -> tuple:
    """Return what the limits of the machine depend on."""
    dtype = Limits.product_dtype(entry.dtype, entry.device)
    return entry.setting.threads, entry.device, dtype, entry.setting.dtype == "tf32"
