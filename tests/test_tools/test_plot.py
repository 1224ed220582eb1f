"""tools/plot.py: the pictures of the pages, small and in both themes, of the figures that the tables hold."""

import plot
import pytest
from PIL import Image
from plots import diagrams, published

from natzoo.checkpoints import zoo_entries


@pytest.mark.parametrize("name", plot.PICTURES)
def test_every_picture_is_there_in_both_themes(name):
    light, dark = (plot.ASSETS / f"{name}_{theme}.png" for theme in ("light", "dark"))
    for path in (light, dark):
        assert path.stat().st_size < 150_000, path
    with Image.open(light) as one, Image.open(dark) as other:
        assert one.size == other.size
        assert one.convert("L").getpixel((2, 2)) > 200 > 50 > other.convert("L").getpixel((2, 2))


def test_pictures_are_drawn(tmp_path, capsys):
    plot.main(["nat/compute", "natten/layer_memory", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*.png"))) == 4
    with pytest.raises(ValueError, match="there is no picture 'nat/nothing': name some of nat/intro"):
        plot.main(["nat/nothing"])


def test_figures_are_those_of_the_zoo_and_of_the_peers():
    figures = {(row.family, row.size): row.figures for row in published.published()}
    assert len(figures) == 4 + 4 + 3 + 6
    facts = zoo_entries()["cascadedmaskrcnn_dinat_s_tiny"].facts
    found = figures["DiNAT_s", "Tiny"]
    assert (found["box_ap"], found["mask_ap"], found["box_macs"]) == (facts["box_ap"], facts["mask_ap"], facts["macs"])
    assert found["miou"] == zoo_entries()["upernet_dinat_s_tiny"].facts["miou"]
    assert figures["Swin", "Base"]["top1"] == 83.5


@pytest.mark.parametrize(("place", "first"), [(0, 0), (10, 7), (5, 2), (13, 7)])
def test_windows_of_the_diagrams(place, first):
    assert diagrams.window(14, 7, 1, place) == list(range(first, first + 7))
