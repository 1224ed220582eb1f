"""tools/plot.py: the figures of the pages are small, complete, readable, and show the numbers of the tables."""

import math

import matplotlib.pyplot as plt
import plot
import pytest
from drawn_text import check_saved_figures
from figures import published
from figures.style import THEMES, log_ticks
from PIL import Image

from natzoo.checkpoints import zoo_entries


@pytest.mark.parametrize("name", plot.FIGURES)
def test_files_in_both_themes(name):
    light, dark = (plot.ASSETS / f"{name}_{theme}.png" for theme in THEMES)
    for path in (light, dark):
        assert path.stat().st_size < 150_000, path
    with Image.open(light) as one, Image.open(dark) as other:
        assert one.size == other.size
        assert one.convert("L").getpixel((2, 2)) > 200 > 50 > other.convert("L").getpixel((2, 2))


@pytest.mark.parametrize("name", plot.FIGURES)
def test_text_is_complete_and_does_not_overlap(name, monkeypatch, tmp_path):
    saved = check_saved_figures(monkeypatch)
    monkeypatch.setattr(plot, "PAGE_DPI", 20)
    plot.draw(name, tmp_path)
    assert len(saved) == 2


@pytest.mark.parametrize(("low", "high"), [(2.7, 15.4), (20, 90), (64.9, 162), (579, 1970), (1.2, 5.7), (0.03, 40)])
def test_log_ticks_are_round_and_cover_the_data(low, high):
    figure, axes = plt.subplots()
    log_ticks(axes.xaxis, low, high)
    ticks, (left, right) = axes.get_xticks(), axes.get_xlim()
    plt.close(figure)
    assert left < low and high < right
    assert len(ticks) >= 3 and all(left <= tick <= right for tick in ticks)
    assert {round(tick / 10 ** math.floor(math.log10(tick) + 1e-9), 6) for tick in ticks} <= {1, 2, 5}


def test_figures_are_written(tmp_path):
    plot.main(["nat/compute", "natten/layer_memory", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*.png"))) == 4
    with pytest.raises(ValueError, match="nat/nothing"):
        plot.main(["nat/nothing"])


def test_published_results_equal_the_zoo_and_peers_csv():
    figures = {(row.family, row.size): row.figures for row in published.published()}
    assert len(figures) == 4 + 4 + 3 + 6
    facts = zoo_entries()["cascadedmaskrcnn_dinat_s_tiny"].facts
    found = figures["DiNAT_s", "Tiny"]
    assert (found["box_ap"], found["mask_ap"], found["box_macs"]) == (facts["box_ap"], facts["mask_ap"], facts["macs"])
    assert found["miou"] == zoo_entries()["upernet_dinat_s_tiny"].facts["miou"]
    assert figures["Swin", "Base"]["top1"] == 83.5
