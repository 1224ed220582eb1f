"""Pictures to predict on: files, folders, URLs and frames of videos."""

import io

import file_server
import numpy as np
import pytest
from PIL import Image

from natzoo.classification.data.pictures import Pictures


def picture(color=(200, 40, 40), size=(20, 16)):
    return Image.new("RGB", size, color)


@pytest.fixture
def video(tmp_path):
    """A video of six frames that get brighter."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for level in range(6):
        writer.write(np.full((48, 64, 3), (0, 0, 40 * level), np.uint8))  # BGR
    writer.release()
    return path


def test_folders_and_files_have_different_stems(tmp_path):
    for name in ("a/x.png", "a/sub/x.jpg", "b/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    found = list(Pictures([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "b" / "x.png")]))
    assert [one.stem for one in found] == ["sub/x", "x", "x-2", "x-3"]
    assert [one.name for one in found][:2] == [str(tmp_path / "a" / name) for name in ("sub/x.jpg", "x.png")]
    assert all(one.image.size == (20, 16) for one in found)


def test_every_second_frame_of_a_video(video):
    found = list(Pictures([str(video)], every=2))
    assert [one.name for one in found] == [f"{video}#{number}" for number in (0, 2, 4)]
    assert [one.stem for one in found] == ["film_000000", "film_000002", "film_000004"]
    red = [np.asarray(one.image)[..., 0].mean() for one in found]
    assert red == pytest.approx([0, 80, 160], abs=8)
    assert np.asarray(found[2].image)[..., 2].mean() < 8


def test_videos_in_folders_are_not_read(video):
    with pytest.raises(ValueError, match=str(video.parent)):
        Pictures([str(video.parent)])


def test_damaged_video_is_an_error(tmp_path, capsys):
    pytest.importorskip("cv2")
    (tmp_path / "film.mp4").write_bytes(b"no video")
    picture().save(tmp_path / "a.png")
    pictures = Pictures([str(tmp_path / "film.mp4"), str(tmp_path / "a.png")])
    assert len(list(pictures)) == 1
    with pytest.raises(ValueError, match="1 of 2"):
        pictures.raise_errors()
    assert "film.mp4" in capsys.readouterr().err


def test_urls(monkeypatch):
    content = io.BytesIO()
    picture((10, 200, 10)).save(content, "PNG")
    server = file_server.Server()
    server.behaviors = [lambda handler: file_server.serve(handler, content.getvalue())]
    (found,) = Pictures([server.url("green.png?size=large")])
    assert (found.name, found.stem) == (server.url("green.png?size=large"), "green")
    assert found.image.getpixel((0, 0)) == (10, 200, 10)
    server.behaviors = [lambda handler: handler.send_error(404)]
    with pytest.raises(ValueError, match=r"missing\.png.*404"):
        Pictures([server.url("missing.png")])
