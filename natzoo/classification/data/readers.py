"""Where images come from: folders, tar files, Hugging Face datasets (through timm's reader).

A reader has what timm's readers have: `len(reader)`, `reader[index] -> (file, class number)`, `reader.filename(index)`;
and `classes`, the names of the classes in the order of their numbers, and `where`, for messages.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from timm.data.readers import create_reader
from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key

# Endings of names, in small letters.
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"))
_KINDS = ", ".join(sorted(IMAGE_SUFFIXES))  # for messages
_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "eval", "test")}


class FolderReader:
    """Images of a folder that holds one folder a class.

    Args:
        root: the folder.
        classes: names of the classes in the order of their numbers; the folders' names, sorted, unless given.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if it holds no class folders, a class folder without images, or a class that `classes` lacks.
    """

    def __init__(self, root: Path, classes: list[str] | None = None):
        self.where = str(root)
        paths, numbers, self.classes = _find(root, classes)
        # Arrays, which loading processes share; of a list each would come to have a copy, 200 MB of ImageNet's.
        self._paths, self._numbers = np.array([os.fsencode(path) for path in paths]), np.array(numbers)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.filename(index), int(self._numbers[index])

    def filename(self, index: int) -> str:
        return os.fsdecode(self._paths[index])


class TarReader:
    """Images of a tar file, or of a folder of tar files, which are not unpacked; the innermost folder names the class.

    A tar file within counts as a folder of its name. The files are looked through at each start, from header to header:
    no index is kept beside them.

    Raises:
        ValueError: if a file is no tar file or ends early, if none holds images, or one a class that `classes` lacks.
    """

    def __init__(self, root: Path, classes: list[str] | None = None):
        self.where = str(root)
        found: list[_Member] = []
        try:
            if root.is_dir():
                for path in sorted(root.glob("*.tar")):
                    with tarfile.open(path, "r:") as tar:
                        found += _members(tar, path, path.stem)
            else:
                with tarfile.open(root, "r:") as tar:
                    found += _members(tar, root, "")
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{root} cannot be read as tar files of images: {error}.") from error
        self.classes = classes or sorted({member.label for member in found} - {""}, key=natural_key)
        numbers = {name: number for number, name in enumerate(self.classes)}
        if not found:
            raise ValueError(f"{root} holds no images, of {_KINDS}.")
        for member in found:
            if not member.label:
                raise ValueError(f"{root} has the image {member.name} outside a class folder: move it into one.")
            if member.label not in numbers:
                raise _unknown_class(root, member.label)
        samples = ((numbers[member.label], member) for member in found)
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
    """An image in a tar file, and the bytes of the file that it is made of."""

    path: Path
    offset: int
    size: int
    name: str
    label: str


def _members(tar: tarfile.TarFile, path: Path, folder: str, offset: int = 0) -> Iterator[_Member]:
    """The images in a tar file that begins at a byte of the file at `path`; `folder` stands for their first folder."""
    for entry in tar:
        name = PurePosixPath(folder, entry.name)
        if not entry.isreg() or entry.issparse():
            continue
        if name.suffix.lower() == ".tar":
            with tarfile.open(fileobj=tar.extractfile(entry), mode="r:") as inner:
                yield from _members(inner, path, str(name.with_suffix("")), offset + entry.offset_data)
        elif name.suffix.lower() in IMAGE_SUFFIXES:
            yield _Member(path, offset + entry.offset_data, entry.size, str(name), name.parent.name)
    # The module takes a file that was cut between two entries, or within a header, for a whole one.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(
            f"{path} ends early, after {offset + tar.offset} bytes: was it copied whole? If its writer left out "
            "the mark of the end, append that, 1024 zero bytes"
        )


def _unknown_class(where: Path | str, label: str | int) -> ValueError:
    return ValueError(
        f"{where} has a class {label!r}, which is none of those known: of --class-map, the training images or "
        "the model."
    )


class HubReader:
    """A dataset of the Hugging Face hub, or a local one in its formats.

    Args:
        name: "OWNER/NAME", or a path.
        split: its name there.
        cache: folder that downloads are kept in; the library's own unless given.
        classes: names in the order of their numbers; the dataset's own unless given, which some lack.
        columns: names of the columns of images and of labels.

    Raises:
        ValueError: if the package datasets is missing, or it cannot load the dataset; if nothing names the classes, or
            a label is none of them.
    """

    def __init__(
        self,
        name: str,
        split: str,
        cache: str | None = None,
        classes: list[str] | None = None,
        columns: tuple[str, str] = ("image", "label"),
    ):
        self.where = f"{name}[{split}]"
        self._input_key, target_key = columns
        try:
            self._reader = create_reader(
                f"hfds/{name}", root=cache, split=split, input_key=self._input_key, target_key=target_key
            )
            labels = self._reader.dataset.unique(target_key)
        except ImportError as error:
            raise ValueError("--dataset hfds/... needs the package datasets: pip install datasets.") from error
        except Exception as error:  # the library raises those of several others
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the dataset {name}, split {split}, cannot be loaded, with images in the column {self._input_key!r} "
                f"and labels in {target_key!r} (--input-key, --target-key): {reason}"
            ) from error
        names = list(self._reader.class_to_idx)
        if not (classes or names):
            raise ValueError(f"{self.where} does not name its classes: name them in order by --class-map.")
        self.classes = classes or names
        numbers = {name: number for number, name in enumerate(self.classes)}
        # Labels are names, or numbers of the dataset's names, or, where it has none, of those given.
        known = {**numbers, **{label: numbers.get(name) for label, name in enumerate(names or self.classes)}}
        self._numbers = {label: known.get(label) for label in labels}
        for label, number in self._numbers.items():
            if number is None:
                name = names[label] if label in range(len(names)) else label
                raise _unknown_class(self.where, name)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        try:
            file, label = self._reader[index]
        except (AssertionError, TypeError) as error:
            raise ValueError(f"row {index} of {self.where} holds no image.") from error
        return file, self._numbers[label]

    def filename(self, index: int) -> str:
        image = self._reader.dataset[index][self._input_key] or {}
        return str(image.get("path") or f"{self.where} image {index}")


def open_reader(
    dataset: str,
    data: str | None,
    split: str,
    classes: list[str] | None,
    columns: tuple[str, str] = ("image", "label"),
):
    """The reader that --dataset, DATA, a split's name, and for the hub --input-key and --target-key mean.

    Raises:
        ValueError, FileNotFoundError: if there is no such data, or it cannot be read.
    """
    kind, _, name = dataset.partition("/")
    if kind == "hfds":
        return HubReader(name, split, data, classes, columns)
    if kind not in ("", "folder", "tar"):
        raise ValueError(f"--dataset {dataset} is unknown: use folder, tar, hfds/NAME or wds.")
    root = split_place(data, split)
    if kind == "tar" or root.suffix == ".tar" or (not kind and any(root.glob("*.tar")) and not _subfolders(root)):
        return TarReader(root, classes)
    return FolderReader(root, classes)


def read_class_map(path: str | None) -> list[str] | None:
    """The classes that --class-map names, one a line; None if there is no such file to read.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is no text file, or names a class twice.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no class map {path}: check the path given to --class-map.")
    if Path(path).suffix != ".txt":
        raise ValueError(f"the class map {path} must be a text file, .txt, with the name of one class a line.")
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    if len(load_class_map(path)) != len(lines) or not all(lines):
        raise ValueError(f"the class map {path} must name each class once, one a line, and have no empty lines.")
    return lines


def split_place(data: str | None, split: str) -> Path:
    """The folder or tar file of a split under a data set's folder; the latter itself if it holds the classes directly.

    Raises:
        FileNotFoundError: naming the folder that is missing.
    """
    if not data:
        raise FileNotFoundError("no data set was given: name the folder that holds train/ and val/.")
    root = Path(data)
    if root.is_file() and root.suffix == ".tar":
        return root
    if not root.is_dir():
        raise FileNotFoundError(f"there is no data folder {root}: it should hold {split}/ with one folder a class.")
    for name in (split, *_SPLITS.get(split, ())):
        for place in _places(root, name):
            return place
    if split == "val" and not any(_places(root, name) for names in _SPLITS.values() for name in names):
        return root
    raise FileNotFoundError(f"{root} has no folder {split}: it should hold {split}/ with one folder a class.")


def _places(root: Path, name: str) -> list[Path]:
    return [place for place in (root / name, root / f"{name}.tar") if place.exists()]


def _subfolders(root: Path) -> list[str]:
    return [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _find(root: Path, classes: list[str] | None) -> tuple[list[str], list[int], list[str]]:
    """Path and class number of every image, and the names of the classes."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}.")
    folders = _subfolders(root)
    if not folders:
        raise ValueError(f"{root} holds no class folders: it should hold one folder of images a class.")
    folders.sort(key=natural_key)
    classes = classes or folders
    numbers = {name: number for number, name in enumerate(classes)}
    paths, of_paths = [], []
    for name in folders:
        if name not in numbers:
            raise _unknown_class(root, name)
        found = _images_below(root / name)
        if not found:
            raise ValueError(f"the class folder {root / name} holds no images, of {_KINDS}: fill it or remove it.")
        paths += found
        of_paths += [numbers[name]] * len(found)
    return paths, of_paths, classes


def _images_below(folder: Path) -> list[str]:
    return sorted(
        os.path.join(place, file)  # a Path for each takes four times as long, which 1.3 million images make felt
        for place, _, files in os.walk(folder)
        for file in files
        if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
    )
