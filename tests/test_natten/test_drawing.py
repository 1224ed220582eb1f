"""python -m natten.geometry: the windows of a problem as text and as a figure."""

import subprocess
import sys

import pytest
from brute_force import axis_window as slots_of
from drawn_text import check_saved_figures
from PIL import Image

from natten.checks import make_axes
from natten.geometry import __main__ as command
from natten.geometry import drawing
from natten.geometry.drawing import Part


@pytest.mark.parametrize("window", [(5, 1, 1, False), (3, 1, 3, False), (4, 3, 1, False), (5, 2, 2, True)])
def test_keys_match_the_definition(window):
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
    _, grid, legend = text.split("\n\n")
    assert grid.split("\n", 1)[1] == (
        "  0 1 2 3 4 5\n0 Q o . . . .\n1 @ Q . . . .\n2 . # Q o . .\n3 . # @ Q . .\n4 . . . # Q o\n5 . . . # @ Q"
    )
    assert [line[0] for line in legend.splitlines()] == list("Q@#o.")


def test_text_of_a_query():
    text = drawing.to_text(make_axes((4, 12), (2, 3), is_causal=(True, False)), [(0, 11)])
    assert "\n0  .  .  .  .  .  .  .  .  .  #  #  Q\n" in text
    assert "4x12" in text and "query 0, 11" in text
    assert "keys 0, bias entries 1\n" in text and "keys 9 10 11, bias entries 0 1 2\n" in text


def test_only_planes_with_keys_are_shown():
    planes = drawing.planes(make_axes((9, 4, 4), 3), (0, 1, 1))
    assert len(planes) == 3
    assert all(parts.shape == (4, 4) and (parts == Part.KEY).any() for _, parts in planes)


@pytest.mark.parametrize("theme", drawing.PALETTES)
def test_figure(theme, monkeypatch, tmp_path):
    check_saved_figures(monkeypatch)
    out = tmp_path / "new" / "windows.png"
    window = ["--size", "9x9", "--kernel-size", "3", "--dilation", "2,1", "--stride", "2", "--causal", "1"]
    command.main([*window, "--query", "0,0", "--query", "4,4", "--theme", theme, "--out", str(out)])
    assert [path.name for path in out.parent.iterdir()] == ["windows.png"]
    with Image.open(out) as image:
        found = {"#{:02x}{:02x}{:02x}".format(*color) for _, color in image.convert("RGB").getcolors(1 << 20)}
    palette = drawing.PALETTES[theme]
    assert found.issuperset((palette.page, *palette.parts))


@pytest.mark.parametrize(
    "options",
    [
        "--size 12x16 --kernel-size 5x3 --stride 3x2 --dilation 2x4 --causal 1",
        "--size 30 --kernel-size 6 --stride 3 --dilation 2 --causal",
        "--size 4x8x8 --kernel-size 3x5x5 --causal 0 --query 2,4,4 --query 3,0,0",
    ],
)
def test_text_of_figures_is_complete(options, monkeypatch, tmp_path):
    saved = check_saved_figures(monkeypatch)
    command.main([*options.split(), "--out", str(tmp_path / "windows.png")])
    assert len(saved) == 1


def test_command_prints_the_problem_without_warnings():
    argv = [sys.executable, "-W", "error", "-m", "natten.geometry", "--size", "5", "--kernel-size", "3"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "kernel_size 3" in done.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--size 4x4 --kernel-size 5", "kernel_size"),
        ("--size 8x8 --kernel-size 3x3x3", "kernel_size"),
        ("--size four --kernel-size 3", "--size"),
        ("--size 8x8 --kernel-size 3 --query 3,8", "--query"),
        ("--size 8x8 --kernel-size 3 --causal 2", "--causal"),
        ("--size 2x2x2x2 --kernel-size 2", "--size"),
    ],
)
def test_wrong_options_are_named(options, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(options.split())
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_figure_without_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--size", "5", "--kernel-size", "3", "--out", str(tmp_path / "a.png")])
    assert "matplotlib" in capsys.readouterr().err
