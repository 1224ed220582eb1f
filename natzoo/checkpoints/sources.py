"""Where weights are: a name, an address or a path becomes a file on this machine."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

from natzoo.checkpoints import zoo
from natzoo.checkpoints.download import DownloadError, cache_folder, fetch

_HUB = "hf-hub:"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def locate(what: str | os.PathLike) -> Path:
    """The file of some weights, downloaded if it is not here yet.

    Args:
        what: a path of a file, or of a folder as transformers and timm write it; the name of a published checkpoint (a
            registered model, or an entry of natzoo/zoo.yaml); a URL; or "hf-hub:OWNER/NAME" or
            "hf-hub:OWNER/NAME@REVISION", a repository of the Hugging Face hub.

    Raises:
        ValueError: if it is none of these.
        DownloadError: if no source gives the file; each source's failure is told.
    """
    path, text = Path(what), str(what)
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path)
    if text.startswith(_HUB):
        return _from_hub(text.removeprefix(_HUB))
    if urlsplit(text).scheme in ("http", "https"):
        published = next((entry for entry in zoo.entries().values() if entry.url == text), None)
        return _published(published) if published else fetch([text], _path_of_other(text))
    if path.suffix in (".pth", ".tar", ".pt", ".bin", ".safetensors", ".pkl") or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no checkpoint {path}: check the path.")
    return _published(zoo.find(text))


def path_in_cache(entry: zoo.Entry) -> Path:
    """Where the file of a published checkpoint is kept."""
    return cache_folder() / _file_name(entry.url)


def _in_folder(folder: Path) -> Path:
    for name in _HUB_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} is a folder with none of {', '.join(_HUB_FILES)}: give the path of a file.")


def _path_of_other(url: str) -> Path:
    """Where the file of any other address is kept: apart from all that have the same name."""
    return cache_folder() / "others" / hashlib.sha256(url.encode()).hexdigest()[:16] / _file_name(url)


def _published(entry: zoo.Entry) -> Path:
    """From the project's site, else from the hub."""
    try:
        return fetch([entry.url], path_in_cache(entry), entry.sha256, entry.size)
    except DownloadError as error:
        if entry.hub is None:
            raise
        try:
            return _from_hub(entry.hub)
        except DownloadError as second:
            raise DownloadError(f"{error} The Hugging Face hub does not give it either ({second}).") from second


def _from_hub(repository: str) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    identity, _, revision = repository.partition("@")
    failure: Exception | None = None
    is_offline = is_out_of_reach(constants.ENDPOINT)  # the library would try for half a minute
    for name in _HUB_FILES:
        try:
            return Path(hf_hub_download(identity, name, revision=revision or None, local_files_only=is_offline))
        except Exception as error:  # the library raises those of several others
            failure = error
            is_missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if not (is_missing or is_offline):
                break  # else the repository may have the other one
    host = urlsplit(constants.ENDPOINT).netloc or constants.ENDPOINT
    reason = f"{host} is not to be found" if is_offline else (str(failure).strip().splitlines() or ["?"])[0]
    raise DownloadError(f"{repository} on the Hugging Face hub gave none of {', '.join(_HUB_FILES)} ({reason})")


def is_out_of_reach(url: str) -> bool:
    """Whether the name of a host is not to be found; behind a proxy nobody can tell."""
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(url).hostname, None)
    except OSError:
        return True
    return False


def _file_name(url: str) -> str:
    name = Path(unquote(urlsplit(url).path)).name
    if name in ("", ".."):
        raise ValueError(f"{url} names no file.")
    return name
