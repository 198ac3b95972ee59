"""Slices that heads read: of one AnnData, or of a list or dict of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from stofm._edge.coordinates import read_coordinates
from stofm._edge.slices import read_slices
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm._messages import naming
from stofm.heads.embeddings import places_entry, slices_column

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.slices import Slices
    from stofm.heads.options import Request

_Read = TypeVar("_Read")


@dataclass(frozen=True, eq=False)
class SliceTables:
    """Tables whose cells are taken one after another, and the slices in them.

    Attributes
    ----------
    tables
        The AnnData objects.
    names, rows
        Of the slices; rows count through all tables.
    called
        Of each table, what messages start with and how the user writes it.
    keys
        Of the tables in the dict that was given; None for a list, or for a single one.
    is_single
        Whether a single one was given.
    layer_argument
        The user's argument for the layer with counts.
    """

    tables: tuple[AnnData, ...]
    names: list[str]
    rows: list[NDArray[np.int64]]
    called: tuple[tuple[str, str], ...]
    keys: tuple[str, ...] | None = None
    is_single: bool = False
    layer_argument: str = "layer"

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return sum(table.n_obs for table in self.tables)

    @property
    def places(self) -> list[slice]:
        """Rows of each table."""
        ends = np.cumsum([table.n_obs for table in self.tables]).tolist()
        return [slice(end - t.n_obs, end) for t, end in zip(self.tables, ends, strict=True)]

    def naming(self, number: int) -> AbstractContextManager[None]:
        """Within it, messages speak of one of the tables as the user does."""
        where, written = self.called[number]
        return naming(where, adata=written, layer=self.layer_argument)

    def each(self, read: Callable[[AnnData], _Read]) -> list[_Read]:
        """What a function gives of each table; its messages name that one."""
        found = []
        for k, table in enumerate(self.tables):
            with self.naming(k):
                found.append(read(table))
        return found

    def copied(self) -> SliceTables:
        """The same with copies of the tables."""
        return replace(self, tables=tuple(table.copy() for table in self.tables))

    def as_given(self) -> Any:
        """The tables in the form in which they were given: one, a list or a dict."""
        if self.is_single:
            return self.tables[0]
        tables = list(self.tables)
        return tables if self.keys is None else dict(zip(self.keys, tables, strict=True))

    def tables_of(self, rows: NDArray[np.int64]) -> list[int]:
        """Numbers of the tables that have some of the cells."""
        ends = np.array([place.stop for place in self.places])
        found: list[int] = np.unique(np.searchsorted(ends, rows, side="right")).tolist()
        return found

    def coordinates(self, spatial_key: str) -> NDArray[np.float64]:
        """Places of all cells, (n_obs, 2): as asked for, or those that tables were embedded with."""
        return np.concatenate(
            self.each(lambda table: read_coordinates(table, places_entry(table, spatial_key)))
        )

    def has_coordinates(self, spatial_key: str, numbers: list[int] | None = None) -> bool:
        """Whether all tables, or some, have places."""
        tables = self.tables if numbers is None else [self.tables[k] for k in numbers]
        return all(places_entry(table, spatial_key) in table.obsm for table in tables)


def resolve_slices(
    data: Any,
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    table_key: str | None = None,
    *,
    copy: bool = False,
    role: str = "",
) -> SliceTables:
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
    role
        ``"query"`` or ``"reference"`` where there are two of its kind; for messages.
    """
    is_single = not isinstance(data, dict | list | tuple)
    given = data if isinstance(data, dict) else dict(enumerate([data] if is_single else data))
    tables = tuple(resolve_table(one, table_key, copy=copy) for one in given.values())
    if not tables or len({id(table) for table in tables}) < len(tables):
        msg = f"Expected different AnnData, found {len(tables)} of which some are the same."
        raise ValueError(msg if tables else "The list of AnnData is empty.")
    is_reference = role == "reference"
    called = [(f"{'reference' if is_reference else 'data'}[{key!r}]",) * 2 for key in given]
    if is_single:
        called = [(f"the {role}" if role else "", role if is_reference else "adata")]
    found = SliceTables(
        tables,
        [],
        [],
        tuple(called),
        keys=tuple(map(str, given)) if isinstance(data, dict) else None,
        is_single=is_single,
        layer_argument="reference_layer" if is_reference else "layer",
    )
    parts = found.each(lambda table: _read_slices(table, library_key, spatial_key))
    for key, place, own in zip(given, found.places, parts, strict=True):
        prefix = "" if is_single else str(key)
        found.names.extend(":".join(filter(None, (prefix, name))) for name in own.names)
        found.rows.extend(rows + place.start for rows in own.rows)
    return found


def resolve_reference(
    query: SliceTables, reference: Any, request: Request, table_key: str | None
) -> tuple[SliceTables, Request, Request]:
    """Slices to learn from, and how to read the query and these.

    A reference may do without the query's column of slices. A layer that one side alone has is read
    there.
    """
    library_key, layer = request.library_key, request.layer
    if library_key is not None:
        plain = reference.values() if isinstance(reference, dict) else reference
        tables = plain if isinstance(plain, list | tuple) else [plain]
        if not any(library_key in getattr(table, "obs", {}) for table in tables):
            library_key = None
    with naming("the reference", adata="reference"):
        key = request.spatial_key
        found = resolve_slices(reference, library_key, key, table_key, role="reference")
    theirs = request.options.reference_layer
    if theirs is None and layer is not None:
        in_query, in_reference = (
            any(layer in t.layers for t in one.tables) for one in (query, found)
        )
        theirs = layer if in_reference else None
        layer = layer if in_query or not in_reference else None
    own = replace(request, layer=theirs, library_key=library_key)
    return found, replace(request, layer=layer), own


def _read_slices(adata: AnnData, library_key: str | None, spatial_key: str) -> Slices:
    if adata.n_obs == 0:
        raise ValueError("An AnnData has no cells; nothing to do. Was it filtered too hard?")
    return read_slices(adata, slices_column(adata, library_key), places_entry(adata, spatial_key))
