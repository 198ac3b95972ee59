"""What lies around cells, for heads that read it beside their embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._coordinates import read_coordinates
from stofm._logging import logger
from stofm._messages import warn
from stofm.heads.embeddings import MADE_BY_EMBED, places_entry
from stofm.spatial.neighbor_graph import neighbor_means

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from stofm.heads.inputs import Inputs
    from stofm.heads.options import FitOptions
    from stofm.heads.sections import Sections

#: Neighbours over which embeddings of a model are averaged.
N_NEIGHBORS: Final = 10


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
