"""Sources of weight files: published names, paths, URLs and Hugging Face repositories, each resolved to a local file.

The published checkpoints are listed in natzoo/zoo.yaml.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

import yaml

from natzoo.checkpoints.download import DownloadError, cache_folder, fetch

ZOO_FILE = Path(__file__).parents[1] / "zoo.yaml"
_HUB_SCHEME = "hf-hub:"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_CONFIG = "config.json"
_SUFFIXES = (".pth", ".tar", ".pt", ".bin", ".safetensors", ".pkl")

# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class ZooEntry(NamedTuple):
    """A published checkpoint.

    Attributes:
        name: registered model name for classifiers, file name without its extension for all others.
        task: "classification", "detection", "segmentation" or "mask2former".
        url: address on the project's site.
        hub: Hugging Face repository with the same weights, or None.
        sha256: hash of the file at `url`, or None if no hash is published.
        facts: all other fields in the list: parameters, MACs, published results.
    """

    name: str
    task: str
    url: str
    hub: str | None
    sha256: str | None
    facts: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Approximate file size in bytes: four per parameter."""
        return 4 * self.facts.get("parameters", round(1e6 * self.facts.get("params", 0)))


@cache
def zoo_entries() -> dict[str, ZooEntry]:
    """Return all published checkpoints by name, in the order of natzoo/zoo.yaml."""
    # CSafeLoader is eight times faster than SafeLoader, and this runs during `import natzoo`.
    content = yaml.load(ZOO_FILE.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    site = content.pop("site")
    return {name: _entry(name, task, site, facts) for task, rows in content.items() for name, facts in rows.items()}


def _entry(name: str, task: str, site: str, facts: dict[str, Any]) -> ZooEntry:
    facts = dict(facts)
    return ZooEntry(name, task, site + facts.pop("file"), facts.pop("hub", None), facts.pop("sha256", None), facts)


def find_entry(name: str) -> ZooEntry:
    """Return the published checkpoint with this name; timm's tag after a dot is optional.

    Raises:
        ValueError: if there is none; the message suggests similar names.
    """
    entries = zoo_entries()
    entry = entries.get(name) or entries.get(name.split(".")[0])
    if entry is None:
        similar = difflib.get_close_matches(name, entries, n=3)
        hint = f"did you mean {', '.join(similar)}?" if similar else "the tables of the README list the names."
        raise ValueError(f"{name!r} is neither a file nor a published checkpoint; {hint}")
    return entry


def locate_entry(entry: ZooEntry, cache_dir: str | os.PathLike | None = None) -> Path:
    """Return the file of a published checkpoint; download it first if necessary.

    Tries the project's site, then the Hugging Face repository.

    Args:
        entry: the checkpoint.
        cache_dir: folder for downloads; None for the cache folder.

    Raises:
        DownloadError: if no source provides the file.
    """
    try:
        return fetch([entry.url], path_in_cache(entry, cache_dir), entry.sha256, entry.size)
    except DownloadError as error:
        if entry.hub is None:
            raise
        try:
            return _locate_on_hub(entry.hub, cache_dir)
        except DownloadError as second:
            raise DownloadError(f"{error} The copy on the Hugging Face hub failed too: {second}") from second


def path_in_cache(entry: ZooEntry, cache_dir: str | os.PathLike | None = None) -> Path:
    """Return the path of a published checkpoint in a folder for downloads, by default the cache folder."""
    return _downloads(cache_dir) / _file_name(entry.url)


def _downloads(cache_dir: str | os.PathLike | None) -> Path:
    return cache_folder() if cache_dir is None else Path(cache_dir).expanduser().absolute()


# ---------------------------------------------------------------------------------------------------------------------
# Any source
# ---------------------------------------------------------------------------------------------------------------------


def locate(what: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> Path:
    """Return a weight file; download it first if necessary.

    Args:
        what: one of

            - the path of a file;
            - the path of a folder written by transformers or timm;
            - the name of a published checkpoint: a registered model or an entry of natzoo/zoo.yaml;
            - a URL; one of a file on this machine is the same as its path;
            - "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION", a Hugging Face repository.
        cache_dir: folder for downloads; None for the cache folder, or Hugging Face's for its repositories.

    Raises:
        ValueError: if it is none of these, or both a published name and a path; "./NAME" is always a path.
        FileNotFoundError: if it is a path and the file does not exist.
        DownloadError: if no source provides the file; the message states the failure of each source.
    """
    if isinstance(what, str) and what.startswith("file:"):
        what = unquote(urlsplit(what).path)
    path, text = Path(what), str(what)
    if isinstance(what, str) and what in zoo_entries() and path.exists():
        raise ValueError(f"{what!r} is a published checkpoint and also exists here; for the local one, write ./{what}.")
    if path.is_file():
        return path
    if path.is_dir():
        return _locate_in_folder(path)
    if text.startswith(_HUB_SCHEME):
        return _locate_on_hub(text.removeprefix(_HUB_SCHEME), cache_dir)
    if urlsplit(text).scheme in ("http", "https"):
        return _locate_url(text, cache_dir)
    if path.suffix in _SUFFIXES or len(path.parts) > 1:
        raise FileNotFoundError(f"{path} does not exist; check the path.")
    return locate_entry(find_entry(text), cache_dir)


def locate_config(what: str | os.PathLike, weights: Path) -> Path | None:
    """Return the config.json that describes the weights of a folder or of a Hugging Face repository.

    Args:
        what: what `locate` was called with.
        weights: what it returned.

    Raises:
        DownloadError: if the repository has one that cannot be downloaded.
    """
    if not str(what).startswith(_HUB_SCHEME):
        path = Path(what) / _CONFIG
        return path if path.is_file() else None
    identity = str(what).removeprefix(_HUB_SCHEME).partition("@")[0]
    # huggingface_hub stores the files of a commit in one folder named after it.
    for name in (_CONFIG, "preprocessor_config.json"):
        _download_of_commit(identity, weights.parent.name, name)
    path = weights.parent / _CONFIG
    return path if path.is_file() else None


def _download_of_commit(identity: str, commit: str, name: str) -> None:
    """Download a file of a repository if the commit has it."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    is_offline = is_unreachable(constants.ENDPOINT)
    try:
        hf_hub_download(identity, name, revision=commit, local_files_only=is_offline)
    except Exception as error:  # the library passes on errors of several other libraries
        is_missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if not (is_missing or is_offline):
            reason = (str(error).strip().splitlines() or ["unknown"])[0]
            raise DownloadError(f"{_HUB_SCHEME}{identity}: {name} could not be downloaded ({reason}).") from error


def _locate_in_folder(folder: Path) -> Path:
    for name in _HUB_FILES:
        if (folder / name).is_file():
            return folder / name
    # The folder of a training run: its best checkpoint, else its last one.
    found = [folder / name for name in ("best.pth", "last.pth") if (folder / name).is_file()]
    found += sorted(folder.glob("*.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    remedy = f"use a file such as {found[0]}" if found else "give the path of a file"
    raise FileNotFoundError(f"{folder} is a folder without {' or '.join(_HUB_FILES)}; {remedy}.")


def _locate_url(url: str, cache_dir: str | os.PathLike | None) -> Path:
    for entry in zoo_entries().values():
        if entry.url == url:
            return locate_entry(entry, cache_dir)
    # A folder per URL, so that files with the same name do not collide.
    folder = _downloads(cache_dir) / "others" / hashlib.sha256(url.encode()).hexdigest()[:16]
    return fetch([url], folder / _file_name(url))


def _file_name(url: str) -> str:
    name = Path(unquote(urlsplit(url).path)).name
    if name in ("", ".."):
        raise ValueError(f"{url} contains no file name.")
    return name


def _locate_on_hub(repository: str, cache_dir: str | os.PathLike | None) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    identity, _, revision = repository.partition("@")
    failure: Exception | None = None
    is_offline = is_unreachable(constants.ENDPOINT)  # the library would retry for half a minute
    for name in _HUB_FILES:
        try:
            options = {"revision": revision or None, "cache_dir": cache_dir, "local_files_only": is_offline}
            return Path(hf_hub_download(identity, name, **options))
        except Exception as error:  # the library passes on errors of several other libraries
            failure = error
            is_missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if not (is_missing or is_offline):
                break  # only a missing file is a reason to try the next name
    host = urlsplit(constants.ENDPOINT).netloc or constants.ENDPOINT
    reason = f"{host} cannot be resolved" if is_offline else (str(failure).strip().splitlines() or ["unknown"])[0]
    raise DownloadError(f"{_HUB_SCHEME}{repository}: {' or '.join(_HUB_FILES)} could not be downloaded ({reason}).")


@contextmanager
def local_files_if_offline() -> Iterator[None]:
    """Let huggingface_hub use its local files if its server is unreachable; it would retry for half a minute first."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or is_unreachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_unreachable(url: str) -> bool:
    """Return whether the host name of a URL cannot be resolved; always False behind a proxy."""
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(url).hostname, None)
    except OSError:
        return True
    return False
