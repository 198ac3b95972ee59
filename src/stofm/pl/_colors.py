"""Colours of categories (kept in ``uns``) and of values: what a name stands for, and how it is drawn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import Colormap, is_color_like, to_hex
from natsort import natsorted

from stofm._edge.colors import distinct_colors
from stofm._edge.counts import NotRawCountsError
from stofm._edge.expression import log_normalised_genes
from stofm._edge.tables import frame_names, label_text, layer_names
from stofm._keys import Obsm, Suffix
from stofm._messages import require_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

#: Name of a colour map, colours in the order of the categories, or by their names.
Palette = str | Colormap | Iterable[Any] | Mapping[Any, Any]
#: End of a colour map: a number, a percentile such as "p99", or None for the extreme.
Limit = float | str | None

#: Cells without a category or value.
NO_VALUE_COLOR: Final = "#d9d9d9"
NO_VALUE_LABEL: Final = "NA"
_PLAIN_COLOR: Final = "#7f8c9b"
#: Said in the colour bar of a gene whose counts were normalised for the picture.
NORMALISED: Final = "log-normalised"


@dataclass(frozen=True)
class Categories:
    """Colour by category: `names` and `colors` in the order of the legend, `codes` (n_obs,).

    A code of -1 is no category. An empty `key` gives all cells one plain colour.
    """

    key: str
    names: tuple[str, ...]
    colors: tuple[str, ...]
    codes: NDArray[np.int64]
    #: Colour and name of cells with a code of -1.
    na_color: str = NO_VALUE_COLOR
    na_name: str = NO_VALUE_LABEL

    def only(self, groups: str | Sequence[str] | None) -> Categories:
        """The same, with cells of other categories than `groups` as those without one."""
        if groups is None or not self.key:
            return self
        chosen = [groups] if isinstance(groups, str) else list(map(str, groups))
        for name in chosen:
            text = f"groups={name!r} is no category of {self.key!r}."
            require_name(name, self.names, text, ValueError)
        is_kept = np.array([*(name in chosen for name in self.names), False])
        return replace(self, codes=np.where(is_kept[self.codes], self.codes, -1), na_name="others")


@dataclass(frozen=True)
class Values:
    """Colour by number: `values` (n_obs,), NaN for none, from `vmin` to `vmax` of a colour map."""

    key: str
    values: NDArray[np.float64]
    vmin: float
    vmax: float
    cmap: str | Colormap
    na_color: str = NO_VALUE_COLOR
    #: What the numbers are, for the colour bar.
    unit: str = ""

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
    groups: str | Sequence[str] | None = None,
    na_color: str = NO_VALUE_COLOR,
) -> list[Categories | Values]:
    """Look up columns of ``obs``, genes, or columns of DataFrames in ``obsm``, and their colours.

    Those of categories are kept.
    """
    na_color = to_hex(na_color)
    names = [keys] if keys is None or isinstance(keys, str) else list(keys)
    columns, units = _read_columns(adata, [key for key in names if key is not None], layer)
    found: list[Categories | Values] = []
    for key in names:
        if key is None:
            codes = np.zeros(adata.n_obs, dtype=np.int64)
            found.append(Categories("", ("",), (_PLAIN_COLOR,), codes))
            continue
        column = columns[key]
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            values = np.asarray(column.to_numpy(dtype=np.float64, na_value=np.nan))
            limits = value_limits(values, vmin, vmax)
            found.append(Values(key, values, *limits, cmap, na_color, units.get(key, "")))
        else:
            color = replace(color_categories(adata, key, palette), na_color=na_color)
            found.append(color.only(groups))
    return found


def _read_columns(
    adata: AnnData, keys: Sequence[str], layer: str | None
) -> tuple[dict[str, pd.Series], dict[str, str]]:
    """What each name stands for, and what its numbers are; genes are read together."""
    found: dict[str, pd.Series] = {key: adata.obs[key] for key in keys if key in adata.obs}
    genes = [key for key in keys if key not in found and key in adata.var_names]
    rest = [key for key in keys if key not in found and key not in genes]
    found |= {key: _read_of_frame(adata, key) for key in rest}
    if not genes:
        return found, {}
    if layer is not None:
        require_name(layer, layer_names(adata), f"There is no layer {layer!r}.")
    else:
        try:
            values = log_normalised_genes(adata, genes)
            return found | dict(values.items()), dict.fromkeys(genes, NORMALISED)
        except NotRawCountsError:
            # They were normalised before, and are drawn as they are.
            pass
    import scanpy as sc

    values = sc.get.obs_df(adata, keys=genes, layer=layer)
    return found | dict(values.items()), dict.fromkeys(genes, layer or "")


def _read_of_frame(adata: AnnData, key: str) -> pd.Series:
    """A column of a DataFrame in ``obsm``, by its true name or as "entry:column"."""
    frames = {
        name: frame_names(adata, name)
        for name in adata.obsm
        if isinstance(adata.obsm[name], pd.DataFrame)
    }
    entry, _, column = key.partition(":")
    if column in frames.get(entry, ()):
        return adata.obsm[entry].iloc[:, frames[entry].index(column)]
    owners = [name for name, columns in frames.items() if key in columns]
    # Spreads of proportions have the names of the types, too.
    owners = [name for name in owners if name != Obsm.DECONVOLUTION_STD] or owners
    if len(owners) > 1:
        ways = " or ".join(f"color='{name}:{key}'" for name in owners)
        raise ValueError(f"Several DataFrames in obsm have a column {key!r}: pass {ways}.")
    columns = [name for names in frames.values() for name in names]
    text = f"{key!r} is neither a column of obs nor a gene of var_names"
    text += ", nor a column of a DataFrame in obsm." if frames else "."
    require_name(key, [*adata.obs.columns, *adata.var_names, *columns], text)
    return adata.obsm[owners[0]].iloc[:, frames[owners[0]].index(key)]


def read_frame(
    adata: AnnData, key: str, names: str | Sequence[str] | None, call: str, what: str
) -> pd.DataFrame:
    """Read columns of a DataFrame in ``obsm``, by their true names; None for all."""
    text = f"There is no obsm[{key!r}]: st.tl.{call} writes it."
    require_name(key, adata.obsm, text)
    stored = adata.obsm[key]
    if not isinstance(stored, pd.DataFrame):
        raise TypeError(
            f"obsm[{key!r}] must be a DataFrame with a column for each {what}, found "
            f"{type(stored).__name__}."
        )
    known = {name: place for place, name in enumerate(frame_names(adata, key))}
    chosen = list(known) if names is None else [names] if isinstance(names, str) else list(names)
    for name in chosen:
        require_name(name, known, f"obsm[{key!r}] has no {what} {name!r}.")
    if not chosen:
        raise ValueError(f"There are no {what}s to draw; obsm[{key!r}] has {list(known)[:10]}.")
    columns = stored.iloc[:, [known[name] for name in chosen]]
    return columns.astype(np.float64).set_axis(chosen, axis=1)


def color_categories(adata: AnnData, key: str, palette: Palette | None = None) -> Categories:
    """Colours of a column's categories, which are kept in ``uns``."""
    column = category_names(adata.obs[key])
    names = tuple(column.cat.categories)
    colors = choose_colors(adata, key, names, palette)
    # Writing into a view would copy it.
    if not adata.is_view:
        adata.uns[key + Suffix.COLORS] = list(colors)
    return Categories(key, names, colors, column.cat.codes.to_numpy(dtype=np.int64))


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
    """Return a colour for each name: from `palette`, else those stored for `key`, else thirty that differ."""
    n = len(names)
    if palette is None:
        return stored_colors(adata, key, n) or distinct_colors(n)
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
