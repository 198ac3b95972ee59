"""Colours of categories: thirty that can be told apart, and those kept in ``uns`` as scanpy keeps them."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Final

from stofm._edge.tables import label_text
from stofm._keys import Suffix

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anndata import AnnData

#: Any two differ by 7.5 and more (CIEDE2000), also as colour-blind readers see them (Machado et al.
#: 2009, full severity), and from the greys of cells without a class; the first few differ by more.
PALETTE: Final = (
    "#629dff", "#eb4e62", "#c4b100", "#4e7614", "#003bff", "#893b76",
    "#3b8989", "#890000", "#8962ff", "#d889c4", "#4ec489", "#b18927",
    "#b1d876", "#b1144e", "#14009d", "#d81400", "#eb8962", "#8900c4",
    "#76629d", "#27ff00", "#3b274e", "#9d6276", "#89764e", "#4e2727",
    "#9dd8eb", "#00624e", "#b1b1eb", "#89b19d", "#ebd8b1", "#3b4e27",
)  # fmt: skip
#: Cells without a supported class.
UNKNOWN_COLOR: Final = "#bdbdbd"
#: Colours as scanpy stores them: hexadecimal numbers or names.
_COLOR: Final = re.compile(r"#[0-9a-fA-F]{6}([0-9a-fA-F]{2})?|[A-Za-z: ]+")


def distinct_colors(n_colors: int) -> tuple[str, ...]:
    """Return the thirty colours, then scanpy's hundred; beyond these, colours repeat."""
    if n_colors <= len(PALETTE):
        return PALETTE[:n_colors]
    from scanpy.plotting.palettes import default_102

    more = itertools.cycle([*PALETTE, *(color.lower()[:7] for color in default_102)])
    return tuple(itertools.islice(more, n_colors))


def read_colors(adata: AnnData, key: str) -> dict[str, str]:
    """Colours in ``uns`` for the categories of a column, by name; none if they don't fit."""
    import pandas as pd

    stored = [str(color) for color in adata.uns.get(key + Suffix.COLORS, ())]
    column = adata.obs.get(key)
    if column is None or not isinstance(column.dtype, pd.CategoricalDtype):
        return {}
    names = label_text(pd.Series(column.cat.categories)).tolist()
    fits = len(stored) >= len(names) and all(map(_COLOR.fullmatch, stored))
    return dict(zip(names, stored, strict=False)) if fits else {}


def colors_of(tables: Iterable[AnnData], key: str) -> dict[str, str]:
    """Colours in several tables for the categories of a column; the first table's are used."""
    found: dict[str, str] = {}
    for table in tables:
        found = {**read_colors(table, key), **found}
    return found


def fill_colors(names: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """A colour for each name: the known one, or one that is still unused."""
    taken = {color[:7].lower() for color in known.values()}
    free = (color for color in distinct_colors(len(names) + len(taken)) if color not in taken)
    return [known[name] if name in known else next(free) for name in names]
