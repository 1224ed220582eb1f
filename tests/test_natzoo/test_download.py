"""Downloads from a local server that misbehaves."""

from __future__ import annotations

import contextlib
import gzip
import multiprocessing
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import time

import pytest
from file_server import (
    CONTENT,
    SHA256,
    Server,
    answer,
    chunked,
    dripping,
    serve,
    stalled,
    status,
    truncated,
    wait_for_disconnect,
    web_page,
)

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


# ----- responses that are not the file -----

LENGTH = str(len(CONTENT))
ZIPPED = gzip.compress(CONTENT)
PAGE = "Sign in to continue.\nÄ\n".encode()
REFUSED = {
    "no content": (answer(b"", 204), "204"),
    "reset content": (answer(b"", 205, Content_Length="0"), "205"),
    "other information": (answer(CONTENT, 203, Content_Length=LENGTH), "203"),
    "gzip": (answer(ZIPPED, Content_Encoding="gzip", Content_Length=str(len(ZIPPED))), "gzip"),
    "no length": (answer(CONTENT), "length"),
    "no length, cut": (answer(CONTENT[:1000]), "length"),
    "invalid length": (answer(CONTENT, Content_Length="many"), "length"),
    "negative length": (answer(CONTENT, Content_Length="-5"), "length"),
    "text page": (answer(PAGE, Content_Type="text/plain", Content_Length=str(len(PAGE))), "text"),
    "JSON": (answer(b'{"error": 1}', Content_Type="application/json", Content_Length="12"), "text"),
    "page without type": (answer(PAGE, Content_Length=str(len(PAGE))), "text"),
    "page in chunks": (chunked(PAGE), "text"),
    "page in Latin-1": (answer(b"Gru\xdf an alle", Content_Length="12"), "text"),
    "nothing": (answer(b"", Content_Length="0"), "text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_responses_that_are_not_the_file(server, path, name):
    behavior, reason = REFUSED[name]
    server.behaviors = [behavior]
    with pytest.raises(DownloadError, match=reason):
        fetch([server.url()], path)
    assert len(server.ranges) == 1  # no retry
    assert not path.exists() and not path.with_name("weights.pth.sha256").exists()
    fetch([server.url()], path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "behavior",
    [answer(CONTENT), answer(CONTENT, Content_Type="text/plain", Content_Length=LENGTH), chunked(CONTENT)],
    ids=["no length", "text", "chunks"],
)
def test_unusual_responses_with_a_published_hash(server, path, behavior):
    server.behaviors = [behavior]
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


def test_chunks(server, path):
    server.behaviors = [chunked(CONTENT[:200_000], ends=False), chunked(CONTENT)]
    fetch([server.url()], path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("content_range", ["bytes 100000-199999/300000", "bytes 0-299999/300000", "nonsense", None])
def test_part_that_is_not_the_rest(server, path, content_range):
    headers = {} if content_range is None else {"Content_Range": content_range}
    server.behaviors = [truncated, answer(CONTENT[100_000:200_000], 206, Content_Length="100000", **headers)]
    fetch([server.url()], path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("is_announced", [True, False])
def test_file_that_is_too_large(server, path, monkeypatch, is_announced):
    """Four times the known size and 64 MB are allowed."""
    content = bytes(1 << 20)

    def large(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        name, value = ("Content-Length", str(500 << 20)) if is_announced else ("Transfer-Encoding", "chunked")
        handler.send_header(name, value)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(500):
                handler.wfile.write(content if is_announced else b"100000\r\n" + content + b"\r\n")

    server.behaviors = [large] * 2
    with pytest.raises(DownloadError, match="67 MB"):
        fetch([server.url()], path, SHA256, size=1000)
    assert len(server.ranges) == 1
    monkeypatch.setattr(download, "LIMIT_BYTES", 10 << 20)
    with pytest.raises(DownloadError, match="10 MB"):
        fetch([server.url()], path, SHA256)
    assert not path.exists()


def test_transfer_that_takes_too_long(server, path, monkeypatch):
    monkeypatch.setattr(download, "LIMIT_S", 0.3)
    server.behaviors = [dripping]
    with pytest.raises(DownloadError, match="more than 0 s"):
        fetch([server.url()], path, SHA256)
    monkeypatch.undo()
    fetch([server.url()], path, SHA256)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("number", [socket.EAI_NONAME, socket.EAI_AGAIN])
def test_unknown_host_is_not_retried(path, monkeypatch, number):
    calls = []

    def fail(*arguments, **named):
        calls.append(arguments)
        raise socket.gaierror(number, "no such host")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(DownloadError, match="no such host"):
        fetch(["http://nowhere.invalid/a.pth"], path)
    assert len(calls) == 1


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


@pytest.fixture
def start_fetch():
    """A function that starts a process that downloads; not forked from this one, whose threads may hold locks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["natzoo.checkpoints.download"])
    children = []

    def start(url, path):
        child = context.Process(target=fetch, args=([url], path, SHA256))
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()


def test_many_processes_download_once(server, path, start_fetch):
    children = [start_fetch(server.url(), path) for _ in range(8)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 8
    assert len(server.ranges) == 1
    assert path.read_bytes() == CONTENT


def test_killed_process_leaves_no_lock(server, path, start_fetch):
    server.behaviors = [wait_for_disconnect]
    child = start_fetch(server.url(), path)
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


@pytest.mark.parametrize("suffix", ["", ".partial", ".partial.json", ".sha256", ".lock"])
def test_named_pipes_in_the_folder(server, path, suffix):
    """Opening one would wait for ever."""
    path.parent.mkdir()
    os.mkfifo(path.with_name(path.name + suffix))
    with contextlib.suppress(DownloadError, ValueError):
        fetch([server.url()], path)
        assert path.read_bytes() == CONTENT
    with contextlib.suppress(DownloadError, ValueError):
        fetch([server.url()], path)
        assert path.read_bytes() == CONTENT


def planted(path, kind):
    """Put something other than an own, private file in the place of a download."""
    path.parent.mkdir(exist_ok=True)
    other = path.with_name("other")
    other.write_bytes(CONTENT)
    if kind == "link":
        path.symlink_to(other)
    elif kind == "dangling link":
        path.symlink_to("missing")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        other.rename(path)
    if kind == "writable":
        path.chmod(0o666)
    elif kind == "open folder":
        path.parent.chmod(0o777)
    elif kind == "foreign":
        os.chown(path, 65534, -1)
        path.chmod(0o644)


KINDS = ["link", "dangling link", "pipe", "folder", "writable", "open folder"]
KINDS += ["foreign"] if os.geteuid() == 0 else []  # only root can give files away


@pytest.mark.parametrize("sha256", [SHA256, None])
@pytest.mark.parametrize("kind", KINDS)
def test_planted_files_are_refused(server, path, kind, sha256):
    planted(path, kind)
    with pytest.raises((ValueError, IsADirectoryError), match=r"weights\.pth") as caught:
        fetch([server.url()], path, sha256)
    assert kind == "folder" or str(path.parent) in str(caught.value)
    assert server.ranges == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("folder", "open folder")])
def test_planted_hashes_are_refused(server, path, kind):
    planted(path.with_name("weights.pth.sha256"), kind)
    path.write_bytes(CONTENT)
    with pytest.raises(ValueError, match=r"weights\.pth\.sha256"):
        fetch([server.url()], path)


def test_files_of_a_shared_folder(server, path):
    """Of a group, or in a folder like /tmp where everybody may only change own files."""
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    for folder, file in ((0o775, 0o664), (0o1777, 0o644), (0o555, 0o444)):
        path.parent.chmod(folder)
        path.chmod(file)
        assert fetch([server.url()], path, SHA256) == path
    path.parent.chmod(0o755)


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
