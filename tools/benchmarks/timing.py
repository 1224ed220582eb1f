"""Timing on a noisy machine: who is to be compared runs in turns, round after round, and so do the machine's limits.

Each round also times a matrix product and a copy, so that a row can say how much of the machine it used at that time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.entry import Entry, LeftOut, Subject

SAMPLE_MS = 20.0  # shorter calls are repeated within a sample until it takes this long
LEAST_SAMPLES = 3
GEMM_SIDE = 2048  # rows and columns of the matrices whose product is the limit of arithmetic
COPY_BYTES = 2**28  # larger than any cache


class Timing(NamedTuple):
    """Milliseconds of one call, the machine's limits in the same rounds, and what the row has beside them.

    Attributes:
        p20, p50, p80: percentiles over the samples, in ms.
        count: number of samples.
        gemm_gflops: rate of a float32 matrix product with as many threads (on other devices: of the entry's dtype), in
            1e9 floating-point operations a second.
        copy_gb_s: bytes read and written in a copy, in 1e9 a second.
        subject: what was timed.
    """

    p20: float
    p50: float
    p80: float
    count: int
    gemm_gflops: float
    copy_gb_s: float
    subject: Subject

    @property
    def percent_of_gemm(self) -> float:
        return 100 * self.subject.gflop / (self.p50 / 1e3) / self.gemm_gflops

    @property
    def percent_of_floor(self) -> float:
        floor_s = max(self.subject.gflop / self.gemm_gflops, self.subject.gbytes / self.copy_gb_s)
        return 100 * floor_s / (self.p50 / 1e3)


def elapsed_ms(call: Callable[[], object], number: int, device: torch.device) -> float:
    """Milliseconds that `number` calls in a row take."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - started) * 1e3


class Contestant:
    """Something to time again and again.

    Args:
        subject: what to time.
        threads: threads of PyTorch while it runs.
        device: where it runs.
    """

    def __init__(self, subject: Subject, threads: int, device: torch.device):
        self.subject, self.threads, self.device = subject, threads, device
        self.samples_ms: list[float] = []
        self.turns = frozenset[int]()
        self.number = 1

    def warm_up(self) -> float:
        """Finds how many calls make a sample; returns the milliseconds of one call."""
        self._use_threads()
        while (total := self._elapsed_ms()) < SAMPLE_MS:
            self.number *= 2
        return total / self.number

    def plan(self, rounds: int, patience_s: float) -> None:
        """Decides in which rounds it takes part: all of them, or fewer if a call takes longer than `patience_s`."""
        call_s = self.warm_up() / 1e3
        count = rounds if call_s <= patience_s else max(LEAST_SAMPLES, round(rounds * patience_s / call_s))
        count = min(count, rounds)
        self.turns = frozenset(turn * rounds // count for turn in range(count))

    def sample(self) -> None:
        if self._use_threads():
            self.subject.run()  # new threads start here
        self.samples_ms.append(self._elapsed_ms() / self.number)

    def percentiles(self) -> tuple[float, float, float]:
        """20th, 50th and 80th percentile of a call, in ms."""
        samples = torch.tensor(self.samples_ms, dtype=torch.float64)
        return tuple(samples.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())

    def _elapsed_ms(self) -> float:
        with torch.set_grad_enabled(self.subject.needs_grad):
            return elapsed_ms(self.subject.call, self.number, self.device)

    def _use_threads(self) -> bool:
        if self.threads == torch.get_num_threads():
            return False
        torch.set_num_threads(self.threads)
        return True


def interleave(contestants: list[Contestant], rounds: int, patience_s: float, title: str) -> None:
    """Times all contestants in turns; the order moves on by one each round, so that nobody always follows the same."""
    for contestant in contestants:
        contestant.plan(rounds, patience_s)
    with tqdm(total=sum(len(c.turns) for c in contestants), desc=title, unit="sample", disable=None) as bar:
        for turn in range(rounds):
            shift = turn % len(contestants)
            for contestant in contestants[shift:] + contestants[:shift]:
                if turn in contestant.turns:
                    contestant.sample()
                    bar.update()


class Limits:
    """What the machine can do, timed like everyone else: a product of large matrices, a copy larger than any cache.

    Args:
        threads: threads of PyTorch.
        device: where they run.
        dtype: of the matrices.
    """

    def __init__(self, threads: int, device: torch.device, dtype: torch.dtype):
        a, b, out = (torch.randn(GEMM_SIDE, GEMM_SIDE, device=device).to(dtype) for _ in range(3))
        source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
        gemm = Subject(lambda: torch.mm(a, b, out=out), gflop=2e-9 * GEMM_SIDE**3, gbytes=0.0)
        copy = Subject(lambda: target.copy_(source), gflop=0.0, gbytes=2e-9 * COPY_BYTES)
        self.gemm, self.copy = Contestant(gemm, threads, device), Contestant(copy, threads, device)

    def rates(self) -> tuple[float, float]:
        """GFLOP and GB a second, at the median."""
        gemm_ms, copy_ms = self.gemm.percentiles()[1], self.copy.percentiles()[1]
        return self.gemm.subject.gflop / gemm_ms * 1e3, self.copy.subject.gbytes / copy_ms * 1e3


def time_group(
    entries: Iterable[Entry],
    make: Callable[[Entry], Subject],
    rounds: int,
    patience_s: float,
    title: str,
    leave_out: Callable[[Entry, str], None],
) -> dict[Entry, Timing]:
    """Times entries against each other.

    Args:
        entries: what to time.
        make: gives the code behind an entry.
        rounds: samples of each.
        patience_s: a call that takes more seconds than this is sampled in fewer rounds.
        title: for the progress bar.
        leave_out: told of each entry that cannot be timed, and why.
    """
    subjects = _make_all(entries, make, leave_out)
    if not subjects:
        return {}
    contestants = {entry: Contestant(s, entry.setting.threads, entry.device) for entry, s in subjects.items()}
    limits = {key: Limits(*key) for key in map(_limits_key, subjects)}
    everyone = [*contestants.values(), *(c for limit in limits.values() for c in (limit.gemm, limit.copy))]
    interleave(everyone, rounds, patience_s, title)
    return {
        entry: Timing(*c.percentiles(), len(c.samples_ms), *limits[_limits_key(entry)].rates(), c.subject)
        for entry, c in contestants.items()
    }


def _make_all(
    entries: Iterable[Entry], make: Callable[[Entry], Subject], leave_out: Callable[[Entry, str], None]
) -> dict[Entry, Subject]:
    """The subjects that run, and rightly."""
    subjects = {}
    for entry in entries:
        torch.set_num_threads(entry.setting.threads)
        try:
            subject = make(entry)
            subject.check(subject.run())
        except (LeftOut, ValueError, RuntimeError, MemoryError) as error:
            leave_out(entry, " ".join(str(error).split())[:300] or type(error).__name__)
        else:
            subjects[entry] = subject
    return subjects


def _limits_key(entry: Entry) -> tuple[int, torch.device, torch.dtype]:
    """What the machine's limits depend on."""
    return entry.setting.threads, entry.device, torch.float32 if entry.device.type == "cpu" else entry.dtype
