"""Draw the windows of a problem, as text and as figures. Only the figures require matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.geometry import Axis, axis_tiles


class Part(IntEnum):
    """Role of a token for a query."""

    OTHER = 0
    SAME_CLASS = 1  # with dilation: in the query's residue class, but outside its window
    SHARES = 2  # with stride: in the query's stride group, but not a key (causal axes only)
    KEY = 3
    KEY_SHARES = 4  # with stride: key in the query's stride group
    QUERY = 5


SYMBOLS = ".:o#@Q"
MEANINGS = (
    "outside the window",
    "outside the window, same residue class",
    "same stride group, not a key",
    "key",
    "key, same stride group",
    "query",
)


class Palette(NamedTuple):
    """Colors of a theme: background, text, and one per `Part`."""

    page: str
    ink: str
    parts: tuple[str, ...]


PALETTES = {
    "light": Palette("#ffffff", "#1f2328", ("#eceff2", "#cdd6e0", "#f6d9a6", "#5b9bd5", "#f2a93b", "#d1343c")),
    "dark": Palette("#0d1117", "#e6edf3", ("#212a35", "#3d4c5f", "#7a5a25", "#3f84c9", "#e0a040", "#ff6b6b")),
}

# ---------------------------------------------------------------------------------------------------------------------
# Roles of the tokens
# ---------------------------------------------------------------------------------------------------------------------


def axis_window(axis: Axis, position: int) -> tuple[list[int], list[int]]:
    """Return the keys of a query along an axis, and the bias table entry of each key."""
    tiles = axis_tiles(axis, 1)
    tile = tiles.place_L[position]
    is_key = tiles.bias_TQK[tile, 0] != tiles.outside
    return tiles.key_TK[tile][is_key].tolist(), tiles.bias_TQK[tile, 0][is_key].tolist()


def parts_of(axes: Sequence[Axis], query: Sequence[int]) -> Tensor:
    """Return the `Part` of each token of the map for a query, int64 [*space]."""
    pairs = list(zip(axes, query, strict=True))
    is_key = _box(axes, [axis_window(axis, position)[0] for axis, position in pairs])
    parts = torch.full(is_key.shape, Part.OTHER)
    if any(axis.dilation > 1 for axis in axes):
        parts[_box(axes, [_residue_class(axis, position) for axis, position in pairs])] = Part.SAME_CLASS
    parts[is_key] = Part.KEY
    if any(axis.stride > 1 for axis in axes):
        shares = _box(axes, [_stride_group(axis, position) for axis, position in pairs])
        parts[shares] = torch.where(is_key, Part.KEY_SHARES, Part.SHARES)[shares]
    parts[tuple(query)] = Part.QUERY
    return parts


def _box(axes: Sequence[Axis], positions: Sequence[Sequence[int]]) -> Tensor:
    """Return a mask of the product of positions, bool [*space]."""
    box = torch.zeros([axis.length for axis in axes], dtype=torch.bool)
    box[torch.meshgrid(*map(torch.tensor, positions), indexing="ij")] = True
    return box


def _residue_class(axis: Axis, position: int) -> range:
    return range(position % axis.dilation, axis.length, axis.dilation)


def _stride_group(axis: Axis, position: int) -> list[int]:
    """Return the queries that share a window because of the stride, including `position`."""
    number = position // axis.dilation // axis.stride
    return [p for p in _residue_class(axis, position) if p // axis.dilation // axis.stride == number]


def center(axes: Sequence[Axis]) -> tuple[int, ...]:
    """Return the token at the center of a map."""
    return tuple(axis.length // 2 for axis in axes)


def planes(axes: Sequence[Axis], query: Sequence[int] | None) -> list[tuple[str, Tensor]]:
    """Split a problem into 2-D maps of `Part`s.

    Args:
        axes: 1 to 3 axes.
        query: token whose window is shown. If None: the center, or every query in 1-D.

    Returns:
        Titles and maps [rows, columns]. 1-D: one map with one row per query. 2-D: the map. 3-D: one map per plane of
        the first axis that contains keys.
    """
    if len(axes) == 1:
        queries = [query] if query else [(position,) for position in range(axes[0].length)]
        return [("one row per query", torch.stack([parts_of(axes, q) for q in queries]))]
    query = query or center(axes)
    parts = parts_of(axes, query)
    if len(axes) == 2:
        return [(f"query {_join(query)}", parts)]
    depths = sorted({*axis_window(axes[0], query[0])[0], query[0]})
    return [(f"query {_join(query)}, plane {depth}", parts[depth]) for depth in depths]


def _join(values: Iterable[Any], between: str = ", ") -> str:
    return between.join(map(str, values))


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def describe(axes: Sequence[Axis]) -> str:
    """Describe a problem in one line."""
    lengths, *window, causal = zip(*axes, strict=True)
    names = ("kernel_size", "stride", "dilation")
    values = [f"{name} {_join(v if len(set(v)) > 1 else v[:1], 'x')}" for name, v in zip(names, window, strict=True)]
    if any(causal):
        values.append("causal" if all(causal) else f"causal on axis {_join(i for i, c in enumerate(causal) if c)}")
    return f"{_join(lengths, 'x')} tokens, {', '.join(values)}"


def to_text(axes: Sequence[Axis], queries: Sequence[Sequence[int] | None] = (None,)) -> str:
    """Format a problem as maps of `SYMBOLS` with a legend, and the keys and bias entries along each axis.

    Args:
        axes: 1 to 3 axes.
        queries: tokens whose windows are shown; see `planes` for None.
    """
    lines, seen = [describe(axes)], set()
    for query in queries:
        for title, parts in planes(axes, query):
            lines += ["", title, *_grid(parts, first_row=query[0] if query and len(axes) == 1 else 0)]
            seen.update(parts.unique().tolist())
        if query or len(axes) > 1:
            lines += ["", *_axis_lines(axes, query or center(axes))]
    return "\n".join([*lines, "", *(f"{SYMBOLS[part]} {MEANINGS[part]}" for part in sorted(seen, reverse=True))])


def _grid(parts: Tensor, first_row: int) -> list[str]:
    """Format a map with row and column numbers."""
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
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def draw_parts(axes: Any, parts: Tensor, palette: Palette) -> Any:
    """Draw one square per token.

    Args:
        axes: matplotlib axes.
        parts: map of `Part`s [rows, columns].
        palette: colors.

    Returns:
        The matplotlib QuadMesh.
    """
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
    """Add a legend of the `Part`s in `seen` below a figure."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=palette.parts[part], label=MEANINGS[part]) for part in sorted(seen, reverse=True)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=ncols, frameon=False, labelcolor=palette.ink, fontsize=9
    )


def settle_layout(figure: Any) -> None:
    """Repeat the layout of a matplotlib figure until it is stable.

    Matplotlib arranges a figure once per draw. For axes with a fixed aspect ratio one pass is not enough: titles are
    placed outside the figure or on top of each other.
    """
    for _ in range(4):
        figure.draw_without_rendering()


def draw(axes: Sequence[Axis], queries: Sequence[Sequence[int] | None] = (None,), theme: str = "light") -> Any:
    """Draw the `planes` of each query side by side.

    Args:
        axes: 1 to 3 axes.
        queries: tokens whose windows are drawn; see `planes` for None.
        theme: key of `PALETTES`.

    Returns:
        A matplotlib figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("matplotlib is required to draw figures; run: pip install matplotlib") from error
    palette = PALETTES[theme]
    maps = list(itertools.chain.from_iterable(planes(axes, query) for query in queries))
    rows, columns = maps[0][1].shape
    height = min(max(3.4 * rows / columns, 0.5), 8.0)
    figure = Figure((max(3.4 * len(maps), 5.6), height + 1.6), dpi=150, layout="compressed", facecolor=palette.page)
    figure.suptitle(describe(axes), color=palette.ink, fontsize=10)
    for panel, (title, parts) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        draw_parts(panel, parts, palette)
        panel.set_title(title, color=palette.ink, fontsize=9)
    seen = {part for _, parts in maps for part in parts.unique().tolist()}
    add_legend(figure, seen, palette, ncols=min(len(maps), 2))
    settle_layout(figure)
    return figure
