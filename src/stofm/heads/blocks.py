"""What heads read of cells, block by block: embeddings, components of expression, means over neighbours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from stofm._arrays import SideBySide, let_go, spans
from stofm._edge.counts import read_counts
from stofm._edge.places import read_coordinates
from stofm._edge.tables import all_or_nothing, read_representation
from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import warn
from stofm.heads.embeddings import (
    MADE_BY_EMBED,
    Origin,
    describe_origin,
    origin_of,
    places_entry,
    same_origin,
    with_embeddings,
)
from stofm.spatial.plane import neighbor_means

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from stofm.heads.request import Request, SliceTables

#: What a member of a head reads.
Source = Literal["embedding", "neighborhood", "expression", "expression neighborhood"]

#: Components that are averaged over neighbours; the others are mostly noise.
_N_AVERAGED: Final = 50
#: Neighbours over which embeddings of a model are averaged.
N_NEIGHBORS: Final = 10


@dataclass(frozen=True, eq=False)
class Blocks:
    """What is read of cells."""

    features: NDArray[np.float32]  # float32 (n, d), the entries of ``obsm`` side by side
    #: Their names, and the columns of each.
    use_rep: tuple[str, ...]
    widths: tuple[int, ...]
    origin: Origin  # by name, which model they are by
    #: float32 (n, k) components of expression, NaN where counts or genes are missing; None if they
    #: are not read.
    expression: NDArray[np.float32] | None = None
    #: float32 means over the neighbours of each cell, NaN where these are not known; None if they
    #: are not read.
    neighborhood: NDArray[np.float32] | None = None
    expression_neighborhood: NDArray[np.float32] | None = None
    n_neighbors: int = 0  # over how many neighbours

    @property
    def sources(self) -> tuple[Source, ...]:
        """What there is to read, the embedding first."""
        return tuple(source for source in get_args(Source) if self._parts(source))

    def of(self, source: Source) -> NDArray[np.float32]:
        """What a member reads, (n, d)."""
        parts = self._parts(source)
        return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def rows_of(self, source: Source) -> SideBySide:
        """As :meth:`of`, some rows at a time."""
        return SideBySide(tuple(self._parts(source)))

    def knows(self, source: Source) -> NDArray[np.bool_]:
        """(n,) whether a cell has all that a member reads."""
        parts = self._parts(source)
        known = np.full(len(self.features), bool(parts))
        for part in parts:
            for span in spans(*part.shape):
                known[span] &= np.isfinite(part[span, 0])
                let_go(part)
        return known

    def take(self, rows: NDArray[np.int64]) -> Blocks:
        """The blocks of some cells."""
        names = ("expression", "neighborhood", "expression_neighborhood")
        given = {name: getattr(self, name) for name in names}
        found: dict[str, Any] = {n: None if one is None else one[rows] for n, one in given.items()}
        return replace(self, features=self.features[rows], **found)

    def widths_of(self, source: Source) -> tuple[int, ...]:
        """Columns of each part of :meth:`of`; those of a part share a scale."""
        if source == "embedding":
            return self.widths
        if source == "neighborhood":
            return (*self.averaged[1], *self.widths)
        return tuple(part.shape[1] for part in self._parts(source))

    @property
    def averaged(self) -> tuple[NDArray[np.float32], tuple[int, ...]]:
        """What is averaged over neighbours, and its widths: ``X_stofm_cell`` if read, else all."""
        if Obsm.X_CELL not in self.use_rep:
            return self.features, self.widths
        number = self.use_rep.index(Obsm.X_CELL)
        start, width = sum(self.widths[:number]), self.widths[number]
        return self.features[:, start : start + width], (width,)

    @property
    def first_components(self) -> NDArray[np.float32] | None:
        """Components that are averaged over neighbours; None if none are read."""
        return None if self.expression is None else self.expression[:, :_N_AVERAGED]

    def _parts(self, source: Source) -> list[NDArray[np.float32]]:
        around, components = self.expression_neighborhood, self.first_components
        features = self.features if self.use_rep else None
        parts = {
            "embedding": (features,),
            "neighborhood": (self.neighborhood, features),
            "expression": (self.expression,),
            "expression neighborhood": (around, components),
        }[source]
        return [] if parts[0] is None else [part for part in parts if part is not None]


def read_embeddings(
    slices: SliceTables,
    request: Request,
    reps: Sequence[str] | None = None,
    *,
    expected: Origin | None = None,
) -> Blocks:
    """Read entries of ``obsm``; cells without embeddings of a model are embedded first.

    New embeddings are written to all tables or, after an error, to none. Stored ones that do not
    fit (another model, layer, slices, counts or coordinates) stay; if the request names a model, the
    cells are embedded aside. Embeddings by other models than the `expected` ones, which a head was
    fitted to, are refused. `reps` are read in place of those of the request.
    """
    reps = tuple(request.reps if reps is None else reps)
    if not reps:
        return Blocks(np.empty((slices.n_obs, 0), dtype=np.float32), (), (), {})
    found = {rep: read_rep(slices, rep) for rep in reps if rep not in MADE_BY_EMBED}
    if request.layer is not None:
        slices.each(lambda table: read_counts(table, layer=request.layer))
    with all_or_nothing(*slices.tables):
        embedded = with_embeddings(slices, reps, request, expected or {})
    found |= {rep: read_rep(embedded, rep) for rep in reps if rep in MADE_BY_EMBED}
    values = [found[rep][0] for rep in reps]
    widths = tuple(one.shape[1] for one in values)
    return Blocks(
        SideBySide(tuple(values)).together(), reps, widths, {rep: found[rep][1] for rep in reps}
    )


def read_rep(slices: SliceTables, rep: str) -> tuple[NDArray[np.float32], dict[str, str]]:
    """Read an entry of ``obsm`` of all tables, (n_obs, d), and the origin that they share."""
    parts = slices.each(lambda table: read_representation(table, rep))
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise ValueError(
            f"obsm[{rep!r}] has {sorted(widths)} columns in different AnnData; make it again."
        )
    first, *others = [origin_of(table, rep) for table in slices.tables]
    for k, other in enumerate(others, 2):
        if not same_origin(other, first):
            raise ValueError(
                f"obsm[{rep!r}] is by {describe_origin(first)} in the first AnnData and by "
                f"{describe_origin(other)} in number {k}. Embed all with one model: st.tl.embed(adata, "
                "model)."
            )
    return parts[0] if len(parts) == 1 else np.concatenate(parts), first


def choose_neighborhood(
    slices: SliceTables, blocks: Blocks, request: Request, rows: NDArray[np.int64]
) -> Blocks:
    """Add means over neighbours, as many as asked for, for the tables with labelled `rows`.

    By default over ten beside embeddings of a model if the labelled cells have places, and over none
    with a random split: held-out cells would share neighbours with fitted ones.
    """
    n_neighbors, spatial_key = request.options.n_neighbors, request.spatial_key
    labelled = slices.tables_of(rows)
    if n_neighbors is None:
        has_places = slices.has_coordinates(spatial_key, labelled)
        is_fair = set(blocks.use_rep) <= set(MADE_BY_EMBED) and request.options.split != "random"
        n_neighbors = N_NEIGHBORS if is_fair and has_places else 0
        if is_fair and not has_places:
            logger.info("No coordinates in obsm[%r]: no neighbours are used.", spatial_key)
    return with_neighborhood(slices, blocks, n_neighbors, request, needed=labelled)


def with_neighborhood(
    slices: SliceTables,
    blocks: Blocks,
    n_neighbors: int,
    request: Request,
    *,
    needed: Collection[int] = (),
) -> Blocks:
    """Add means over each cell's nearest neighbours in its slice; 0 neighbours for none.

    Tables whose numbers are in `needed` must have coordinates. Cells of others have NaN without
    them, and in slices of less than half as many neighbours: the mean of a few varies more than what
    the head was fitted to.
    """
    if not n_neighbors:
        return blocks
    coordinates = np.full((slices.n_obs, 2), np.nan)
    is_needed = np.zeros(slices.n_obs, dtype=bool)
    for k, (table, place) in enumerate(zip(slices.tables, slices.places, strict=True)):
        is_needed[place] = k in needed
        try:
            with slices.naming(k):
                coordinates[place] = read_coordinates(
                    table, places_entry(table, request.spatial_key)
                )
        except (KeyError, ValueError) as error:
            if k in needed:
                raise
            warn(f"{table.n_obs} cells are judged without their neighbours: {error.args[0]}")
    usable = [
        rows
        for rows in slices.rows
        if np.isfinite(coordinates[rows]).all()
        and (is_needed[rows].all() or len(rows) > n_neighbors // 2)
    ]
    values, components = blocks.averaged[0], blocks.first_components
    both = SideBySide((values,) if components is None else (values, components)).together()
    means = neighbor_means(both, coordinates, usable, n_neighbors)
    width = values.shape[1]
    return replace(
        blocks,
        neighborhood=means[:, :width],
        expression_neighborhood=None if components is None else means[:, width:],
        n_neighbors=n_neighbors,
    )
