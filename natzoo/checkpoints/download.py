"""Download files reliably: complete or not at all, once for all processes, with a hash check.

A transfer is written to `NAME.partial` next to its target. After a failure, the next attempt resumes it if the file on
the server is unchanged. The hash is checked before the file gets its final name. If no hash is published, the hash of
the first download is recorded in `NAME.sha256` and required from then on.

A folder of downloads may be shared, but only with people whose files you trust: a file is refused if it is a link or
another kind of special file, or if anybody but its owner, the owner of the folder and root can have written it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from natten.backends import locks
from natzoo.checkpoints.write import write_atomically

TRIES = 4  # per URL
PAUSE_S = 1.0  # before the second try; doubles before each further try
STALL_S = 30.0  # time without data after which a connection counts as stalled
LIMIT_S = 4 * 3600.0  # time for all tries of one URL
LIMIT_BYTES = 1 << 34  # for files of unknown size
_CHUNK = 1 << 20
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO}
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
        size: approximate size in bytes; 0 if unknown. A download that is much larger is refused.

    Raises:
        DownloadError: if no URL provides the file.
        OSError: if the folder is not writable.
        ValueError: if an existing file has another hash, or is not trusted.
    """
    if not os.path.lexists(path):
        with _locked(path):
            if not os.path.lexists(path):
                _download(urls, path, sha256, size)
                return path
    check(path, sha256)
    return path


def check(path: Path, sha256: str | None = None) -> str:
    """Check the owner and the hash of a downloaded file, and return the hash.

    Args:
        path: the file.
        sha256: expected hash, hexadecimal; None for the one recorded by the download, if any.

    Raises:
        ValueError: if the file has another hash, or is not trusted.
    """
    expected = sha256 or recorded_sha256(path)
    found = sha256_of(path)
    if expected and found != expected:
        raise ValueError(f"{path} has changed or is damaged: its sha256 is {found} instead of {expected}; delete it.")
    return found


def recorded_sha256(path: Path) -> str | None:
    """Return the hash recorded when a file was downloaded; None if there is none.

    Raises:
        ValueError: if the record is not trusted.
    """
    record = _sibling(path, ".sha256")
    if not os.path.lexists(record):
        return None
    with _open_trusted(record) as file:
        return file.read(200).decode(errors="replace").strip()


def sha256_of(path: Path) -> str:
    """Return the hash of a file, hexadecimal.

    Raises:
        ValueError: if the file is not trusted.
    """
    with _open_trusted(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_trusted(path: Path) -> BufferedReader:
    """Open a file in a folder of downloads for reading, and check through its descriptor who can have written it.

    Raises:
        ValueError: if it is not a regular file, or a user other than this one, root and the owner of the folder can
            have written or replaced it.
    """
    remedy = f"delete {path.parent}, and set NATZOO_CACHE_DIR to a folder that only you can write"
    try:
        file = open(path, "rb", opener=_open_without_links)  # noqa: SIM115  returned
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path} is a link; {remedy}.") from error
    status, folder = os.fstat(file.fileno()), path.parent.stat()
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = "is not a regular file"
    elif os.name == "posix" and status.st_uid not in (os.geteuid(), 0, folder.st_uid):
        problem = "belongs to another user"
    elif os.name == "posix" and status.st_mode & stat.S_IWOTH:
        problem = "is writable by all users"
    elif os.name == "posix" and folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        problem = "is in a folder that is writable by all users"
    if problem:
        file.close()
        raise ValueError(f"{path} {problem}; {remedy}.")
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Transfers
# ---------------------------------------------------------------------------------------------------------------------


def _download(urls: Sequence[str], path: Path, sha256: str | None, size: int) -> None:
    failures = []
    for url in urls:
        try:
            partial = _transfer_with_retries(url, path, bool(sha256), size)
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{url}: {_reason(error)}")
            continue
        found = sha256_of(partial)
        if sha256 and found != sha256:
            _forget(path)
            failures.append(f"{url}: the file has sha256 {found} instead of {sha256}")
            continue
        if not sha256 and _is_text(partial):
            _forget(path)
            failures.append(f"{url}: the server sent text instead of the file")
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


def _transfer_with_retries(url: str, path: Path, has_hash: bool, size: int) -> Path:
    """Transfer a file; retry after temporary failures: a broken or stalled connection, a busy server."""
    end = time.monotonic() + LIMIT_S
    for attempt in range(TRIES):
        try:
            return _transfer(url, path, has_hash, size, end)
        except (OSError, HTTPException) as error:
            if not _is_temporary(error) or attempt == TRIES - 1:
                raise
            tqdm.write(f"{path.name}: {_reason(error)}; retrying", file=sys.stderr)
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError("the last try returns or raises")


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    reason = getattr(error, "reason", error)
    if isinstance(reason, socket.gaierror):  # no network, or no such host
        return False
    return not (isinstance(reason, OSError) and reason.errno in {errno.ENETUNREACH, *_DISK_ERRORS})


def _transfer(url: str, path: Path, has_hash: bool, size: int, end: float) -> Path:
    """Transfer a file, resuming an earlier attempt if possible, and return the path of the complete partial file.

    Args:
        url, path: source and target.
        has_hash: whether the caller compares the file with a published hash.
        size: approximate size in bytes, or 0.
        end: time of `time.monotonic` at which to stop.

    Raises:
        OSError, HTTPException: if the connection fails or ends early; the received data is kept.
        ValueError: if the server sends something other than the file, or too much, or takes too long.
    """
    partial, origin = _sibling(path, ".partial"), _sibling(path, ".partial.json")
    if os.path.lexists(partial) and not stat.S_ISREG(partial.lstat().st_mode):
        raise ValueError(f"{partial} is not a regular file; delete it")
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
        _check_response(response, has_hash)
        if response.status == 200:
            offset = 0
        total = _total(response, offset)
        if response.status == 206 and total is None:
            _forget(path)
            raise ConnectionError("the server sent another part of the file than requested")
        limit = 4 * size + (1 << 26) if size else LIMIT_BYTES
        with open(partial, "ab" if offset else "wb", opener=_open_without_links) as file:
            if not offset:  # after the file is emptied, so that it never describes data of an older version
                _write_origin(response, url, origin)
            received = offset + _copy(response, file, offset, total, path.name, limit, end)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and received != total:
        raise ConnectionError(f"the connection closed after {received} of {total} bytes")
    return partial


def _check_response(response: HTTPResponse, has_hash: bool) -> None:
    """Raise ValueError unless a response contains the bytes of a file, and a cut transfer will be noticed."""
    if response.status not in (200, 206):
        raise ValueError(f"the server returned {response.status} {response.reason} instead of the file")
    if response.headers.get_content_type() == "text/html":
        raise ValueError("the server sent a web page instead of the file")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise ValueError(f"the server sent the file in the encoding {encoding!r}")
    if response.length is None and not response.chunked and not has_hash:
        raise ValueError("the server does not state the length of the file, so a cut transfer would not be noticed")


class _KeepHTTPS(urllib.request.HTTPRedirectHandler):
    """Refuse redirects from https to http: without a published hash, only the connection protects the file."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.type == "https" and not newurl.startswith("https:"):
            raise ValueError(f"the server redirects from https to {newurl}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _copy(
    response: HTTPResponse, file: BinaryIO, offset: int, total: int | None, title: str, limit: int, end: float
) -> int:
    """Append the rest of a file from `offset` on, and return the number of bytes received.

    Raises:
        ValueError: if the file is larger than `limit`, or not complete at the time `end`.
    """
    received = 0
    with tqdm(desc=title, initial=offset, total=total, unit="B", unit_scale=True, disable=None) as bar:
        while offset + received != total and (chunk := response.read1(_CHUNK)):  # read would wait for a whole chunk
            received += len(chunk)
            if max(total or 0, offset + received) > limit:
                raise ValueError(f"the file has more than {limit / 1e6:.0f} MB")
            if time.monotonic() > end:
                raise ValueError(f"the transfer took more than {LIMIT_S:.0f} s; run the command again to resume it")
            file.write(chunk)
            bar.update(len(chunk))
    return received


def _total(response: HTTPResponse, offset: int) -> int | None:
    """Return the size of the whole file; None if it is unknown, or a partial response is not its rest from `offset`."""
    if response.status == 206:
        part = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        first, last, total = map(int, part.groups()) if part else (-1, -1, -1)
        return total if (first, last) == (offset, total - 1) else None
    return response.length


def _is_text(path: Path) -> bool:
    """Return whether a file begins like text: an error message or a page, and no weights."""
    with _open_trusted(path) as file:
        start = file.read(512)
    return all(byte >= 0x20 or byte in b"\t\n\f\r" for byte in start)


# The origin of a partial file: its URL, and the validator (ETag or date) that identifies this version on the server.


def _resumable(url: str, partial: Path, origin: Path) -> tuple[int, str]:
    """Return the size of a partial file in bytes and its validator; 0 and "" if the transfer cannot be resumed."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with _open_trusted(origin) as file:
            known = json.load(file)
        if known["url"] == url and known["validator"]:
            return partial.lstat().st_size, known["validator"]
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
    """Open a file for `open`, but do not follow symbolic links, and do not wait for the other end of a named pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


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
    with os.fdopen(handle):
        locks.lock(handle)
        yield
