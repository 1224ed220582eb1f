"""Where images come from: folders, tar files, Hugging Face datasets, webdataset shards; all but folders through timm.

A reader has what timm's readers have: `len(reader)`, `reader[index] -> (file, class number)`, `reader.filename(index)`;
and `classes`, the names of the classes in the order of their numbers, and `where`, for messages.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from timm.data.readers import create_reader, reader_image_in_tar
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "eval", "test")}

# Beside large tar files timm keeps an index, a pickle, which its older versions read without care. None: it may.
_KEEPS_INDEX = None if hasattr(reader_image_in_tar, "_TarInfoUnpickler") else False


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
        self.samples, self.classes = _find(root, classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]

    def filename(self, index: int) -> str:
        return self.samples[index][0]


class TarReader:
    """Images of a tar file, or of a folder of tar files, which are not unpacked; the innermost folder names the class.

    Raises:
        ValueError: if a file is no tar file, or none holds images of the classes.
    """

    def __init__(self, root: Path, classes: list[str] | None = None):
        self.where = str(root)
        numbers = {name: number for number, name in enumerate(classes or [])}
        try:
            self._reader = ReaderImageInTar(str(root), class_map=numbers, cache_tarinfo=_KEEPS_INDEX)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{root} cannot be read as tar files of images: {error}.") from error
        except ValueError as error:  # nothing to unpack
            raise ValueError(f"{root} holds no images of the classes looked for.") from error
        self.classes = classes or list(self._reader.class_name_to_idx)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int):
        file, target = self._reader[index]
        return file, int(target)

    def filename(self, index: int) -> str:
        return f"{self.where}/{self._reader.filename(index)}"


class HubReader:
    """A dataset of the Hugging Face hub, or a local one in its formats, with columns `image` and `label`.

    Args:
        name: "OWNER/NAME", or a path.
        split: its name there.
        cache: folder that downloads are kept in; the library's own unless given.
        classes: names in the order of their numbers; the dataset's own unless given.

    Raises:
        ValueError: if the package datasets is missing, or it cannot load the dataset.
    """

    def __init__(self, name: str, split: str, cache: str | None = None, classes: list[str] | None = None):
        self.where = f"{name}[{split}]"
        numbers = {given: number for number, given in enumerate(classes or [])}
        try:
            self._reader = create_reader(f"hfds/{name}", root=cache, split=split, class_map=numbers or None)
        except ImportError as error:
            raise ValueError("--dataset hfds/... needs the package datasets: pip install datasets.") from error
        except Exception as error:  # the library raises those of several others
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the dataset {name}, split {split}, cannot be loaded: {reason}") from error
        self.classes = classes or list(self._reader.class_to_idx)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int):
        return self._reader[index]

    def filename(self, index: int) -> str:
        return str(self._reader.filename(index) or f"{self.where} image {index}")


def open_reader(dataset: str, data: str | None, split: str, classes: list[str] | None):
    """The reader that --dataset, DATA and a split's name mean.

    Raises:
        ValueError, FileNotFoundError: if there is no such data, or it cannot be read.
    """
    kind, _, name = dataset.partition("/")
    if kind == "hfds":
        return HubReader(name, split, data, classes)
    if kind not in ("", "folder", "tar"):
        raise ValueError(f"--dataset {dataset} is unknown: use folder, tar, hfds/NAME or wds.")
    root = split_place(data, split)
    if kind == "tar" or root.suffix == ".tar" or (not kind and any(root.glob("*.tar"))):
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


def _find(root: Path, classes: list[str] | None) -> tuple[list[tuple[str, int]], list[str]]:
    """(path, class number) of every image, and the names of the classes."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}.")
    folders = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        raise ValueError(f"{root} holds no class folders: it should hold one folder of images a class.")
    folders.sort(key=natural_key)
    classes = classes or folders
    numbers = {name: number for number, name in enumerate(classes)}
    suffixes = get_img_extensions(as_set=True)
    samples = []
    for name in folders:
        if name not in numbers:
            raise ValueError(f"{root} has a class {name!r}, which the model was not trained on.")
        paths = sorted(str(path) for path in (root / name).rglob("*") if path.suffix.lower() in suffixes)
        if not paths:
            raise ValueError(f"the class folder {root / name} holds no images: fill it or remove it.")
        samples += [(path, numbers[name]) for path in paths]
    return samples, classes
