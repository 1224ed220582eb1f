"""Downloads from a server of this machine that misbehaves in every way that servers do."""

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
from file_server import CONTENT, SHA256, Server, serve, stalled, status, truncated, web_page

from natzoo.checkpoints import download
from natzoo.checkpoints.download import DownloadError, cache_folder, fetch


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


def test_a_server_that_sends_another_part(server, path):
    def another_part(handler):
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 5-9/{len(CONTENT)}")
        handler.send_header("Content-Length", "5")
        handler.end_headers()
        handler.wfile.write(CONTENT[5:10])

    server.behaviours = [another_part, truncated, another_part]
    fetch([server.url()], path)
    assert path.read_bytes() == CONTENT


def test_killed_just_when_another_version_begins(server, path, monkeypatch):
    server.behaviours = [lambda handler: serve(handler, content=bytes(300_000), sent=100_000)] + [status(500)] * 3
    with pytest.raises(DownloadError):
        fetch([server.url()], path)
    server.etag = '"two"'
    real = download.write_atomically

    def note_and_die(target, write):
        real(target, write)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "write_atomically", note_and_die)
        fetch([server.url()], path)
    fetch([server.url()], path)
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


def moved(address):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", address)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return redirect


def test_a_redirection(server, path):
    server.behaviours = [moved(server.url("elsewhere"))]
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_redirection_that_ends_encryption(server, path, tmp_path, monkeypatch):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    options = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *options.split(), *files], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    safe = Server(context)
    try:
        safe.behaviours = [moved(server.url())]
        with pytest.raises(DownloadError, match="the server leads from https to http://"):
            fetch([safe.url()], path)
        assert server.ranges == []
        server.behaviours = [moved(safe.url())]  # the other way
        fetch([server.url()], path)
        assert path.read_bytes() == CONTENT
    finally:
        safe.http.shutdown()


def test_nobody_there(server, path):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(
        DownloadError, match=r"refused.*by hand, download \S+/weights.pth \(about 80 MB\) and put it at "
    ):
        fetch([server.url()], path, size=79_936_696)
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


# ----- the folder -----


def test_a_file_that_is_there_asks_nothing_of_its_folder(server, path):
    """Which may be of somebody else, who lets others read it."""
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert fetch([server.url()], path, SHA256) == path
    assert os.listdir(path.parent) == ["weights.pth"]
    assert server.ranges == []


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"cache.weights cannot be written \(.*\): set NATZOO_CACHE_DIR to a folder"):
        fetch([server.url()], tmp_path / "cache" / "weights" / "a.pth")
    assert server.ranges == []


@pytest.mark.parametrize("suffix", [".lock", ".partial", ".partial.json", ".sha256"])
def test_links_in_the_folder_lead_nowhere(server, path, tmp_path, suffix):
    precious = tmp_path / "precious"
    precious.write_text("keep this")
    path.parent.mkdir()
    path.with_name(path.name + suffix).symlink_to(precious)
    with contextlib.suppress(OSError):
        fetch([server.url()], path)
    assert precious.read_text() == "keep this"


def test_a_full_disk_is_told_at_once(server, path, monkeypatch):
    """/dev/full refuses every byte, as a full disk does."""
    real = os.open

    def full(name, flags, *mode, **more):
        return real("/dev/full", os.O_WRONLY) if str(name).endswith(".partial") else real(name, flags, *mode, **more)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        fetch([server.url()], path)
    assert len(server.ranges) == 1


def test_where_the_folder_is(monkeypatch, tmp_path):
    for name in ("NATZOO_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "natzoo"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/other")
    assert cache_folder() == tmp_path / "other" / "natzoo"
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_a_user_without_a_home(monkeypatch):
    """As containers have."""

    def unknown(number):
        raise KeyError(number)

    for name in ("NATZOO_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(FileNotFoundError, match="no home folder for downloads: set NATZOO_CACHE_DIR"):
        cache_folder()
