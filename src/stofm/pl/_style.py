"""What all pictures share: axes in inches, colours of categories (kept in ``uns``) and of values."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, is_color_like, to_hex
from natsort import natsorted

from stofm._edge.tables import label_text, layer_names
from stofm._files import local

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

TITLE_SIZE, FONT_SIZE = 9.0, 8.0
_GAP_INCHES: Final = 0.18
#: Backends that write files and cannot show anything.
_FILE_BACKENDS: Final = frozenset({"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"})

#: Name of a colour map, colours in the order of the categories, or by their names.
Palette = str | Colormap | Iterable[Any] | Mapping[Any, Any]
#: End of a colour map: a number, a percentile such as "p99", or None for the extreme.
Limit = float | str | None

#: Cells without a category or value.
NO_VALUE_COLOR: Final = "#d9d9d9"
NO_VALUE_LABEL: Final = "NA"
_PLAIN_COLOR: Final = "#7f8c9b"


def make_axes(
    ax: Axes | Sequence[Axes] | None,
    n_panels: int,
    size: tuple[float, float],
    *,
    what: str,
    ncols: int = 1,
) -> tuple[list[Axes], bool]:
    """Return the axes to draw into, and whether they are new: of that size, inches, not yet placed."""
    if n_panels == 0:
        raise ValueError(f"There is nothing to draw: {what}.")
    if ncols < 1:
        raise ValueError(f"ncols must be at least 1, found {ncols}.")
    if ax is None:
        figure = plt.figure()
        # Labels keep axes apart that lie at one place until they are laid out.
        made = [figure.add_axes((0, 0, 1, 1), label=f"panel {i}") for i in range(n_panels)]
        for one in made:
            set_inches(one, *size)
        return made, True
    # Of plt.subplots too, which gives them in rows.
    given = np.ravel(np.asarray(ax, dtype=object)).tolist()
    if others := [type(one).__name__ for one in given if not isinstance(one, Axes)]:
        raise TypeError(f"ax must be Axes or several of them, found {others[0]}.")
    if len(given) != n_panels:
        raise ValueError(f"{n_panels} panels are needed ({what}), but ax holds {len(given)}.")
    return given, False


def root_figure(ax: Axes) -> Figure:
    """The figure of `ax`, also where `ax` lies in a part of it."""
    return ax.figure.canvas.figure


def set_inches(ax: Axes, width: float, height: float) -> None:
    """Give axes that are not yet placed a size."""
    figure_width, figure_height = root_figure(ax).get_size_inches()
    ax.set_position((0.0, 0.0, width / figure_width, height / figure_height))


def style_axes(ax: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Give a chart its title, labels, small ticks and two spines."""
    ax.set_title(title, fontsize=TITLE_SIZE, pad=4.0)
    ax.set_xlabel(x, fontsize=FONT_SIZE)
    ax.set_ylabel(y, fontsize=FONT_SIZE)
    ax.tick_params(labelsize=FONT_SIZE - 1.0)
    ax.spines[["top", "right"]].set_visible(False)


def in_rows(axes: Sequence[Axes], ncols: int) -> list[Sequence[Axes]]:
    """Axes side by side, `ncols` in a row."""
    return [axes[start : start + ncols] for start in range(0, len(axes), ncols)]


def arrange(*grids: Sequence[Sequence[Axes]]) -> None:
    """Place rows of axes, and size the figure so that labels and legends have room.

    The axes keep their size. In a grid columns are aligned; grids lie below each other.
    """
    figure = root_figure(grids[0][0][0])
    places: list[tuple[Axes, float, float, NDArray[np.float64]]] = []
    width = depth = 0.0
    for rows in grids:
        rooms = np.zeros((len(rows), max(map(len, rows)), 3, 2))
        for room, row in zip(rooms, rows, strict=True):
            room[: len(row)] = [_room(ax) for ax in row]
        across, down = rooms[..., 0].max(axis=0), rooms[..., 1].max(axis=1)
        lefts = np.cumsum(across.sum(axis=1)) - across[:, 1:].sum(axis=1)
        tops = depth + np.cumsum(down.sum(axis=1)) - down[:, 1:].sum(axis=1)
        for top, room, row in zip(tops, rooms, rows, strict=True):
            places += zip(row, lefts, [top] * len(row), room[:, 1], strict=False)
        width, depth = max(width, across.sum()), depth + down.sum()
    figure.set_size_inches(width, depth)
    for ax, left, top, (own_width, own_height) in places:
        bottom = depth - top - own_height
        ax.set_position((left / width, bottom / depth, own_width / width, own_height / depth))


def _room(ax: Axes) -> NDArray[np.float64]:
    """Inches (3, 2), across and down: before the axes, of the axes, and after them."""
    figure = root_figure(ax)
    size = ax.get_position(original=True).size * figure.get_size_inches()
    box = ax.get_tightbbox()
    assert box is not None
    left, bottom, right, top = np.array(box.extents) / figure.dpi
    rooms = np.array([[-left, top - size[1]], size, [right - size[0], -bottom]])
    rooms[[0, 2]] = np.maximum(rooms[[0, 2]], 0.0) + _GAP_INCHES / 2
    return rooms


def finish(axes: list[Axes], *, show: bool | None, save: str | Path | None) -> Axes | list[Axes]:
    """Save and show the figure as asked; return the axes, a single one without its list."""
    if save is not None:
        try:
            root_figure(axes[0]).savefig(local(save), dpi=150, bbox_inches="tight")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"There is no folder {local(save).parent} for save={str(save)!r}; make it first."
            ) from error
    if show is None:
        from scanpy import settings

        show = bool(settings.autoshow) and mpl.get_backend().lower() not in _FILE_BACKENDS
    if show:
        plt.show()
    return axes[0] if len(axes) == 1 else axes


@dataclass(frozen=True)
class Categories:
    """Colour by category: `names` and `colors` in the order of the legend, `codes` (n_obs,).

    A code of -1 is no category. An empty `key` gives all cells one plain colour.
    """

    key: str
    names: tuple[str, ...]
    colors: tuple[str, ...]
    codes: NDArray[np.int64]


@dataclass(frozen=True)
class Values:
    """Colour by number: `values` (n_obs,), NaN for none, from `vmin` to `vmax` of a colour map."""

    key: str
    values: NDArray[np.float64]
    vmin: float
    vmax: float
    cmap: str | Colormap

    def __post_init__(self) -> None:
        find_colormap(self.cmap, "cmap")


def resolve_colors(
    adata: AnnData,
    keys: str | Iterable[str] | None,
    *,
    layer: str | None = None,
    palette: Palette | None = None,
    cmap: str | Colormap = "viridis",
    vmin: Limit = None,
    vmax: Limit = None,
) -> list[Categories | Values]:
    """Look up columns of ``obs`` or genes, and the colours they give. Those of categories are kept."""
    found: list[Categories | Values] = []
    for key in [keys] if keys is None or isinstance(keys, str) else keys:
        if key is None:
            codes = np.zeros(adata.n_obs, dtype=np.int64)
            found.append(Categories("", ("",), (_PLAIN_COLOR,), codes))
            continue
        column = adata.obs[key] if key in adata.obs else _read_gene(adata, key, layer)
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            values = np.asarray(column.to_numpy(dtype=np.float64, na_value=np.nan))
            found.append(Values(key, values, *value_limits(values, vmin, vmax), cmap))
        else:
            found.append(color_categories(adata, key, palette))
    return found


def color_categories(adata: AnnData, key: str, palette: Palette | None = None) -> Categories:
    """Colours of a column's categories, which are kept in ``uns``."""
    column = category_names(adata.obs[key])
    names = tuple(column.cat.categories)
    colors = choose_colors(adata, key, names, palette)
    # Writing into a view would copy it.
    if not adata.is_view:
        adata.uns[f"{key}_colors"] = list(colors)
    return Categories(key, names, colors, column.cat.codes.to_numpy(dtype=np.int64))


def _read_gene(adata: AnnData, key: str, layer: str | None) -> pd.Series:
    text = f"{key!r} is neither a column of obs nor a gene of var_names."
    require_name(key, [*adata.obs.columns, *adata.var_names], text)
    if layer is not None:
        require_name(layer, layer_names(adata), f"There is no layer {layer!r}.")
    import scanpy as sc

    return sc.get.obs_df(adata, keys=[key], layer=layer)[key]


def require_name(
    name: str, known: Iterable[object], text: str, error: type[Exception] = KeyError
) -> None:
    """Refuse a name that is not known; the message ends with the nearest ones."""
    if name not in known:
        raise error(text + nearest_names(name, known))


def nearest_names(name: str, names: Iterable[object]) -> str:
    """Return a hint for an error message: the names most like `name`, or all if they are few."""
    known = [str(other) for other in names]
    lower = {other.lower(): other for other in reversed(known)}
    near = difflib.get_close_matches(str(name).lower(), list(lower), n=3, cutoff=0.5)
    if near:
        return f" Nearest: {[lower[other] for other in near]}."
    return f" There are: {known[:10]}{' ...' if len(known) > 10 else ''}."


def category_names(column: pd.Series) -> pd.Series:
    """Return `column` as a categorical of strings, in its own order or in natural order."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.rename_categories(label_text(pd.Series(column.cat.categories)).tolist())
    text = pd.Series(label_text(column), index=column.index, name=column.name)
    names = natsorted(set(text[column.notna()]))
    return text.where(column.notna(), None).astype(pd.CategoricalDtype(names))


def value_limits(values: NDArray[np.float64], vmin: Limit, vmax: Limit) -> tuple[float, float]:
    """Return the ends of the colour map."""
    if isinstance(vmin, int | float) and isinstance(vmax, int | float) and vmin > vmax:
        raise ValueError(f"vmin={vmin:g} is above vmax={vmax:g}.")
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return 0.0, 1.0
    low = _limit("p0" if vmin is None else vmin, finite)
    high = _limit("p100" if vmax is None else vmax, finite)
    # A gene that few cells express: the percentile lies on the background.
    if high <= low and not isinstance(vmax, int | float):
        high = float(finite.max())
    return low, high if high > low else low + 1.0


def _limit(limit: float | str, values: NDArray[np.float64]) -> float:
    if not isinstance(limit, str):
        return float(limit)
    match = re.fullmatch(r"p(\d+(?:\.\d+)?)", limit)
    if match is None or float(match[1]) > 100.0:
        raise ValueError(
            f"vmin and vmax are numbers, or percentiles such as 'p99'; found {limit!r}."
        )
    return float(np.percentile(values, float(match[1])))


def find_colormap(name: str | Colormap, argument: str) -> Colormap:
    """Return the colour map of this name."""
    if isinstance(name, Colormap):
        return name
    text = f"{argument}={name!r} is not a colour map of matplotlib."
    require_name(name, mpl.colormaps, text, ValueError)
    return mpl.colormaps[name]


def choose_colors(
    adata: AnnData, key: str, names: tuple[str, ...], palette: Palette | None
) -> tuple[str, ...]:
    """Return a colour for each name: from `palette`, else those stored for `key`, else scanpy's."""
    n = len(names)
    if palette is None:
        return stored_colors(adata, key, n) or default_colors(n)
    if isinstance(palette, Mapping):
        keys = label_text(pd.Series(list(palette), dtype=object))
        by_name = dict(zip(keys, palette.values(), strict=True))
        if missing := [name for name in names if name not in by_name]:
            raise ValueError(
                f"The palette has no colour for {missing[:5]}; give one for each category."
            )
        return tuple(to_hex(by_name[name]) for name in names)
    if isinstance(palette, str | Colormap):
        # Spread over the map as scanpy does; a map of fewer colours gives some of them twice.
        spread = find_colormap(palette, "palette")(np.linspace(0, 1, n))
        palette = dict.fromkeys(map(to_hex, spread))
    # A cycler gives dictionaries.
    colors = [to_hex(one["color"] if isinstance(one, Mapping) else one) for one in palette]
    if len(colors) < n:
        raise ValueError(
            f"The palette has {len(colors)} colours for {n} categories; palette=None has enough."
        )
    return tuple(colors[:n])


def stored_colors(adata: AnnData, key: str, n_colors: int) -> tuple[str, ...]:
    """Return the colours in ``uns[f"{key}_colors"]``; none if they are too few or no colours."""
    stored = [str(color) for color in adata.uns.get(f"{key}_colors", [])]
    usable = len(stored) >= n_colors and all(is_color_like(color) for color in stored)
    return tuple(stored[:n_colors]) if usable else ()


def default_colors(n_colors: int) -> tuple[str, ...]:
    """Return scanpy's twenty colours, then its hundred; those of more categories are used again."""
    from scanpy.plotting.palettes import default_20, default_102

    colors = itertools.cycle([*default_20, *default_102])
    return tuple(to_hex(color) for color in itertools.islice(colors, n_colors))
