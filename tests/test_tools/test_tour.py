"""The notebook runs from its first cell to its last, and what it says of its models is so."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

TOUR = Path(__file__).parents[2] / "tools" / "tour.ipynb"
CELLS = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]


def test_is_committed_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)


@pytest.fixture
def one_thread():
    """On busy machines several threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_cells_run(one_thread, monkeypatch, capsys):
    monkeypatch.chdir(TOUR.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shown = []
    names = {"__name__": "tour"}
    for cell in CELLS:
        *lines, last = cell["source"]
        if last.startswith("show("):
            last = f"_shown = {last}"
        exec(compile("".join([*lines, last]), str(TOUR), "exec"), names)
        shown.append(names.pop("_shown", None))
    pictures = [picture for picture in shown if picture is not None]
    assert len(pictures) == 4 and all(isinstance(picture, Image.Image) for picture in pictures)
    assert not plt.get_fignums()
    assert names["difference"] < 1e-5
    assert names["learned"] > 0.8
    assert names["fine_tuned"] > 0.7
    assert "of new pictures are told right" in capsys.readouterr().out
