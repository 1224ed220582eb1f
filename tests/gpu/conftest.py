"""Tests of the CUDA backend on a real GPU.

    python -m pytest tests/gpu -m gpu

They need torch, timm and pytest, and take less than 10 minutes. Most tests also run as a rehearsal on the CPU, with
tiny problems and the cpu backend, so that mistakes in the tests themselves show on any machine.
"""

from __future__ import annotations

import faulthandler
import signal
import threading
import warnings

import pytest
import torch
from gpu_checks.problems import CUDA, REHEARSAL, Machine

LIMIT_S = 35  # of a test without the marker `limit`
GRACE_S = 30


@pytest.fixture(params=[pytest.param(CUDA, marks=pytest.mark.gpu, id="gpu"), pytest.param(REHEARSAL, id="rehearsal")])
def machine(request) -> Machine:
    return request.param


@pytest.fixture(autouse=True)
def time_limit(request):
    """Fail a test on a GPU that exceeds its limit, and end the process if the test hangs in a CUDA call."""
    if request.node.get_closest_marker("gpu") is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    marker = request.node.get_closest_marker("limit")
    seconds = marker.args[0] if marker else LIMIT_S

    def stop(number, frame):
        raise TimeoutError(f"the test exceeded {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "natten falls back")  # the reference must not replace a kernel unnoticed
            yield
        torch.cuda.synchronize()
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
