"""Download files reliably: complete or not at all, once for all processes, with a hash check.

A transfer is written to `NAME.partial` next to its target. After a failure, the next attempt resumes it if the file on
the server is unchanged. The hash is checked before the file gets its final name. If no hash is published, the hash of
the first download is recorded in `NAME.sha256` and required from then on.
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

TRIES = 4  # per URL
PAUSE_S = 1.0  # before the second try; doubles before each further try
STALL_S = 30.0  # time without data after which a connection counts as stalled
_CHUNK = 1 << 20
_LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ELOOP}
_AGENT = "natzoo"


class DownloadError(OSError):
    """No URL provided the file; the message states the reasons and how to download it manually."""


def cache_folder() -> Path:
    """Return the folder for downloads: NATZOO_CACHE_DIR, else natzoo in XDG_CACHE_HOME or ~/.cache.

    Raises:
        FileNotFoundError: if neither variable is set and the user has no home folder.
    """
    chosen = os.environ.get("NATZOO_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return Path(chosen or base / "natzoo").expanduser().absolute()
    except RuntimeError as error:
        raise FileNotFoundError(
            "NATZOO_CACHE_DIR is not set and there is no home folder; set it to a folder for downloads."
        ) from error


def fetch(urls: Sequence[str], path: Path, sha256: str | None = None, size: int = 0) -> Path:
    """Return a file, after downloading it if it does not exist.

    Args:
        urls: sources, tried in order.
        path: the target. Missing folders are created, accessible to this user only. A folder that already contains the
            file may be read-only.
        sha256: expected hash, hexadecimal; None to trust the first download.
        size: approximate size in bytes, for messages; 0 if unknown.

    Raises:
        DownloadError: if no URL provides the file.
        OSError: if the folder is not writable.
        ValueError: if an existing file has another hash.
    """
    if not path.exists():
        with _locked(path):
            if not path.exists():
                _download(urls, path, sha256, size)
                return path
    check(path, sha256)
    return path


def check(path: Path, sha256: str | None = None) -> str:
    """Check the hash of a downloaded file and return it.

    Args:
        path: the file.
        sha256: expected hash, hexadecimal; None for the one recorded by the download, if any.

    Raises:
        ValueError: if the file has another hash.
    """
    expected = sha256 or recorded_sha256(path)
    found = sha256_of(path)
    if expected and found != expected:
        raise ValueError(f"{path} has changed or is damaged: its sha256 is {found} instead of {expected}; delete it.")
    return found


def recorded_sha256(path: Path) -> str | None:
    """Return the hash recorded when a file was downloaded; None if there is none."""
    record = _sibling(path, ".sha256")
    return record.read_text().strip() if record.exists() else None


def sha256_of(path: Path) -> str:
    """Return the hash of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Transfers
# ---------------------------------------------------------------------------------------------------------------------


def _download(urls: Sequence[str], path: Path, sha256: str | None, size: int) -> None:
    failures = []
    for url in urls:
        try:
            partial = _transfer_with_retries(url, path)
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{url}: {_reason(error)}")
            continue
        found = sha256_of(partial)
        if sha256 and found != sha256:
            _forget(path)
            failures.append(f"{url}: the file has sha256 {found} instead of {sha256}")
            continue
        _write_text(_sibling(path, ".sha256"), f"{found}\n")
        os.replace(partial, path)
        _forget(path)
        return
    about = f" (about {size / 1e6:.0f} MB)" if size else ""
    raise DownloadError(
        f"{path.name} could not be downloaded ({'; '.join(failures)}). To download it manually, save "
        f"{urls[0]}{about} as {path}."
    )


def _transfer_with_retries(url: str, path: Path) -> Path:
    """Transfer a file; retry after temporary failures: a broken or stalled connection, a busy server."""
    for attempt in range(TRIES):
        try:
            return _transfer(url, path)
        except (OSError, HTTPException) as error:
            if not _is_temporary(error) or attempt == TRIES - 1:
                raise
            tqdm.write(f"{path.name}: {_reason(error)}; retrying", file=sys.stderr)
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError("the last try returns or raises")


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
        return False
    reason = getattr(error, "reason", None)
    return not (isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME)  # no network or no such host


def _transfer(url: str, path: Path) -> Path:
    """Transfer a file, resuming an earlier attempt if possible, and return the path of the complete partial file.

    Raises:
        OSError, HTTPException: if the connection fails or ends early; the received data is kept.
        ValueError: if the server sends a web page.
    """
    partial, origin = _sibling(path, ".partial"), _sibling(path, ".partial.json")
    offset, validator = _resumable(url, partial, origin)
    headers = {"User-Agent": _AGENT}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
    try:
        opener = urllib.request.build_opener(_KeepHTTPS)
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=STALL_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file is now shorter: start over on the next try
            _forget(path)
            raise ConnectionError("the file on the server has changed") from error
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError("the server sent a web page instead of the file")
        if response.status == 206 and not _continues(response, offset):
            _forget(path)
            raise ConnectionError("the server sent another part of the file than requested")
        if response.status != 206:
            offset = 0
        total = _total(response, offset)
        with open(partial, "ab" if offset else "wb", opener=_open_without_links) as file:
            if not offset:  # after the file is emptied, so that it never describes data of an older version
                _write_origin(response, url, origin)
            received = offset + _copy(response, file, offset, total, path.name)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and received != total:
        raise ConnectionError(f"the connection closed after {received} of {total} bytes")
    return partial


class _KeepHTTPS(urllib.request.HTTPRedirectHandler):
    """Refuse redirects from https to http: without a published hash, only the connection protects the file."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.type == "https" and not newurl.startswith("https:"):
            raise ValueError(f"the server redirects from https to {newurl}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _copy(response: HTTPResponse, file, offset: int, total: int | None, title: str) -> int:
    received = 0
    with tqdm(desc=title, initial=offset, total=total, unit="B", unit_scale=True, disable=None) as bar:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
    return received


def _continues(response: HTTPResponse, offset: int) -> bool:
    """Return whether a partial response starts at `offset`."""
    content_range = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return content_range is not None and int(content_range[1]) == offset


def _total(response: HTTPResponse, offset: int) -> int | None:
    length = response.headers.get("Content-Length")
    return None if length is None else offset + int(length)


# The origin of a partial file: its URL, and the validator (ETag or date) that identifies this version on the server.


def _resumable(url: str, partial: Path, origin: Path) -> tuple[int, str]:
    """Return the size of a partial file in bytes and its validator; 0 and "" if the transfer cannot be resumed."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(origin.read_text())
        if known["url"] == url and known["validator"]:
            return partial.stat().st_size, known["validator"]
    return 0, ""


def _write_origin(response: HTTPResponse, url: str, origin: Path) -> None:
    etag = response.headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    _write_text(origin, json.dumps({"url": url, "validator": validator}))


def _forget(path: Path) -> None:
    """Remove the partial file and its origin."""
    for suffix in (".partial", ".partial.json"):
        _sibling(path, suffix).unlink(missing_ok=True)


def _open_without_links(path: str | os.PathLike, flags: int) -> int:
    """Open a file for `open`, but do not follow symbolic links."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server returned {error.code} {error.reason}"
    if isinstance(error, TimeoutError):
        return f"no data for {STALL_S:.0f} s"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Create the folder of a file and hold a lock for the file; other processes wait."""
    try:
        for missing in reversed([folder for folder in path.parents if not folder.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        handle = _open_without_links(_sibling(path, ".lock"), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        text = f"{path.parent} is not writable ({error.strerror}); set NATZOO_CACHE_DIR to another folder."
        raise OSError(error.errno, text) from error
    with os.fdopen(handle) as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except ModuleNotFoundError:  # Windows: two processes may download the same file, but the rename keeps it intact
            pass
        yield
