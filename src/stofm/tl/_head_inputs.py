"""What heads read: tables of cells, the slices in them, and representations by a known model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from stofm._anndata import resolve_table
from stofm._coordinates import read_coordinates
from stofm._counts import read_counts
from stofm._keys import Obsm
from stofm._slices import Slices, read_slices
from stofm.tl._embeddings import (
    MADE_BY_EMBED,
    EmbeddingSource,
    Origin,
    describe_origin,
    origin_of,
    places_entry,
    same_origin,
    slices_column,
    unchanged_on_error,
)
from stofm.tl._encode_cells import load_model
from stofm.tl._representations import read_representation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.nn import Stofm

DEFAULT_REP = (Obsm.X_CELL, Obsm.X)

#: What a network of a head reads.
Source = Literal["embedding", "neighborhood", "expression", "expression neighborhood"]

#: Components that are averaged over neighbours: the others are noise for the most part.
_N_AVERAGED: Final = 50


@dataclass(frozen=True, eq=False)
class Sections:
    """Tables whose cells are taken one after another, and the slices in them.

    Attributes
    ----------
    tables
        The AnnData objects.
    keys
        Of the tables in the dict that was given; None for a list, or for a single one.
    is_single
        Whether a single one was given.
    slices
        Names and rows of the slices; rows count through all tables.
    """

    tables: tuple[AnnData, ...]
    keys: tuple[str, ...] | None
    is_single: bool
    slices: Slices

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return sum(table.n_obs for table in self.tables)

    @property
    def places(self) -> list[slice]:
        """Rows of each table."""
        ends = np.cumsum([table.n_obs for table in self.tables]).tolist()
        return [slice(end - t.n_obs, end) for t, end in zip(self.tables, ends, strict=True)]

    def copied(self) -> Sections:
        """The same with copies of the tables."""
        tables = tuple(table.copy() for table in self.tables)
        return Sections(tables, self.keys, self.is_single, self.slices)

    def as_given(self) -> Any:
        """The tables in the form in which they were given: one, a list or a dict."""
        if self.is_single:
            return self.tables[0]
        if self.keys is None:
            return list(self.tables)
        return dict(zip(self.keys, self.tables, strict=True))

    def of_tables(self, numbers: Sequence[int]) -> tuple[Sections, NDArray[np.int64]]:
        """Some of the tables, and the rows of their cells."""
        places = self.places
        rows = np.concatenate([np.arange(places[k].start, places[k].stop) for k in numbers])
        slices = Slices(names=[], rows=[])
        for name, own in zip(self.slices.names, self.slices.rows, strict=True):
            if np.isin(own, rows).all():
                slices.names.append(name)
                slices.rows.append(np.searchsorted(rows, own))
        tables = tuple(self.tables[k] for k in numbers)
        return Sections(tables, None, self.is_single, slices), rows

    def coordinates(self, spatial_key: str) -> NDArray[np.float64]:
        """Places of all cells, (n_obs, 2): as asked for, or those that tables were embedded with."""
        return np.concatenate(
            [read_coordinates(table, places_entry(table, spatial_key)) for table in self.tables]
        )

    def has_coordinates(self, spatial_key: str) -> bool:
        """Whether all tables have places."""
        return all(places_entry(table, spatial_key) in table.obsm for table in self.tables)


def resolve_slices(
    data: Any,
    library_key: str | None = None,
    *,
    spatial_key: str = Obsm.SPATIAL,
    table_key: str | None = None,
    copy: bool = False,
) -> Sections:
    """Take an AnnData, a SpatialData, or a list or dict of them, and tell slices apart.

    Parameters
    ----------
    data
        The data. Those of a list or dict are different slices.
    library_key
        Column of ``obs`` that names each cell's slice; by default the one that a table was embedded
        with.
    spatial_key
        Entry of ``obsm`` with coordinates; they tell overlapping slices without `library_key`.
    table_key
        Table of SpatialData.
    copy
        Whether copies of the tables will be made later on.

    Raises
    ------
    KeyError
        There is no such table or column.
    TypeError
        `data` is something else.
    ValueError
        There are no cells, an AnnData occurs twice, or slices can't be told apart.
    """
    is_dict, is_list = isinstance(data, dict), isinstance(data, list | tuple)
    given = list(data.values()) if is_dict else list(data) if is_list else [data]
    tables = tuple(resolve_table(one, table_key, copy=copy) for one in given)
    if not tables or len({id(table) for table in tables}) < len(tables):
        msg = f"Expected different AnnData, found {len(tables)} of which some are the same."
        raise ValueError(msg if tables else "The list of AnnData is empty.")
    names = [str(k) for k in (data if is_dict else range(len(tables)))]
    slices = Slices(names=[], rows=[])
    start = 0
    for name, table in zip(names, tables, strict=True):
        own = _read_slices(table, library_key, spatial_key)
        prefix = name if is_dict or is_list else ""
        slices.names.extend(":".join(filter(None, (prefix, part))) for part in own.names)
        slices.rows.extend(rows + start for rows in own.rows)
        start += table.n_obs
    keys = tuple(names) if is_dict else None
    return Sections(tables, keys, not (is_dict or is_list), slices)


def _read_slices(adata: AnnData, library_key: str | None, spatial_key: str) -> Slices:
    if adata.n_obs == 0:
        msg = "An AnnData has no cells; nothing to do. Was it filtered too hard?"
        raise ValueError(msg)
    return read_slices(adata, slices_column(adata, library_key), places_entry(adata, spatial_key))


@dataclass(frozen=True, eq=False)
class Inputs:
    """Representations of cells.

    Attributes
    ----------
    features
        float32 (n, d), the representations side by side.
    use_rep
        Their names.
    widths
        Columns of each.
    origin
        By name, which model they are by.
    expression
        float32 (n, k) components of the cells' expression; None if they are not read.
    neighborhood
        float32 (n, d) means over the neighbours of each cell, NaN where its neighbours are not
        known; None if they are not read.
    expression_neighborhood
        The same of the first components, (n, m); None if one or the other is not read.
    n_neighbors
        Over how many neighbours.
    """

    features: NDArray[np.float32]
    use_rep: tuple[str, ...]
    widths: tuple[int, ...]
    origin: Origin
    expression: NDArray[np.float32] | None = None
    neighborhood: NDArray[np.float32] | None = None
    expression_neighborhood: NDArray[np.float32] | None = None
    n_neighbors: int = 0

    @property
    def sources(self) -> tuple[Source, ...]:
        """What there is to read, the embedding first."""
        return tuple(source for source in get_args(Source) if self._parts(source))

    def of(self, source: Source) -> NDArray[np.float32] | None:
        """What a network reads of the cells; None where they lack it."""
        parts = self._parts(source)
        if len(parts) < 2:
            return parts[0] if parts else None
        return np.concatenate(parts, axis=1)

    def knows(self, source: Source) -> NDArray[np.bool_]:
        """(n,) whether a cell has all that a network reads."""
        parts = self._parts(source)
        known = np.full(len(self.features), bool(parts))
        for part in parts:
            known &= np.isfinite(part[:, 0])
        return known

    def widths_of(self, source: Source) -> tuple[int, ...]:
        """Columns of each representation in what :meth:`of` returns."""
        if source == "embedding":
            return self.widths
        if source == "neighborhood":
            return (*self.averaged[1], *self.widths)
        return tuple(part.shape[1] for part in self._parts(source))

    @property
    def averaged(self) -> tuple[NDArray[np.float32], tuple[int, ...]]:
        """What is averaged over neighbours, and its widths.

        ``X_stofm_cell`` if that is read, which is of the cells alone, else all that is read.
        """
        if Obsm.X_CELL not in self.use_rep:
            return self.features, self.widths
        number = self.use_rep.index(Obsm.X_CELL)
        start, width = sum(self.widths[:number]), self.widths[number]
        return self.features[:, start : start + width], (width,)

    def _parts(self, source: Source) -> tuple[NDArray[np.float32], ...]:
        around = self.expression_neighborhood
        parts: dict[Source, tuple[NDArray[np.float32] | None, ...]] = {
            "embedding": (self.features,),
            "neighborhood": (self.neighborhood, self.features),
            "expression": (self.expression,),
            "expression neighborhood": (around, self.first_components),
        }
        own = parts[source]
        return tuple(part for part in own if part is not None) if own[0] is not None else ()

    @property
    def first_components(self) -> NDArray[np.float32] | None:
        """Components that are averaged over neighbours; None if none are read."""
        return None if self.expression is None else self.expression[:, :_N_AVERAGED]

    def neighbors_of(self, reads: Iterable[Source]) -> int:
        """Over how many neighbours the means are that are read there; 0 if none are."""
        return self.n_neighbors if any("neighborhood" in source for source in reads) else 0

    def take(self, rows: NDArray[np.int64]) -> Inputs:
        """The same of some cells."""
        beside: dict[str, Any] = {
            name: None if (read := getattr(self, name)) is None else read[rows]
            for name in ("expression", "neighborhood", "expression_neighborhood")
        }
        return replace(self, features=self.features[rows], **beside)


def read_inputs(
    sections: Sections,
    *,
    use_rep: str | Sequence[str] = DEFAULT_REP,
    model: Stofm | str | Path | None = None,
    expected: Origin | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    device: str | torch.device = "auto",
    show_progress_bar: bool = True,
) -> Inputs:
    """Read representations, and embed cells where those of :func:`stofm.tl.embed` are missing.

    Embeddings that are missing are written to the tables, as `embed` does, to all or, if one can't
    be embedded, to none. Those that don't fit stay as they are: with a given model the cells are
    embedded aside. These don't fit: embeddings by another model, and ones that were made with
    another layer or other slices than those asked for. Counts that were changed since are not
    noticed.

    Parameters
    ----------
    sections
        The cells.
    use_rep
        Names of entries of ``obsm``.
    model
        Whose embeddings to read; None for whatever is there, or stofm-mini if nothing is.
    expected
        Origin of what a head was fitted to; other models' embeddings are refused.
    library_key, layer, spatial_key, device, show_progress_bar
        As in :func:`stofm.tl.embed`.

    Raises
    ------
    KeyError
        `layer` is missing, or a representation that `embed` does not make.
    ValueError
        Embeddings don't fit and no model is given; they are not recorded, by several models, not
        finite, or differ in width.
    """
    reps = checked_reps(use_rep)
    parts = {
        rep: [read_representation(table, rep) for table in sections.tables]
        for rep in reps
        if rep not in MADE_BY_EMBED
    }
    if layer is not None:
        for table in sections.tables:
            read_counts(table, layer=layer)
    options = {
        "library_key": library_key,
        "layer": layer,
        "spatial_key": spatial_key,
        "device": device,
        "show_progress_bar": show_progress_bar,
    }
    source = EmbeddingSource(None if model is None else load_model(model), expected, options)
    with unchanged_on_error(sections.tables):
        tables = [source.with_embeddings(table, reps) for table in sections.tables]
    origin = {}
    for rep in reps:
        own = tables if rep in MADE_BY_EMBED else sections.tables
        parts.setdefault(rep, [read_representation(table, rep) for table in own])
        origin[rep] = _common_origin(own, rep)
    widths = tuple(_common_width(parts[rep], rep) for rep in reps)
    features = np.concatenate([np.concatenate(parts[rep]) for rep in reps], axis=1)
    return Inputs(features, reps, widths, origin)


def checked_reps(use_rep: str | Sequence[str]) -> tuple[str, ...]:
    """Names of representations as a tuple.

    Raises
    ------
    ValueError
        There are none, or one occurs twice.
    """
    reps = (use_rep,) if isinstance(use_rep, str) else tuple(use_rep)
    if not reps or len(set(reps)) < len(reps):
        msg = f"use_rep must name one or several entries of obsm, each once; found {use_rep!r}."
        raise ValueError(msg)
    return reps


def _common_origin(tables: Sequence[AnnData], rep: str) -> dict[str, str]:
    found = [origin_of(table, rep) for table in tables]
    for k, other in enumerate(found):
        if not same_origin(other, found[0]):
            msg = (
                f"obsm[{rep!r}] is by {describe_origin(found[0])} in the first AnnData and by "
                f"{describe_origin(other)} in number {k + 1}. Embed all with one model, or pass it "
                "as `model`."
            )
            raise ValueError(msg)
    return found[0]


def _common_width(parts: Sequence[NDArray[np.float32]], rep: str) -> int:
    found = {int(part.shape[1]) for part in parts}
    if len(found) > 1:
        msg = f"obsm[{rep!r}] has {sorted(found)} columns in different AnnData; make it anew."
        raise ValueError(msg)
    return found.pop()
