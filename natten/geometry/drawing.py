"""The windows of a problem, as text and as pictures; those alone need matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.geometry import Axis, axis_tiles


class Part(IntEnum):
    """What a token is to a query."""

    OTHER = 0
    SAME_CLASS = 1  # where there is dilation: of the query's residue class on each axis, so that it could be seen
    SHARES = 2  # a query that a stride gives the same window, but no key: later, on a causal axis
    KEY = 3  # in the query's window
    KEY_SHARES = 4  # both
    QUERY = 5


SYMBOLS = ".:o#@Q"
MEANINGS = (
    "outside the window",
    "outside the window, but of the query's residue class",
    "query that shares the window, not a key",
    "key: in the query's window",
    "key and query that shares the window",
    "query",
)


class Palette(NamedTuple):
    """Colours of a theme: of the page, of writing, and of each `Part`."""

    page: str
    ink: str
    parts: tuple[str, ...]


PALETTES = {
    "light": Palette("#ffffff", "#1f2328", ("#eceff2", "#cdd6e0", "#f6d9a6", "#5b9bd5", "#f2a93b", "#d1343c")),
    "dark": Palette("#0d1117", "#e6edf3", ("#212a35", "#3d4c5f", "#7a5a25", "#3f84c9", "#e0a040", "#ff6b6b")),
}

# ---------------------------------------------------------------------------------------------------------------------
# Which token plays which part
# ---------------------------------------------------------------------------------------------------------------------


def axis_window(axis: Axis, position: int) -> tuple[list[int], list[int]]:
    """The keys that a query sees along an axis, and the entry of the bias table that each of them takes."""
    tiles = axis_tiles(axis, 1)
    tile = tiles.place_L[position]
    is_key = tiles.bias_TQK[tile, 0] != tiles.outside
    return tiles.key_TK[tile][is_key].tolist(), tiles.bias_TQK[tile, 0][is_key].tolist()


def parts_of(axes: Sequence[Axis], query: Sequence[int]) -> Tensor:
    """The `Part` of each token of the map, int64 [*space]."""
    pairs = list(zip(axes, query, strict=True))
    is_key = _box(axes, [axis_window(axis, position)[0] for axis, position in pairs])
    parts = torch.full(is_key.shape, Part.OTHER)
    if any(axis.dilation > 1 for axis in axes):
        parts[_box(axes, [_residue_class(axis, position) for axis, position in pairs])] = Part.SAME_CLASS
    parts[is_key] = Part.KEY
    if any(axis.stride > 1 for axis in axes):
        shares = _box(axes, [_group(axis, position) for axis, position in pairs])
        parts[shares] = torch.where(is_key, Part.KEY_SHARES, Part.SHARES)[shares]
    parts[tuple(query)] = Part.QUERY
    return parts


def _box(axes: Sequence[Axis], positions: Sequence[Sequence[int]]) -> Tensor:
    """Where a map has these positions on all axes, bool [*space]."""
    box = torch.zeros([axis.length for axis in axes], dtype=torch.bool)
    box[torch.meshgrid(*map(torch.tensor, positions), indexing="ij")] = True
    return box


def _residue_class(axis: Axis, position: int) -> range:
    return range(position % axis.dilation, axis.length, axis.dilation)


def _group(axis: Axis, position: int) -> list[int]:
    """The queries that a stride gives the same window, `position` among them."""
    number = position // axis.dilation // axis.stride
    return [p for p in _residue_class(axis, position) if p // axis.dilation // axis.stride == number]


def middle(axes: Sequence[Axis]) -> tuple[int, ...]:
    """The token in the middle of a map."""
    return tuple(axis.length // 2 for axis in axes)


def planes(axes: Sequence[Axis], query: Sequence[int] | None) -> list[tuple[str, Tensor]]:
    """A problem as titled maps of `Part`s [rows, columns].

    1-D: one map, a row for each query, or for the one given. 2-D: the map. 3-D: each plane of the first axis with keys.
    """
    if len(axes) == 1:
        queries = [query] if query else [(position,) for position in range(axes[0].length)]
        return [("a row for each query", torch.stack([parts_of(axes, q) for q in queries]))]
    query = query or middle(axes)
    parts = parts_of(axes, query)
    if len(axes) == 2:
        return [(f"query {_join(query)}", parts)]
    depths = sorted({*axis_window(axes[0], query[0])[0], query[0]})
    return [(f"query {_join(query)}, plane {depth}", parts[depth]) for depth in depths]


def _join(values: Sequence[Any], between: str = ", ") -> str:
    return between.join(map(str, values))


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def describe(axes: Sequence[Axis]) -> str:
    """A problem in one line."""
    lengths, *window, causal = zip(*axes, strict=True)
    names = ("kernel_size", "stride", "dilation")
    values = [f"{name} {_join(v if len(set(v)) > 1 else v[:1], 'x')}" for name, v in zip(names, window, strict=True)]
    if any(causal):
        values.append("causal" if all(causal) else f"causal on axis {_join(i for i, c in enumerate(causal) if c)}")
    return f"{_join(lengths, 'x')} tokens, {', '.join(values)}"


def to_text(axes: Sequence[Axis], queries: Sequence[Sequence[int] | None] = (None,)) -> str:
    """A problem as maps of `SYMBOLS`, with what they mean, and the keys and bias entries along each axis."""
    lines, seen = [describe(axes)], set()
    for query in queries:
        for title, parts in planes(axes, query):
            lines += ["", title, *_grid(parts, first_row=query[0] if query and len(axes) == 1 else 0)]
            seen.update(parts.unique().tolist())
        if query or len(axes) > 1:
            lines += ["", *_axis_lines(axes, query or middle(axes))]
    return "\n".join([*lines, "", *(f"{SYMBOLS[part]} {MEANINGS[part]}" for part in sorted(seen, reverse=True))])


def _grid(parts: Tensor, first_row: int) -> list[str]:
    """Rows and columns with their numbers, columns in two-digit cells where they need them."""
    rows, columns = parts.shape
    width = len(str(columns - 1)) + 1
    margin = len(str(first_row + rows - 1))
    head = " " * margin + "".join(f"{column:>{width}}" for column in range(columns))
    body = (
        f"{row:>{margin}}" + "".join(f"{SYMBOLS[part]:>{width}}" for part in values)
        for row, values in enumerate(parts.tolist(), start=first_row)
    )
    return [head, *body]


def _axis_lines(axes: Sequence[Axis], query: Sequence[int]) -> list[str]:
    lines = []
    for index, (axis, position) in enumerate(zip(axes, query, strict=True)):
        keys, bias = axis_window(axis, position)
        lines.append(f"axis {index}: query {position}, keys {_join(keys, ' ')}, bias entries {_join(bias, ' ')}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def draw_parts(axes: Any, parts: Tensor, palette: Palette) -> Any:
    """Draws a map of `Part`s [rows, columns] on matplotlib's axes, a square for each token; returns the QuadMesh."""
    from matplotlib.colors import ListedColormap

    rows, columns = parts.shape
    mesh = axes.pcolormesh(
        parts.numpy(), cmap=ListedColormap(palette.parts), vmin=0, vmax=len(Part) - 1, edgecolors=palette.page, lw=0.8
    )
    axes.set(aspect="equal", xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    axes.set_facecolor(palette.page)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def add_legend(figure: Any, seen: Iterable[int], palette: Palette, ncols: int) -> None:
    """Says under a figure what the colours mean."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=palette.parts[part], label=MEANINGS[part]) for part in sorted(seen, reverse=True)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=ncols, frameon=False, labelcolor=palette.ink, fontsize=9
    )


def draw(axes: Sequence[Axis], queries: Sequence[Sequence[int] | None] = (None,), theme: str = "light") -> Any:
    """A figure of a problem: `planes` of each query side by side.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib: pip install matplotlib.") from error
    palette = PALETTES[theme]
    maps = list(itertools.chain.from_iterable(planes(axes, query) for query in queries))
    rows, columns = maps[0][1].shape
    height = min(max(3.4 * rows / columns, 0.5), 8.0)
    figure = Figure((max(3.4 * len(maps), 4.8), height + 1.6), dpi=150, layout="constrained", facecolor=palette.page)
    figure.suptitle(describe(axes), color=palette.ink, fontsize=11)
    for panel, (title, parts) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        draw_parts(panel, parts, palette)
        panel.set_title(title, color=palette.ink, fontsize=9)
    seen = {part for _, parts in maps for part in parts.unique().tolist()}
    add_legend(figure, seen, palette, ncols=min(len(maps), 2))
    return figure
