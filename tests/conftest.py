"""Options and fixtures of all tests."""

import signal
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# The helper modules in this folder, and the scripts of the project.
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "tools")]


def pytest_configure():
    # A shell lets its background jobs ignore Ctrl-C, and tests send it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header():
    import openmmlab_extra

    return openmmlab_extra.description()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture
def server(monkeypatch):
    """Start a `file_server.Server`; downloads from it retry without delay."""
    from file_server import Server

    from natzoo.checkpoints import download

    monkeypatch.setattr(download, "PAUSE_S", 0.01)
    server = Server()
    yield server
    server.http.shutdown()
