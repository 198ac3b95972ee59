"""What lies around cells, for heads that read it beside their embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._anndata import read_coordinates
from stofm._keys import Obsm
from stofm._logging import logger
from stofm.spatial.neighbor_graph import neighbor_means
from stofm.tl._embeddings import MADE_BY_EMBED

if TYPE_CHECKING:
    from stofm.tl._head_inputs import Inputs, Sections

#: Neighbours over which embeddings of a model are averaged.
N_NEIGHBORS: Final = 10


def choose_neighborhood(
    sections: Sections,
    inputs: Inputs,
    n_neighbors: int | None,
    *,
    spatial_key: str,
    is_repeated: bool,
) -> Inputs:
    """Add means over the neighbours that a head is fitted to beside its representations.

    Parameters
    ----------
    sections, inputs, spatial_key
        As in :func:`add_neighborhood`.
    n_neighbors
        As many as asked for; None for ten beside embeddings of a model where all cells have places.
    is_repeated
        Whether a protocol says what is fitted; it has no neighbours unless they are asked for.
    """
    if n_neighbors is None:
        has_places = all(spatial_key in table.obsm for table in sections.tables)
        is_made = set(inputs.use_rep) <= set(MADE_BY_EMBED)
        n_neighbors = N_NEIGHBORS if is_made and has_places and not is_repeated else 0
    return add_neighborhood(sections, inputs, n_neighbors, spatial_key=spatial_key)


def add_neighborhood(
    sections: Sections,
    inputs: Inputs,
    n_neighbors: int,
    *,
    spatial_key: str,
    needs_places: bool = True,
) -> Inputs:
    """Add means over the neighbours of each cell.

    They are means of ``X_stofm_cell`` if that is read, which is of the cells alone, else of all
    that is read.

    Parameters
    ----------
    sections
        The cells.
    inputs
        Their representations.
    n_neighbors
        Neighbours in the plane, of the same slice; 0 for none.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    needs_places
        Refuse a table without coordinates; otherwise its cells have NaN, and a warning says so.

    Raises
    ------
    KeyError
        A table has no coordinates and needs them.
    ValueError
        Coordinates are not usable.
    """
    if not n_neighbors:
        return inputs
    values = inputs.features
    if Obsm.X_CELL in inputs.use_rep:
        number = inputs.use_rep.index(Obsm.X_CELL)
        start = sum(inputs.widths[:number])
        values = values[:, start : start + inputs.widths[number]]
    coordinates = np.zeros((sections.n_obs, 2))
    lacking = np.zeros(sections.n_obs, dtype=bool)
    for table, place in zip(sections.tables, sections.places, strict=True):
        if needs_places or spatial_key in table.obsm:
            coordinates[place] = read_coordinates(table, spatial_key)
        else:
            lacking[place] = True
    slices = [rows for rows in sections.slices.rows if not lacking[rows].any()]
    means = neighbor_means(values, coordinates, slices, n_neighbors)
    if lacking.any():
        logger.warning(
            "%d cells are judged without their neighbours: their table has no obsm[%r].",
            lacking.sum(),
            spatial_key,
        )
    return replace(inputs, neighborhood=means, n_neighbors=n_neighbors)
