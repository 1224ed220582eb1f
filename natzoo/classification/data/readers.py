"""Readers: images from folders, tar files and Hugging Face datasets.

A reader has the interface of timm's readers: `len(reader)`, `reader[index] -> (file, class number)` and
`reader.filename(index)`. It also has `classes`, the class names in the order of the class numbers, and `source`, its
name in messages.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from timm.data.readers import create_reader
from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key

from natzoo.command_line import require_file

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"))
_SUFFIX_LIST = ", ".join(sorted(IMAGE_SUFFIXES))  # for messages
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
        paths, numbers = [], []
        for name in folders:
            if name not in class_numbers:
                raise _unknown_class(root, name)
            found = _images_below(root / name)
            if not found:
                raise ValueError(f"{root / name} has no images ({_SUFFIX_LIST}); add some or remove the folder.")
            paths += found
            numbers += [class_numbers[name]] * len(found)
        # Data-loading workers share arrays. Each would copy a list, which takes 200 MB for ImageNet.
        self._paths, self._numbers = np.array([os.fsencode(path) for path in paths]), np.array(numbers)

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
            try:
                with tarfile.open(path, "r:") as tar:
                    members += _list_members(tar, path, path.stem if root.is_dir() else "")
            except (tarfile.TarError, OSError) as error:
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


def _list_members(tar: tarfile.TarFile, path: Path, folder: str, offset: int = 0) -> Iterator[_Member]:
    """Yield the images of a tar file that starts at byte `offset` of the file `path`; prefix names with `folder`."""
    for entry in tar:
        name = PurePosixPath(folder, entry.name)
        if not entry.isreg() or entry.issparse():
            continue
        if name.suffix.lower() == ".tar":
            with tarfile.open(fileobj=tar.extractfile(entry), mode="r:") as inner:
                yield from _list_members(inner, path, str(name.with_suffix("")), offset + entry.offset_data)
        elif name.suffix.lower() in IMAGE_SUFFIXES:
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
        self._input_key, target_key = columns
        try:
            self._reader = create_reader(
                f"hfds/{name}", root=cache, split=split, input_key=self._input_key, target_key=target_key
            )
            labels = self._reader.dataset.unique(target_key)
        except ImportError as error:
            raise ValueError("--dataset hfds/... requires the package datasets; run pip install datasets.") from error
        except Exception as error:  # datasets raises errors of several other libraries
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"--dataset hfds/{name}, split {split}, cannot be loaded with --input-key {self._input_key} and "
                f"--target-key {target_key}: {reason}"
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
            if known.get(label) is None:
                raise _unknown_class(self.source, names[label] if label in range(len(names)) else label)
        self._numbers: dict[Any, int] = {label: known[label] for label in labels}

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        try:
            file, label = self._reader[index]
        except (AssertionError, TypeError) as error:
            raise ValueError(f"{self.source} has no image in row {index}.") from error
        return file, self._numbers[label]

    def filename(self, index: int) -> str:
        image = self._reader.dataset[index][self._input_key] or {}
        return str(image.get("path") or f"{self.source} image {index}")


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
    require_file(Path(path), "use a text file with one class name per line", "--class-map")
    if Path(path).suffix != ".txt":
        raise ValueError(f"--class-map {path} must be a .txt file with one class name per line.")
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    if len(load_class_map(path)) != len(lines) or not all(lines):
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


def _images_below(folder: Path) -> list[str]:
    """Return the sorted paths of the images in a folder and its subfolders.

    They are strings, because Path objects take four times as long for 1.3 million images.
    """
    return sorted(
        os.path.join(place, file)
        for place, _, files in os.walk(folder)
        for file in files
        if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
    )
