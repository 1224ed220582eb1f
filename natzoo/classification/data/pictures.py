"""Pictures to predict on: image files, folders, URLs, and the frames of videos."""

from __future__ import annotations

import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from PIL import Image
from tqdm import tqdm

from natzoo.classification.data.datasets import read_image
from natzoo.classification.data.readers import IMAGE_SUFFIXES
from natzoo.command_line import printable
from natzoo.images import check_image_size

VIDEO_SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"))
_MAX_BYTES = 2**30  # of a download
_STALL_S = 30.0


class Picture(NamedTuple):
    """An image to predict on.

    Attributes:
        name: its path or URL; for a video, followed by # and the number of the frame.
        stem: a relative path without suffix for its results, different for each picture.
        image: the image in RGB.
    """

    name: str
    stem: str
    image: Image.Image


class _Source(NamedTuple):
    name: str
    stem: str
    path: Path


class Pictures:
    """The images of files, folders and their subfolders, URLs, and videos.

    What cannot be read is reported on stderr and skipped; `raise_errors` raises at the end. Videos are read only if
    they are named, not in folders.

    Args:
        sources: paths and URLs.
        every: use every N-th frame of a video.

    Attributes:
        errors: a message for each source and image that could not be read so far.

    Raises:
        ValueError: if nothing is left to predict on.
    """

    def __init__(self, sources: Sequence[str], every: int = 1):
        self.every = every
        self.errors: list[str] = []
        self._found: list[_Source] = []
        self._stems: set[str] = set()
        self._downloads = tempfile.TemporaryDirectory(prefix="natzoo-")  # removed with this object
        for text in sources:
            try:
                self._add(text)
            except (OSError, ValueError, HTTPException) as error:
                self.errors.append(str(error))
        self._count = len(self._found) + len(self.errors)
        if self._count > 1:  # a single error is raised at the end
            for message in self.errors:
                tqdm.write(printable(message), file=sys.stderr)
        if not self._found:
            self.raise_errors()

    def __iter__(self) -> Iterator[Picture]:
        for source in self._found:
            try:
                if source.path.suffix.lower() in VIDEO_SUFFIXES:
                    yield from self._frames(source)
                else:
                    yield Picture(source.name, source.stem, read_image(source.path, source.name))
            except (OSError, ValueError) as error:
                self.errors.append(str(error))
                if self._count > 1:
                    tqdm.write(printable(str(error)), file=sys.stderr)

    def batches(self, size: int) -> Iterator[list[Picture]]:
        """Yield lists of up to `size` pictures, with a progress bar."""
        batch: list[Picture] = []
        has_video = any(source.path.suffix.lower() in VIDEO_SUFFIXES for source in self._found)
        total = None if has_video else len(self._found)
        for picture in tqdm(self, desc="Predict", total=total, unit="picture", leave=False, disable=None):
            batch.append(picture)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def raise_errors(self) -> None:
        """Raise ValueError if some sources or images could not be read."""
        if self.errors:
            summary = f"{len(self.errors)} of {self._count} inputs could not be read; see the messages above."
            raise ValueError(summary if self._count > 1 else self.errors[0])

    def _add(self, text: str) -> None:
        if text.startswith(("http://", "https://")):
            path = self._download(text)
            self._found.append(_Source(text, self._unique(Path(path.name)), path))
            return
        path = Path(text)
        if path.is_dir():
            images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise ValueError(f"{path} has no images.")
            self._found += [_Source(str(file), self._unique(file.relative_to(path)), file) for file in images]
        elif path.is_file():
            self._found.append(_Source(str(path), self._unique(Path(path.name)), path))
        else:
            raise ValueError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}.")

    def _unique(self, path: Path) -> str:
        """Return a path without suffix that no other picture has."""
        first = stem = str(path.with_suffix(""))
        number = 1
        while stem in self._stems:
            number += 1
            stem = f"{first}-{number}"
        self._stems.add(stem)
        return stem

    def _download(self, url: str) -> Path:
        """Download a picture or a video; raise OSError, ValueError or HTTPException."""
        name = Path(unquote(urlsplit(url).path).replace("\0", "")).name
        folder = Path(tempfile.mkdtemp(dir=self._downloads.name))
        path = folder / (name if 0 < len(name.encode(errors="surrogateescape")) < 200 else "picture")
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "natzoo"})
            with urllib.request.urlopen(request, timeout=_STALL_S) as response, path.open("wb") as file:
                bar = tqdm(desc=path.name, total=response.length, unit="B", unit_scale=True, leave=False, disable=None)
                while chunk := response.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
                    if file.tell() > _MAX_BYTES:
                        raise ValueError(f"it has more than {_MAX_BYTES / 1e6:.0f} MB")
                bar.close()
        except (OSError, ValueError, HTTPException) as error:
            raise ValueError(f"{url} could not be downloaded ({error}); check the address.") from error
        return path

    def _frames(self, source: _Source) -> Iterator[Picture]:
        """Yield every N-th frame of a video.

        Raises:
            ValueError: if OpenCV is not installed or cannot read the video.
        """
        try:
            import cv2
        except ImportError as error:
            raise ValueError(
                f"{source.name}: videos require the package opencv-python-headless; install it."
            ) from error
        video = cv2.VideoCapture(str(source.path))
        try:
            count = 0
            while video.grab():
                if count % self.every == 0:
                    is_read, pixels = video.retrieve()
                    if not is_read:
                        break
                    check_image_size(pixels.shape[1], pixels.shape[0])
                    image = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
                    yield Picture(f"{source.name}#{count}", f"{source.stem}_{count:06d}", image)
                count += 1
        finally:
            video.release()
        if count == 0:
            raise ValueError(f"{source.name} has no frames that OpenCV can read.")
