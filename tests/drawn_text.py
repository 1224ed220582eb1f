"""Check that the text of figures can be read."""

import itertools

from matplotlib.figure import Figure
from matplotlib.text import Text


def check_text(figure: Figure) -> None:
    """Draw a figure and assert that no text is cut off or overlaps another one. Single characters are ignored."""
    drawn = []
    draw = Text.draw

    def record(text, renderer):
        if text.get_visible() and len(text.get_text()) > 1:
            drawn.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer)

    Text.draw = record
    try:
        figure.draw_without_rendering()
    finally:
        Text.draw = draw
    assert drawn
    page = figure.bbox
    for text, box in drawn:
        assert page.x0 <= box.x0 and page.y0 <= box.y0 and box.x1 <= page.x1 and box.y1 <= page.y1, f"{text} is cut off"
    for (text, box), (other, other_box) in itertools.combinations(drawn, 2):
        assert not box.overlaps(other_box), f"{text} overlaps {other}"


def check_saved_figures(monkeypatch) -> list[Figure]:
    """Check the text of each figure when it is saved, and return the list of the saved figures."""
    saved = []
    savefig = Figure.savefig

    def check_and_save(figure, *args, **kwargs):
        check_text(figure)
        savefig(figure, *args, **kwargs)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", check_and_save)
    return saved
