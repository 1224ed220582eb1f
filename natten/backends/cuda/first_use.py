"""Check each kernel family on each GPU before its first use: run a small problem and compare it to the reference.

The verdict is stored next to the kernels, under a hash of the sources, the versions of NVRTC and the driver, and the
name of the GPU. Each machine therefore checks a family once. After a failed check, the reference replaces the family,
in this process and in later ones. NATTEN_SELF_CHECK=0 switches the check off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time

import torch

from natten.backends import cache, families
from natten.backends.cuda import driver, nvrtc
from natten.backends.families import Family, Verdict
from natten.backends.kernels import KernelBackend, Unsupported

log = logging.getLogger("natten")

_UNKNOWN = Verdict(None)
_verdicts: dict[tuple[torch.device, Family], Verdict] = {}
_running: set[tuple[torch.device, Family]] = set()
_lock = threading.RLock()


def refusal(family: Family, device: torch.device, kernels: KernelBackend) -> str | None:
    """Return why a family must not be used on a device, or None if it may be. Check it if that has not been done.

    Raises:
        driver.ContextLost: if the check fails in a way after which this process cannot use the GPU any more.
    """
    verdict = _verdicts.get((device, family)) or _find(family, device, kernels)
    return None if verdict.problem is None else _reason(family, device, verdict.problem)


def _find(family: Family, device: torch.device, kernels: KernelBackend) -> Verdict:
    if os.environ.get("NATTEN_SELF_CHECK") == "0":
        return _UNKNOWN
    with _lock:
        if (device, family) in _running:  # the check itself uses the family
            return _UNKNOWN
        verdict = _verdicts.get((device, family)) or _read(family, device)
        if verdict is None:
            return _UNKNOWN if driver.is_capturing() else check(family, device, kernels)
        _verdicts[device, family] = verdict
        return verdict


def reset() -> None:
    """Forget the verdicts of this process, but not the stored ones."""
    global _lock
    _lock = threading.RLock()
    _verdicts.clear()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=reset)  # a lock that was held in the parent


def check(family: Family, device: torch.device, kernels: KernelBackend) -> Verdict:
    """Check a family now, and store the verdict.

    Raises:
        driver.ContextLost: as in `refusal`; the verdict is stored before.
        torch.OutOfMemoryError: if the GPU has no memory left. There is no verdict then.
    """
    driver.synchronize(device)  # errors of earlier work are raised here: they say nothing about these kernels
    started = time.perf_counter()
    with _lock:
        _running.add((device, family))
        try:
            verdict = families.check(kernels, family, device, lambda: driver.synchronize(device))
            _write(family, device, verdict)
        except Unsupported as error:  # NVRTC may be incomplete: not stored, so that the next process tries again
            verdict = Verdict(str(error))
        finally:
            _running.discard((device, family))
        _verdicts[device, family] = verdict
    log.debug("self-check of %s on %s: %s, %.2f s", family, device, verdict, time.perf_counter() - started)
    if verdict.problem is not None:
        driver.require_context(device, _reason(family, device, verdict.problem))
    return verdict


def _reason(family: Family, device: torch.device, problem: str) -> str:
    name = driver.device_name(device)
    return (
        f"the CUDA kernels for {family} failed their self-check on {name} ({problem}); please report the output of "
        "`python -m natten.check`"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stored verdicts
# ---------------------------------------------------------------------------------------------------------------------


def _file_name(family: Family, device: torch.device) -> str:
    parts = (nvrtc.hash_of_sources().hex(), nvrtc.version(), driver.version(), driver.device_name(device), family)
    return f"natten_verdict-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"


def _read(family: Family, device: torch.device) -> Verdict | None:
    """Return the stored verdict, or None if there is none that can be read."""
    name = _file_name(family, device)
    for folder in cache.folders():
        try:
            cache.check(folder)
            data = cache.read(folder / name)
            return None if data is None else Verdict(**json.loads(data))
        except (OSError, ValueError, TypeError) as error:
            log.debug("%s cannot hold a verdict: %s", folder, error)
    return None


def _write(family: Family, device: torch.device, verdict: Verdict) -> None:
    name = _file_name(family, device)
    for folder in cache.folders():
        try:
            cache.make(folder)
            with cache.scratch() as scratch:
                (scratch / name).write_text(json.dumps(verdict._asdict()))
                cache.store(scratch / name, folder / name)
            return
        except OSError as error:
            log.debug("%s cannot hold a verdict: %s", folder, error)
