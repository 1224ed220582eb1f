"""Readers: images from folders, tar files and Hugging Face datasets.

A reader has the interface of timm's readers: `len(reader)`, `reader[index] -> (file, class number)` and
`reader.filename(index)`. It also has `classes`, the class names in the order of the class numbers, `source`, its
name in messages, and `digest`, a hash that changes with its images.

Data may come from strangers. Nothing in it names files outside its folder, commands or addresses, and nothing waits for
a FIFO.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from timm.data.readers import create_reader
from timm.utils.misc import natural_key

from natzoo.command_line import is_relative_name, read_json, read_text, require_file, scheme_of

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"))
_SUFFIX_LIST = ", ".join(sorted(IMAGE_SUFFIXES))  # for messages
_CLASS_MAP_REMEDY = "use a text file with one class name per line"
_MAX_TAR_DEPTH = 8  # tar files within tar files
_MAX_SHARDS, _MAX_REMOTE_SAMPLES, _MAX_INFO_BYTES = 10**6, 10**10, 2**28
_SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "eval", "test")}


class FolderReader:
    """Images of a folder with one subfolder per class.

    Args:
        root: the folder.
        classes: class names in the order of the class numbers; the sorted names of the subfolders if None.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it has no class folders, a class folder without images, or a class that `classes` lacks.
    """

    def __init__(self, root: Path, classes: list[str] | None = None):
        self.source = str(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder.")
        folders = sorted(_subfolders(root), key=natural_key)
        if not folders:
            raise ValueError(f"{root} has no class folders; it must hold one folder of images per class.")
        self.classes = classes or folders
        class_numbers = {name: number for number, name in enumerate(self.classes)}
        paths: list[str] = []
        sizes: list[int] = []
        numbers: list[int] = []
        for name in folders:
            if name not in class_numbers:
                raise _unknown_class(root, name)
            found = _images_below(root / name)
            if not found:
                raise ValueError(f"{root / name} has no images ({_SUFFIX_LIST}); add some or remove the folder.")
            paths += [path for path, _ in found]
            sizes += [size for _, size in found]
            numbers += [class_numbers[name]] * len(found)
        # Data-loading workers share arrays. Each would copy a list, which takes 200 MB for ImageNet.
        self._paths, self._numbers = np.array([os.fsencode(path) for path in paths]), np.array(numbers)
        self.digest = digest((path[len(self.source) :] for path in paths), sizes)

    @property
    def targets(self) -> list[int]:
        """Class number of each image."""
        return self._numbers.tolist()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.filename(index), int(self._numbers[index])

    def filename(self, index: int) -> str:
        return os.fsdecode(self._paths[index])


class TarReader:
    """Images of a tar file, or of a folder of tar files, read without unpacking. The innermost folder is the class.

    A tar file inside another one counts as a folder of that name. The headers are scanned at each start; no index file
    is written.

    Args:
        root: the tar file or folder.
        classes: class names in the order of the class numbers; the sorted names of the folders if None.

    Raises:
        ValueError: if a file is not a tar file or is truncated, if there are no images, or if an image has no class or
            one that `classes` lacks.
    """

    def __init__(self, root: Path, classes: list[str] | None = None):
        self.source = str(root)
        members: list[_Member] = []
        for path in sorted(root.glob("*.tar")) if root.is_dir() else [root]:
            require_file(path, "replace it by a tar file of images")
            try:
                with tarfile.open(path, "r:") as tar:
                    members += _list_members(tar, path, path.stem if root.is_dir() else "")
            except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
                raise ValueError(f"{path} cannot be read as a tar file of images: {error}.") from error
        self.classes = classes or sorted({member.label for member in members} - {""}, key=natural_key)
        numbers = {name: number for number, name in enumerate(self.classes)}
        if not members:
            raise ValueError(f"{root} has no images ({_SUFFIX_LIST}).")
        for member in members:
            if not member.label:
                raise ValueError(f"{root} has the image {member.name} outside a class folder; move it into one.")
            if member.label not in numbers:
                raise _unknown_class(root, member.label)
        samples = ((numbers[member.label], member) for member in members)
        self.samples = sorted(samples, key=lambda sample: (sample[0], sample[1].name))
        self.digest = digest(*zip(*((member.name, member.size) for _, member in self.samples), strict=True))

    @property
    def targets(self) -> list[int]:
        """Class number of each image."""
        return [number for number, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        number, member = self.samples[index]
        with open(member.path, "rb") as file:
            file.seek(member.offset)
            return io.BytesIO(file.read(member.size)), number

    def filename(self, index: int) -> str:
        _, member = self.samples[index]
        return f"{member.path}/{member.name}"


class _Member(NamedTuple):
    """An image in a tar file: the file, the range of bytes, its name and its class."""

    path: Path
    offset: int
    size: int
    name: str
    label: str


def _list_members(tar: tarfile.TarFile, path: Path, folder: str, offset: int = 0, depth: int = 1) -> Iterator[_Member]:
    """Yield the images of a tar file that starts at byte `offset` of the file `path`; prefix names with `folder`."""
    if depth > _MAX_TAR_DEPTH:
        raise tarfile.ReadError(f"{folder} is the {depth}th tar file within another; unpack some of them")
    end = 0
    for entry in tar:
        if entry.size < 0 or entry.offset < end:  # damaged headers make tarfile go back, without end
            raise tarfile.ReadError(f"the entry {entry.name!r} has an impossible size")
        end = entry.offset_data
        name = PurePosixPath(folder, entry.name)
        if not entry.isreg() or entry.issparse() or name.suffix.lower() not in (".tar", *IMAGE_SUFFIXES):
            continue
        if entry.name.startswith("/") or ".." in name.parts:
            raise tarfile.ReadError(f"the entry {entry.name!r} is outside its folder; use relative names without ..")
        if name.suffix.lower() == ".tar":
            with tarfile.open(fileobj=tar.extractfile(entry), mode="r:") as inner:
                prefix = str(name.with_suffix(""))
                yield from _list_members(inner, path, prefix, offset + entry.offset_data, depth + 1)
        else:
            yield _Member(path, offset + entry.offset_data, entry.size, str(name), name.parent.name)
    # tarfile accepts a file that is truncated between two entries or within a header.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(
            f"it is truncated after {offset + tar.offset} bytes; copy it again (if its writer omitted the "
            "end-of-archive marker, append 1024 zero bytes)"
        )


def _unknown_class(source: Path | str, label: str | int) -> ValueError:
    return ValueError(
        f"{source} has the class {label!r}, which is not in --class-map, the training images or the model."
    )


class HubReader:
    """A dataset of the Hugging Face hub, or a local one in its formats.

    Args:
        name: "OWNER/NAME", or a path.
        split: name of the split in the dataset.
        cache: folder for downloads; the library's default if None.
        classes: class names in the order of the class numbers; those of the dataset, if it has any, if None.
        columns: names of the image column and the label column.

    Raises:
        ValueError: if the package datasets is missing, if the dataset cannot be loaded, if the class names are unknown,
            or if a label is not among them.
    """

    def __init__(
        self,
        name: str,
        split: str,
        cache: str | None = None,
        classes: list[str] | None = None,
        columns: tuple[str, str] = ("image", "label"),
    ):
        self.source = f"{name}[{split}]"
        self._input_key, self._target_key = columns
        try:
            self._reader = create_reader(
                f"hfds/{name}", root=cache, split=split, input_key=self._input_key, target_key=self._target_key
            )
            labels = self._reader.dataset.unique(self._target_key)
        except ImportError as error:
            raise ValueError("--dataset hfds/... requires the package datasets; run pip install datasets.") from error
        except Exception as error:  # datasets raises errors of several other libraries
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"--dataset hfds/{name}, split {split}, cannot be loaded with --input-key {self._input_key} and "
                f"--target-key {self._target_key}: {reason}"
            ) from error
        names = list(self._reader.class_to_idx)
        if not (classes or names):
            raise ValueError(f"{self.source} has no class names; pass them with --class-map.")
        self.classes = classes or names
        numbers = {name: number for number, name in enumerate(self.classes)}
        # Labels are names, or numbers into the names of the dataset, or into `classes` if the dataset has no names.
        known: dict[Any, Any] = {
            **numbers,
            **{label: numbers.get(name) for label, name in enumerate(names or self.classes)},
        }
        for label in labels:
            if not isinstance(label, (int, str)) or known.get(label) is None:
                raise _unknown_class(self.source, names[label] if label in range(len(names)) else label)
        self._numbers: dict[Any, int] = {label: known[label] for label in labels}
        rows = self._reader.dataset.data.column(self._target_key).to_pylist()
        self.targets = [self._numbers[label] for label in rows]
        self.digest = digest([], self.targets)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> tuple[BinaryIO | str, int]:
        row = self._reader.dataset[index]
        image = row[self._input_key] or {}
        file = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
        if not file:
            raise ValueError(f"{self.source} has no image in row {index}.")
        return file, self._numbers[row[self._target_key]]

    def filename(self, index: int) -> str:
        image = self._reader.dataset[index][self._input_key] or {}
        return str(image.get("path") or f"{self.source} image {index}")


class Shards(NamedTuple):
    """The webdataset shards of a split: their paths or URLs, and what is known about them.

    `label_key` is the key of the label in the .json file of an image; "" for labels in .cls files.
    """

    urls: list[str]
    num_samples: int
    label_key: str
    digest: str


def read_shards(root: str, split: str, schemes: Collection[str] = ()) -> Shards:
    """Return the shards of a split.

    webdataset opens URLs, among them `pipe:COMMAND`. Therefore shards are files in DATA, unless the user has allowed
    their schemes.

    Args:
        root: the argument DATA: the folder of the shards and _info.json, or its URL.
        split: a split of _info.json, or shard names and a number of images: `train-{0000..0127}.tar|1281167`.
        schemes: schemes of URLs that are allowed.

    Raises:
        FileNotFoundError: if _info.json or a shard does not exist.
        ValueError: naming what is wrong in _info.json or the split.
    """
    _check_scheme("DATA", root, schemes)
    source = os.path.join(root, "_info.json")
    if "{" in split or ".tar" in split:
        pattern, _, count = split.partition("|")
        names: Any = _expand_braces(pattern)
        where, num_samples, label_key = f"split {split!r:.200}", int(count) if count.isdecimal() else None, ""
        if num_samples is None:
            raise ValueError(f"{where} has no number of images; append it as in train-{{0000..0127}}.tar|1281167.")
    else:
        info = _read_info(root, source)
        splits = info.get("splits") if isinstance(info, dict) else None
        found = splits.get(split) if isinstance(splits, dict) else None
        if not isinstance(found, dict):
            known = f"its splits are {', '.join(map(repr, splits))}" if isinstance(splits, dict) else "it has no splits"
            raise ValueError(f"{source} does not describe the split {split!r:.200}; {known:.500}.")
        where, label_key = f"{source}, split {split!r},", found.get("alt_label") or ""
        names, num_samples = found.get("filenames"), found.get("num_samples")
        if not isinstance(label_key, str):
            raise ValueError(f"{where} has alt_label = {label_key!r:.100}; it must be a key of the .json files.")
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where} has filenames = {names!r:.100}; it must be a list of shard names.")
    urls = [_shard_url(root, name, where, schemes) for name in names]
    repeated = next((url for url, count in Counter(urls).items() if count > 1), None)
    if repeated is not None:
        raise ValueError(f"{where} lists {repeated} more than once; remove the repetitions.")
    sizes = [os.path.getsize(url) if not scheme_of(url) else -1 for url in urls]
    limit = max(_MAX_REMOTE_SAMPLES if -1 in sizes else 0, sum(sizes))  # an image takes more than a byte
    if type(num_samples) is not int or not 0 < num_samples <= limit:
        raise ValueError(f"{where} has num_samples = {num_samples!r:.100}; it must be the number of images.")
    return Shards(urls, num_samples, label_key, digest(names, [*sizes, num_samples]))


def _read_info(root: str, source: str) -> Any:
    remedy = "describe the shards in it, or pass their names as --train-split and --val-split"
    if not scheme_of(root):
        return read_json(Path(source), remedy, limit=_MAX_INFO_BYTES)
    import webdataset

    try:
        with webdataset.gopen.gopen(source) as file:
            return json.loads(file.read(_MAX_INFO_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} cannot be read ({error}); {remedy}.") from error


def _shard_url(root: str, name: Any, where: str, schemes: Collection[str]) -> str:
    """Return the absolute path of a shard, or its URL.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is not a file in `root`, and not a URL of an allowed scheme.
    """
    if isinstance(name, str) and scheme_of(name):
        _check_scheme(f"{where} names", name, schemes)
        return name
    if not is_relative_name(name):
        raise ValueError(f"{where} names {name!r:.200}; a shard must be a file in {root or '.'} or below it.")
    if scheme_of(root):
        return os.path.join(root, name)
    path = os.path.abspath(os.path.join(root, name))
    require_file(Path(path), f"check {where.rstrip(',')}")
    return path


def _check_scheme(where: str, url: str, schemes: Collection[str]) -> None:
    scheme = scheme_of(url)
    if scheme and scheme not in schemes:
        raise ValueError(
            f"{where} {url!r:.200}, which is not a file; pass --allow-remote-shards {scheme} if you trust it."
        )


def _expand_braces(pattern: str) -> list[str]:
    """Expand ranges {0000..0127}, lists {a,b} and :: between patterns.

    Raises:
        ValueError: if that makes too many names.
    """
    names: list[str] = []
    for part in pattern.split("::"):
        pieces = []
        for piece in re.split(r"(\{[^{}]*\})", part):
            numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
            if numbers:
                width = len(numbers[1]) if numbers[1].startswith("0") else 0
                span = range(int(numbers[1]), int(numbers[2]) + 1)
                pieces.append([f"{number:0{width}}" for number in span[: _MAX_SHARDS + 1]])
            else:
                pieces.append(piece[1:-1].split(",") if piece.startswith("{") and "," in piece else [piece])
        if len(names) + math.prod(map(len, pieces)) > _MAX_SHARDS:
            raise ValueError(f"split {pattern!r:.200} names more than {_MAX_SHARDS} shards; check the braces.")
        names += map("".join, itertools.product(*pieces))
    return names


def open_reader(
    dataset: str,
    data: str | None,
    split: str,
    classes: list[str] | None,
    columns: tuple[str, str] = ("image", "label"),
) -> FolderReader | TarReader | HubReader:
    """Open a dataset.

    Args:
        dataset: the option --dataset.
        data: the argument DATA.
        split: name of the split.
        classes: class names in the order of the class numbers, or None for those of the data.
        columns: the options --input-key and --target-key.

    Raises:
        ValueError, FileNotFoundError: if the data does not exist, or cannot be read.
    """
    kind, _, name = dataset.partition("/")
    if kind == "hfds":
        return HubReader(name, split, data, classes, columns)
    if kind not in ("", "folder", "tar"):
        raise ValueError(f"--dataset {dataset} is unknown; use folder, tar, hfds/NAME or wds.")
    root = find_split(data, split)
    if kind == "tar" or root.suffix == ".tar" or (not kind and any(root.glob("*.tar")) and not _subfolders(root)):
        return TarReader(root, classes)
    return FolderReader(root, classes)


def read_class_map(path: str | None) -> list[str] | None:
    """Read the class names of --class-map, one per line; return None if the option is not given.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a text file, or repeats a class.
    """
    if path is None:
        return None
    lines = [line.strip() for line in read_text(Path(path), _CLASS_MAP_REMEDY, "--class-map").splitlines()]
    if Path(path).suffix != ".txt":
        raise ValueError(f"--class-map {path} must be a .txt file with one class name per line.")
    if not lines or len(set(lines)) != len(lines) or not all(lines):
        raise ValueError(f"--class-map {path} must have one class name per line, without repetitions or empty lines.")
    return lines


def find_split(data: str | None, split: str) -> Path:
    """Return the folder or tar file of a split, or the data folder itself if it holds the class folders directly.

    Raises:
        FileNotFoundError: naming the missing folder.
    """
    if not data:
        raise FileNotFoundError("DATA is missing; pass the folder that holds train/ and val/.")
    root = Path(data)
    if root.is_file() and root.suffix == ".tar":
        return root
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"{root} {problem}; DATA must be a folder that holds {split}/.")
    for name in (split, *_SPLIT_NAMES.get(split, ())):
        for path in _existing(root, name):
            return path
    if split == "val" and not any(_existing(root, name) for names in _SPLIT_NAMES.values() for name in names):
        return root
    raise FileNotFoundError(f"{root} has no folder {split}/ with one folder per class.")


def _existing(root: Path, name: str) -> list[Path]:
    return [path for path in (root / name, root / f"{name}.tar") if path.exists()]


def _subfolders(root: Path) -> list[str]:
    return [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _images_below(folder: Path) -> list[tuple[str, int]]:
    """Return the paths and sizes of the images in a folder and its subfolders, sorted by path.

    Paths are strings, because Path objects take four times as long for 1.3 million images.
    """
    found: list[tuple[str, int]] = []
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and not entry.is_dir():
                    found.append((entry.path, _size(entry)))
    return sorted(found)


def _size(entry: os.DirEntry) -> int:
    """Return the size of a file, or -1 for a broken link, which is reported when the image is read."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def digest(names: Iterable[str], sizes: Iterable[int]) -> str:
    """Return a hash of file names and sizes, by which a resumed run notices that its images have changed."""
    found = hashlib.sha256(b"\0".join(map(os.fsencode, names)))
    found.update(np.fromiter(sizes, "<i8").tobytes())
    return found.hexdigest()[:16]
