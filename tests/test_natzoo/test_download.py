"""Downloads from a server of this machine that misbehaves in every way that servers do."""

from __future__ import annotations

import hashlib
import http.server
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable

import pytest

from natzoo.checkpoints import download
from natzoo.checkpoints.download import DownloadError, fetch

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves CONTENT at every address; `behaviours` are taken one a request, then requests are served well."""

    def __init__(self):
        self.behaviours: list[Callable[[http.server.BaseHTTPRequestHandler], None]] = []
        self.ranges: list[str | None] = []
        self.etag = '"one"'
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.ranges.append(self.headers.get("Range"))
                behaviour = server.behaviours.pop(0) if server.behaviours else serve
                behaviour(self)

            def log_message(self, *arguments):
                pass

        Handler.server_state = server
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def url(self, name: str = "weights.pth") -> str:
        return f"http://127.0.0.1:{self.http.server_port}/{name}"


def serve(handler, content=CONTENT, sent=None, accepts_ranges=True):
    """A good answer; of `content` only the first `sent` bytes of what is asked for."""
    state = handler.server_state
    wanted = handler.headers.get("Range")
    offset = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
    if not accepts_ranges or handler.headers.get("If-Range") != state.etag:
        offset = 0
    handler.send_response(206 if offset else 200)
    if offset:
        handler.send_header("Content-Range", f"bytes {offset}-{len(content) - 1}/{len(content)}")
    handler.send_header("ETag", state.etag)
    handler.send_header("Content-Length", str(len(content) - offset))
    handler.end_headers()
    handler.wfile.write(content[offset:][:sent])
    handler.wfile.flush()
    handler.close_connection = True


def truncated(handler):
    serve(handler, sent=100_000)


def status(code: int):
    return lambda handler: handler.send_error(code)


def stalled(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    handler.wfile.write(CONTENT[:1000])
    handler.wfile.flush()
    time.sleep(1.5)


def web_page(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html; charset=utf-8")
    handler.end_headers()
    handler.wfile.write(b"<html>sign in</html>")


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_S", 0.01)
    monkeypatch.setattr(download, "STALL_S", 0.5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "weights.pth"


def leftovers(path):
    return sorted(p.name for p in path.parent.iterdir() if p.suffix in (".partial", ".json"))


def test_a_good_download(server, path):
    assert fetch([server.url()], path, SHA256) == path
    assert path.read_bytes() == CONTENT
    assert leftovers(path) == []
    assert path.parent.stat().st_mode & 0o077 == 0
    fetch([server.url()], path, SHA256)
    assert len(server.ranges) == 1  # not again


@pytest.mark.parametrize(
    "behaviours",
    [[truncated], [truncated, truncated], [status(503)], [status(429), truncated], [stalled]],
    ids=["truncated", "truncated twice", "503", "429 and truncated", "stalled"],
)
def test_what_passes_is_waited_for(server, path, behaviours):
    server.behaviours = list(behaviours)
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


def test_a_broken_transfer_goes_on_where_it_was(server, path):
    server.behaviours = [truncated, truncated]
    fetch([server.url()], path, SHA256)
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_a_transfer_broken_for_good_is_continued_by_the_next_call(server, path):
    server.behaviours = [truncated] + [status(500)] * 3
    with pytest.raises(DownloadError, match="500"):
        fetch([server.url()], path, SHA256)
    assert not path.exists()
    fetch([server.url()], path, SHA256)
    assert server.ranges[-1] == "bytes=100000-"
    assert path.read_bytes() == CONTENT


def test_a_server_without_ranges(server, path):
    server.behaviours = [truncated, lambda handler: serve(handler, accepts_ranges=False)]
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


def test_the_file_changes_between_two_tries(server, path):
    def other_half(handler):
        server.etag = '"two"'
        serve(handler)

    server.behaviours = [lambda handler: serve(handler, content=bytes(300_000), sent=100_000), other_half]
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT
    server.behaviours = [truncated, status(416)]
    path.unlink()
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


def test_a_flipped_bit_is_refused(server, path):
    broken = bytearray(CONTENT)
    broken[1234] ^= 1
    server.behaviours = [lambda handler: serve(handler, content=bytes(broken))] * 2
    with pytest.raises(DownloadError, match="instead of " + SHA256):
        fetch([server.url()], path, SHA256)
    assert not path.exists()
    assert leftovers(path) == []


def test_the_next_source_serves_and_all_failures_are_told(server, path):
    server.behaviours = [status(404)]
    fetch([server.url("missing"), server.url("mirror")], path, SHA256)
    assert path.read_bytes() == CONTENT
    path.unlink()
    server.behaviours = [status(404), web_page]
    with pytest.raises(DownloadError) as caught:
        fetch([server.url("missing"), server.url("login")], path, SHA256)
    text = str(caught.value)
    for part in ("404", "a web page instead", server.url("missing"), server.url("login"), "by hand", str(path)):
        assert part in text


def test_nobody_there(path):
    with pytest.raises(DownloadError, match=r"refused.*by hand"):
        fetch(["http://127.0.0.1:9/weights.pth"], path)
    assert not path.exists()


def test_a_hash_that_nobody_published_is_recorded_and_checked(server, path):
    fetch([server.url()], path)
    assert (path.parent / "weights.pth.sha256").read_text() == SHA256 + "\n"
    fetch([server.url()], path)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="damaged"):
        fetch([server.url()], path)


def _fetch_in_child(url: str, path: str) -> None:
    fetch([url], download.Path(path), SHA256)


def test_many_processes_download_once(server, path):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_fetch_in_child, args=(server.url(), str(path))) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 8
    assert len(server.ranges) == 1
    assert path.read_bytes() == CONTENT


def test_a_killed_process_leaves_no_lock(server, path):
    def slow(handler):
        time.sleep(20)

    server.behaviours = [slow]
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_fetch_in_child, args=(server.url(), str(path)))
    child.start()
    while not server.ranges:
        time.sleep(0.01)
    os.kill(child.pid, 9)
    child.join()
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT
