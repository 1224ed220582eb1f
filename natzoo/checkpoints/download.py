"""Fetching weight files over the net: whole or not at all, once for all processes, and never another file unseen.

A transfer goes into `NAME.partial` beside its target. What is there after a failure is continued, if the server still
has the same file; a hash is checked before the file gets its name. Where nobody published a hash, that of the first
download is recorded in `NAME.sha256` and holds from then on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

from natzoo.checkpoints.write import write_atomically

TRIES = 4  # of each address
PAUSE_S = 1.0  # before the second try; each further one waits twice as long
STALL_S = 30.0  # without a byte
_PIECE = 1 << 20
_OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ELOOP}
_AGENT = "natzoo"


class DownloadError(OSError):
    """No address gave the file; the text says why, and how to get it by hand."""


def cache_folder() -> Path:
    """Where downloads are kept: NATZOO_CACHE_DIR, else natzoo in XDG_CACHE_HOME or ~/.cache.

    Raises:
        FileNotFoundError: if none of these is set, and this user has no home.
    """
    chosen = os.environ.get("NATZOO_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return Path(chosen or base / "natzoo").expanduser().absolute()
    except RuntimeError as error:
        raise FileNotFoundError("there is no home folder for downloads: set NATZOO_CACHE_DIR to a folder.") from error


def fetch(urls: Sequence[str], path: Path, sha256: str | None = None, size: int = 0) -> Path:
    """The file of that path, downloaded first if it is not there.

    Args:
        urls: where it can be got, tried in order.
        path: where it is to be; folders that are missing are made for this user alone.
        sha256: its hash in hexadecimal digits; None to trust the first download.
        size: about how many bytes it has, for the message; 0 if nobody knows.

    Raises:
        DownloadError: if no address gives it.
        OSError: if the folder cannot be written; one that has the file needs not be.
        ValueError: if the file there, or what came, has another hash.
    """
    if not path.exists():
        with _only_one(path):
            if not path.exists():
                _download(urls, path, sha256, size)
                return path
    check(path, sha256)
    return path


def check(path: Path, sha256: str | None = None) -> str:
    """The hash of a downloaded file.

    Raises:
        ValueError: if it is neither the one given nor, without one, the one recorded when the file came.
    """
    expected = sha256 or recorded_sha256(path)
    found = sha256_of(path)
    if expected and found != expected:
        raise ValueError(f"{path} has changed or is damaged: its sha256 is {found}, not {expected}; delete it.")
    return found


def recorded_sha256(path: Path) -> str | None:
    """The hash that a file had when it was downloaded; None if it came in another way."""
    record = _beside(path, ".sha256")
    return record.read_text().strip() if record.exists() else None


def sha256_of(path: Path) -> str:
    """Hash of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# One file
# ---------------------------------------------------------------------------------------------------------------------


def _download(urls: Sequence[str], path: Path, sha256: str | None, size: int) -> None:
    failures = []
    for url in urls:
        try:
            partial = _transfer_with_patience(url, path)
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{url}: {_reason(error)}")
            continue
        found = sha256_of(partial)
        if sha256 and found != sha256:
            _forget(path)
            failures.append(f"{url}: it gave a file with sha256 {found} instead of {sha256}")
            continue
        write_atomically(_beside(path, ".sha256"), lambda file, found=found: file.write(f"{found}\n".encode()))
        os.replace(partial, path)
        _forget(path)
        return
    about = f" (about {size / 1e6:.0f} MB)" if size else ""
    raise DownloadError(
        f"{path.name} could not be downloaded ({'; '.join(failures)}). To get it by hand, download {urls[0]}{about} "
        f"and put it at {path}."
    )


def _transfer_with_patience(url: str, path: Path) -> Path:
    """Tries again after what may pass: a broken or stalled connection, a server that is busy."""
    for attempt in range(TRIES):
        try:
            return _transfer(url, path)
        except (OSError, HTTPException) as error:
            if not _may_pass(error) or attempt == TRIES - 1:
                raise
            tqdm.write(f"{path.name}: {_reason(error)}; trying again", file=sys.stderr)
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError("the last try returns or raises")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    if isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE:
        return False
    reason = getattr(error, "reason", None)
    return not (isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME)  # no net, or no such host


def _transfer(url: str, path: Path) -> Path:
    """Path of the complete partial file.

    Raises:
        OSError, HTTPException: if the connection fails or ends early; what came is kept.
        ValueError: if what the server gives is a web page.
    """
    partial, origin = _beside(path, ".partial"), _beside(path, ".partial.json")
    offset, validator = _state(url, partial, origin)
    headers = {"User-Agent": _AGENT}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
    try:
        opener = urllib.request.build_opener(_StaysEncrypted)
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=STALL_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file has become shorter: begin anew at the next try
            _forget(path)
            raise ConnectionError("the server has another file than before") from error
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError("the server gives a web page instead of the file")
        if response.status == 206 and not _continues(response, offset):
            _forget(path)
            raise ConnectionError("the server sends another part of the file than the one asked for")
        if response.status != 206:
            offset = 0
        total = _total(response, offset)
        with open(partial, "ab" if offset else "wb", opener=_not_through_links) as file:
            if not offset:  # only now: what an older version left is gone
                _note(response, url, origin)
            received = offset + _copy(response, file, offset, total, path.name)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and received != total:
        raise ConnectionError(f"the connection ended after {received} of {total} bytes")
    return partial


class _StaysEncrypted(urllib.request.HTTPRedirectHandler):
    """Follows no redirection from https to http: where nobody published a hash, the connection alone vouches."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.type == "https" and not newurl.startswith("https:"):
            raise ValueError(f"the server leads from https to {newurl}, where anybody could change the file")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _copy(response: HTTPResponse, file, offset: int, total: int | None, title: str) -> int:
    received = 0
    with tqdm(desc=title, initial=offset, total=total, unit="B", unit_scale=True, disable=None) as bar:
        while piece := response.read(_PIECE):
            file.write(piece)
            received += len(piece)
            bar.update(len(piece))
    return received


def _continues(response: HTTPResponse, offset: int) -> bool:
    """Whether a part of a file is the rest from `offset` on."""
    content_range = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return content_range is not None and int(content_range[1]) == offset


def _total(response: HTTPResponse, offset: int) -> int | None:
    length = response.headers.get("Content-Length")
    return None if length is None else offset + int(length)


# What is known of a partial file: its address, and by what the server tells it from other versions.


def _state(url: str, partial: Path, origin: Path) -> tuple[int, str]:
    """How much of a file is there already, and the server's validator for it; 0 if it cannot be continued."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(origin.read_text())
        if known["url"] == url and known["validator"]:
            return partial.stat().st_size, known["validator"]
    return 0, ""


def _note(response: HTTPResponse, url: str, origin: Path) -> None:
    etag = response.headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    known = json.dumps({"url": url, "validator": validator})
    write_atomically(origin, lambda file: file.write(known.encode()))


def _forget(path: Path) -> None:
    for suffix in (".partial", ".partial.json"):
        _beside(path, suffix).unlink(missing_ok=True)


def _not_through_links(path: str | os.PathLike, flags: int) -> int:
    """Opens a file for `open`, but none that a link there leads to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, TimeoutError):
        return f"nothing came for {STALL_S:.0f} s"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Lets one process at a time have a file, in a folder that is made if it is missing; the others wait."""
    try:
        for missing in reversed([folder for folder in path.parents if not folder.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        handle = _not_through_links(_beside(path, ".lock"), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        text = f"{path.parent} cannot be written ({error.strerror}): set NATZOO_CACHE_DIR to a folder that can."
        raise OSError(error.errno, text) from error
    with os.fdopen(handle) as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except ModuleNotFoundError:  # Windows: the rename keeps files whole, but two processes may both download
            pass
        yield
