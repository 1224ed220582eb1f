"""Makes the helpers in this folder and the scripts importable from every test, and lends a server of files."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]


def pytest_report_header():
    import openmmlab_extra

    return openmmlab_extra.description()


@pytest.fixture
def server(monkeypatch):
    """A `file_server.Server`, to which downloads come without patience."""
    from file_server import Server

    from natzoo.checkpoints import download

    monkeypatch.setattr(download, "PAUSE_S", 0.01)
    server = Server()
    yield server
    server.http.shutdown()
