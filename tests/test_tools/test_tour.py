"""tools/tour.ipynb runs from the first cell to the last, and its models learn."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

TOUR = Path(__file__).parents[2] / "tools" / "tour.ipynb"
CELLS = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]


def test_notebook_has_no_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)


@pytest.fixture
def one_thread():
    """Use one thread: on a busy machine, several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_cells_run(one_thread, monkeypatch):
    monkeypatch.chdir(TOUR.parent)
    shown = []
    names = {"__name__": "tour"}
    for cell in CELLS:
        *lines, last = cell["source"]
        if last.startswith("show("):
            last = f"_shown = {last}"
        exec(compile("".join([*lines, last]), str(TOUR), "exec"), names)
        shown.append(names.pop("_shown", None))
    images = [image for image in shown if image is not None]
    assert len(images) == 4 and all(isinstance(image, Image.Image) for image in images)
    assert not plt.get_fignums()
    assert names["difference"] < 1e-5
    assert names["learned"] > 0.8
    assert names["fine_tuned"] > 0.7
