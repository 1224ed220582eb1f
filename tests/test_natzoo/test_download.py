"""Downloads from a local server that misbehaves."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pwd
import shutil
import ssl
import subprocess
import time

import pytest
from file_server import CONTENT, SHA256, Server, serve, stalled, status, truncated, wait_for_disconnect, web_page

from natzoo.checkpoints import download
from natzoo.checkpoints.download import DownloadError, cache_folder, fetch


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "weights.pth"


def leftovers(path):
    return sorted(p.name for p in path.parent.iterdir() if p.suffix in (".partial", ".json"))


def test_download(server, path):
    assert fetch([server.url()], path, SHA256) == path
    assert path.read_bytes() == CONTENT
    assert leftovers(path) == []
    assert path.parent.stat().st_mode & 0o077 == 0
    fetch([server.url()], path, SHA256)
    assert len(server.ranges) == 1  # the second call does not download


@pytest.mark.parametrize(
    "behaviors",
    [[truncated], [truncated, truncated], [status(503)], [status(429), truncated]],
    ids=["truncated", "truncated twice", "503", "429 and truncated"],
)
def test_temporary_failures_are_retried(server, path, behaviors):
    server.behaviors = list(behaviors)
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


def test_stalled_transfer_is_retried(server, path, monkeypatch):
    monkeypatch.setattr(download, "STALL_S", 0.2)
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    monkeypatch.setattr(download, "TRIES", 10_000)  # on a busy machine correct responses may take longer than STALL_S
    server.behaviors = [stalled]
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT
    assert len(server.ranges) > 1


def test_truncated_transfer_is_resumed(server, path):
    server.behaviors = [truncated, truncated]
    fetch([server.url()], path, SHA256)
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_failed_transfer_is_resumed_by_the_next_call(server, path):
    server.behaviors = [truncated] + [status(500)] * 3
    with pytest.raises(DownloadError, match="500"):
        fetch([server.url()], path, SHA256)
    assert not path.exists()
    fetch([server.url()], path, SHA256)
    assert server.ranges[-1] == "bytes=100000-"
    assert path.read_bytes() == CONTENT


def test_server_without_range_support(server, path):
    server.behaviors = [truncated, lambda handler: serve(handler, accepts_ranges=False)]
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


def test_file_changes_between_two_tries(server, path):
    def other_half(handler):
        server.etag = '"two"'
        serve(handler)

    server.behaviors = [lambda handler: serve(handler, content=bytes(300_000), sent=100_000), other_half]
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT
    server.behaviors = [truncated, status(416)]
    path.unlink()
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


def test_server_sends_another_range(server, path):
    def another_part(handler):
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 5-9/{len(CONTENT)}")
        handler.send_header("Content-Length", "5")
        handler.end_headers()
        handler.wfile.write(CONTENT[5:10])

    server.behaviors = [another_part, truncated, another_part]
    fetch([server.url()], path)
    assert path.read_bytes() == CONTENT


def test_killed_when_a_new_version_starts(server, path, monkeypatch):
    server.behaviors = [lambda handler: serve(handler, content=bytes(300_000), sent=100_000)] + [status(500)] * 3
    with pytest.raises(DownloadError):
        fetch([server.url()], path)
    server.etag = '"two"'
    real = download.write_atomically

    def write_and_die(target, write):
        real(target, write)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "write_atomically", write_and_die)
        fetch([server.url()], path)
    fetch([server.url()], path)
    assert path.read_bytes() == CONTENT


def test_flipped_bit_is_detected(server, path):
    broken = bytearray(CONTENT)
    broken[1234] ^= 1
    server.behaviors = [lambda handler: serve(handler, content=bytes(broken))] * 2
    with pytest.raises(DownloadError, match=SHA256):
        fetch([server.url()], path, SHA256)
    assert not path.exists()
    assert leftovers(path) == []


def test_next_source_is_tried_and_all_failures_are_reported(server, path):
    server.behaviors = [status(404)]
    fetch([server.url("missing"), server.url("mirror")], path, SHA256)
    assert path.read_bytes() == CONTENT
    path.unlink()
    server.behaviors = [status(404), web_page]
    with pytest.raises(DownloadError) as caught:
        fetch([server.url("missing"), server.url("login")], path, SHA256)
    text = str(caught.value)
    for part in ("404", "web page", server.url("missing"), server.url("login"), str(path)):
        assert part in text


def moved(url):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", url)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return redirect


def test_redirect(server, path):
    server.behaviors = [moved(server.url("elsewhere"))]
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_redirect_from_https_to_http_is_refused(server, path, tmp_path, monkeypatch):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    options = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *options.split(), *files], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    safe = Server(context)
    try:
        safe.behaviors = [moved(server.url())]
        with pytest.raises(DownloadError, match=r"https.*http://"):
            fetch([safe.url()], path)
        assert server.ranges == []
        server.behaviors = [moved(safe.url())]  # from http to https is fine
        fetch([server.url()], path)
        assert path.read_bytes() == CONTENT
    finally:
        safe.http.shutdown()


def test_server_is_down(server, path):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(DownloadError) as caught:
        fetch([server.url()], path, size=79_936_696)
    for part in (server.url(), "80 MB", str(path)):  # how to download it manually
        assert part in str(caught.value)
    assert not path.exists()


def test_unpublished_hash_is_recorded_and_checked(server, path):
    fetch([server.url()], path)
    assert (path.parent / "weights.pth.sha256").read_text() == SHA256 + "\n"
    fetch([server.url()], path)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"weights\.pth"):
        fetch([server.url()], path)


def _fetch_in_child(url: str, path: str) -> None:
    fetch([url], download.Path(path), SHA256)


def test_many_processes_download_once(server, path):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_fetch_in_child, args=(server.url(), str(path))) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0] * 8
    assert len(server.ranges) == 1
    assert path.read_bytes() == CONTENT


def test_killed_process_leaves_no_lock(server, path):
    server.behaviors = [wait_for_disconnect]
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_fetch_in_child, args=(server.url(), str(path)))
    child.start()
    deadline = time.monotonic() + 300
    while not server.ranges:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, 9)
    child.join()
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


# ----- the folder -----


def test_existing_file_needs_no_writable_folder(server, path):
    """The folder may belong to another user."""
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert fetch([server.url()], path, SHA256) == path
    assert os.listdir(path.parent) == ["weights.pth"]
    assert server.ranges == []


def test_folder_that_cannot_be_created(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"cache.weights .*NATZOO_CACHE_DIR"):
        fetch([server.url()], tmp_path / "cache" / "weights" / "a.pth")
    assert server.ranges == []


@pytest.mark.parametrize("suffix", [".lock", ".partial", ".partial.json", ".sha256"])
def test_symbolic_links_in_the_folder_are_not_followed(server, path, tmp_path, suffix):
    precious = tmp_path / "precious"
    precious.write_text("keep this")
    path.parent.mkdir()
    path.with_name(path.name + suffix).symlink_to(precious)
    with contextlib.suppress(OSError):
        fetch([server.url()], path)
    assert precious.read_text() == "keep this"


def test_full_disk_is_not_retried(server, path, monkeypatch):
    """/dev/full behaves like a full disk."""
    real = os.open

    def full(name, flags, *mode, **more):
        return real("/dev/full", os.O_WRONLY) if str(name).endswith(".partial") else real(name, flags, *mode, **more)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        fetch([server.url()], path)
    assert len(server.ranges) == 1


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("NATZOO_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "natzoo"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/other")
    assert cache_folder() == tmp_path / "other" / "natzoo"
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_user_without_home_folder(monkeypatch):
    """Common in containers."""

    def unknown(number):
        raise KeyError(number)

    for name in ("NATZOO_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(FileNotFoundError, match="NATZOO_CACHE_DIR"):
        cache_folder()
