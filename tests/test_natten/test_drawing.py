"""python -m natten.geometry: the windows of a problem as text and as a picture."""

import subprocess
import sys

import pytest
from brute_force import axis_window as slots_of
from PIL import Image

from natten.checks import make_axes
from natten.geometry import __main__ as command
from natten.geometry import drawing
from natten.geometry.drawing import Part


@pytest.mark.parametrize("window", [(5, 1, 1, False), (3, 1, 3, False), (4, 3, 1, False), (5, 2, 2, True)])
def test_keys_are_those_of_the_definition(window):
    (axis,) = make_axes((13,), window[0], *window[1:])
    for position in range(13):
        keys, bias = drawing.axis_window(axis, position)
        slots = [slot for slot in slots_of(position, 13, *window) if slot]
        assert (keys, bias) == ([slot.key for slot in slots], [slot.bias for slot in slots])


def test_parts_of_a_dilated_window():
    parts = drawing.parts_of(make_axes((6, 7), 2, dilation=2), (2, 3))
    assert parts[2, 3] == Part.QUERY
    assert (parts == Part.KEY).nonzero().tolist() == [[0, 1], [0, 3], [2, 1]]
    assert (parts == Part.SAME_CLASS).nonzero().tolist() == [[0, 5], [2, 5], [4, 1], [4, 3], [4, 5]]


def test_text_of_a_causal_problem_with_a_stride():
    text = drawing.to_text(make_axes((6,), 3, stride=2, is_causal=True))
    assert text.split("\n\n") == [
        "6 tokens, kernel_size 3, stride 2, dilation 1, causal",
        "a row for each query\n"
        "  0 1 2 3 4 5\n"
        "0 Q o . . . .\n"
        "1 @ Q . . . .\n"
        "2 . # Q o . .\n"
        "3 . # @ Q . .\n"
        "4 . . . # Q o\n"
        "5 . . . # @ Q",
        "Q query\n"
        "@ key and query that shares the window\n"
        "# key: in the query's window\n"
        "o query that shares the window, not a key\n"
        ". outside the window",
    ]


def test_text_of_a_query():
    text = drawing.to_text(make_axes((4, 12), (2, 3), is_causal=(True, False)), [(0, 11)])
    assert "4x12 tokens, kernel_size 2x3, stride 1, dilation 1, causal on axis 0\n\nquery 0, 11\n" in text
    assert "\n0  .  .  .  .  .  .  .  .  .  #  #  Q\n" in text
    assert "axis 0: query 0, keys 0, bias entries 1\naxis 1: query 11, keys 9 10 11, bias entries 0 1 2\n" in text


def test_only_planes_with_keys_are_shown():
    titles = [title for title, _ in drawing.planes(make_axes((9, 4, 4), 3), (0, 1, 1))]
    assert titles == [f"query 0, 1, 1, plane {plane}" for plane in range(3)]


@pytest.mark.parametrize("theme", drawing.PALETTES)
def test_picture(theme, tmp_path, capsys):
    out = tmp_path / "new" / "windows.png"
    window = ["--size", "9x9", "--kernel-size", "3", "--dilation", "2,1", "--stride", "2", "--causal", "1"]
    command.main([*window, "--query", "0,0", "--query", "4,4", "--theme", theme, "--out", str(out)])
    assert capsys.readouterr().out.endswith(f"\nwrote {out}\n")
    assert [path.name for path in out.parent.iterdir()] == ["windows.png"]
    with Image.open(out) as image:
        found = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in image.convert("RGB").getcolors(1 << 20)}
    palette = drawing.PALETTES[theme]
    assert found.issuperset((palette.page, *palette.parts))


def test_as_a_command_without_a_warning():
    words = [sys.executable, "-W", "error", "-m", "natten.geometry", "--size", "5", "--kernel-size", "3"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("5 tokens, kernel_size 3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--size 4x4 --kernel-size 5", "kernel_size * dilation is 5 * 1 = 5 on axis 0"),
        ("--size 8x8 --kernel-size 3x3x3", "kernel_size must be one int or 2 of them"),
        ("--size four --kernel-size 3", "argument --size: invalid number, or numbers such as 12x12 value: 'four'"),
        ("--size 8x8 --kernel-size 3 --query 3,8", "--query 3,8 is no token of a map of 8x8 tokens"),
        ("--size 8x8 --kernel-size 3 --causal 2", "--causal names the axes [2], but --size has the axes 0 to 1"),
        ("--size 2x2x2x2 --kernel-size 2", "--size has 4 axes"),
    ],
)
def test_mistakes_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(words.split())
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_without_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--size", "5", "--kernel-size", "3", "--out", str(tmp_path / "a.png")])
    assert capsys.readouterr().err == "error: pictures need matplotlib: pip install matplotlib.\n"
