"""What heads read of cells: representations by a known model, and what is beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from stofm._edge.coordinates import read_coordinates
from stofm._edge.counts import read_counts
from stofm._edge.records import all_or_nothing
from stofm._edge.tables import read_representation
from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import warn
from stofm.heads.embeddings import (
    MADE_BY_EMBED,
    EmbeddingSource,
    Origin,
    describe_origin,
    origin_of,
    places_entry,
    same_origin,
)
from stofm.heads.options import DEFAULT_REP, checked_reps
from stofm.nn.model import load_model
from stofm.spatial.neighbor_graph import neighbor_means

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.options import FitOptions, Reading
    from stofm.heads.sections import Sections
    from stofm.nn import Stofm

#: What a network of a head reads.
Source = Literal["embedding", "neighborhood", "expression", "expression neighborhood"]

#: Components that are averaged over neighbours: the others are noise for the most part.
_N_AVERAGED: Final = 50
#: Neighbours over which embeddings of a model are averaged.
N_NEIGHBORS: Final = 10


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
    reading: Reading,
    *,
    use_rep: str | Sequence[str] = DEFAULT_REP,
    model: Stofm | str | Path | None = None,
    expected: Origin | None = None,
) -> Inputs:
    """Read representations, and embed cells where those of :func:`stofm.tl.embed` are missing.

    Embeddings that are missing are written to the tables, as `embed` does, to all or, if one can't
    be embedded, to none. Those that don't fit stay as they are: with a given model the cells are
    embedded aside. These don't fit: embeddings by another model, ones that were made with another
    layer or other slices than those asked for, and ones of other counts or coordinates than there
    are now, see :func:`~stofm._edge.staleness.stale_reason`.

    Parameters
    ----------
    use_rep
        Names of entries of ``obsm``.
    model
        Whose embeddings to read; None for whatever is there, or stofm-mini if nothing is.
    expected
        Origin of what a head was fitted to; other models' embeddings are refused.
    """
    reps = checked_reps(use_rep)
    parts = {rep: read_each(sections, rep) for rep in reps if rep not in MADE_BY_EMBED}
    if reading.layer is not None:
        sections.each(lambda table: read_counts(table, layer=reading.layer))
    source = EmbeddingSource(None if model is None else load_model(model), expected, reading)
    with all_or_nothing(*sections.tables):
        tables = sections.each(lambda table: source.with_embeddings(table, reps))
    embedded = replace(sections, tables=tuple(tables))
    origin = {}
    for rep in reps:
        own = embedded if rep in MADE_BY_EMBED else sections
        parts.setdefault(rep, read_each(own, rep))
        origin[rep] = _common_origin(own.tables, rep)
    widths = tuple(common_width(parts[rep], rep) for rep in reps)
    features = np.concatenate([np.concatenate(parts[rep]) for rep in reps], axis=1)
    return Inputs(features, reps, widths, origin)


def read_each(sections: Sections, rep: str) -> list[NDArray[np.float32]]:
    """Read an entry of ``obsm`` of each table, checked."""
    return sections.each(lambda table: read_representation(table, rep))


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


def common_width(parts: Sequence[NDArray[np.float32]], rep: str) -> int:
    """Columns of a representation, the same in all tables."""
    found = {int(part.shape[1]) for part in parts}
    if len(found) > 1:
        msg = f"obsm[{rep!r}] has {sorted(found)} columns in different AnnData; make it anew."
        raise ValueError(msg)
    return found.pop()


def choose_neighborhood(
    sections: Sections, inputs: Inputs, options: FitOptions, *, rows: NDArray[np.int64]
) -> Inputs:
    """Add means over the neighbours that a head is fitted to beside its representations.

    By default over ten beside embeddings of a model where labelled cells have places, and none where
    cells are held out at random: these share neighbours with fitted ones, which would look as if the
    neighbours told their labels.

    Parameters
    ----------
    rows
        Labelled cells; what other tables lack does not matter.
    """
    n_neighbors, spatial_key = options.n_neighbors, options.reading.spatial_key
    labelled = [
        k
        for k, place in enumerate(sections.places)
        if ((rows >= place.start) & (rows < place.stop)).any()
    ]
    if n_neighbors is None:
        tables = [sections.tables[k] for k in labelled]
        has_places = all(places_entry(table, spatial_key) in table.obsm for table in tables)
        is_made = set(inputs.use_rep) <= set(MADE_BY_EMBED)
        is_fair = options.split != "random"
        n_neighbors = N_NEIGHBORS if is_made and is_fair and has_places else 0
        if is_made and is_fair and not has_places:
            logger.info(
                "No neighbours are read: there are no coordinates in obsm[%r].", spatial_key
            )
    return add_neighborhood(sections, inputs, n_neighbors, spatial_key=spatial_key, needed=labelled)


def add_neighborhood(
    sections: Sections,
    inputs: Inputs,
    n_neighbors: int,
    *,
    spatial_key: str,
    needed: Collection[int] = (),
) -> Inputs:
    """Add means over the neighbours of each cell.

    They are means of :attr:`Inputs.averaged`, and of the first components of expression, if there
    are any.

    Parameters
    ----------
    sections
        The cells.
    inputs
        Their representations, and components of their expression if these are read.
    n_neighbors
        Neighbours in the plane, of the same slice; 0 for none.
    spatial_key
        Entry of ``obsm`` with the coordinates; by default that which a table was embedded with.
    needed
        Numbers of the tables whose cells must have means. Those of other tables are NaN where there
        are no usable coordinates, or a slice has less than half as many neighbours: the mean of a
        few varies more than what a network was fitted to.
    """
    if not n_neighbors:
        return inputs
    coordinates = np.zeros((sections.n_obs, 2))
    usable = np.zeros(sections.n_obs, dtype=bool)
    must = np.zeros(sections.n_obs, dtype=bool)
    for k, (table, place) in enumerate(zip(sections.tables, sections.places, strict=True)):
        must[place] = k in needed
        try:
            with sections.naming(k):
                coordinates[place] = read_coordinates(table, places_entry(table, spatial_key))
            usable[place] = True
        except (KeyError, ValueError) as error:
            if k in needed:
                raise
            warn(f"{table.n_obs} cells are judged without their neighbours: {error.args[0]}")
    slices = [
        rows
        for rows in sections.slices.rows
        if usable[rows].all() and (must[rows].all() or len(rows) > n_neighbors // 2)
    ]
    values, components = inputs.averaged[0], inputs.first_components
    both = values if components is None else np.concatenate([values, components], axis=1)
    means = neighbor_means(both, coordinates, slices, n_neighbors)
    width = values.shape[1]
    return replace(
        inputs,
        neighborhood=means[:, :width],
        expression_neighborhood=None if components is None else means[:, width:],
        n_neighbors=n_neighbors,
    )


def renew_neighborhood(
    sections: Sections, inputs: Inputs, before: Inputs, *, spatial_key: str
) -> Inputs:
    """Add means to other representations of the same cells, for those that had means `before`."""
    if before.neighborhood is None:
        return inputs
    means = before.neighborhood
    had = [k for k, place in enumerate(sections.places) if np.isfinite(means[place]).all()]
    return add_neighborhood(
        sections, inputs, before.n_neighbors, spatial_key=spatial_key, needed=had
    )
