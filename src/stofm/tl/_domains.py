"""``stofm.tl.domains``: regions of tissue without labels."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from stofm._config import check_one_of, check_seed
from stofm._edge.colors import distinct_colors
from stofm._edge.places import read_coordinates
from stofm._edge.slices import read_slices
from stofm._edge.tables import (
    all_or_nothing,
    read_record,
    read_representation,
    refuse_foreign,
    resolve_table,
    write_record,
)
from stofm._edge.tokens import stale_reason
from stofm._keys import Obs, Obsm, Suffix
from stofm._logging import logger
from stofm.heads.blocks import N_NEIGHBORS
from stofm.heads.embeddings import (
    MADE_BY_EMBED,
    origin_by,
    origin_of,
    places_entry,
    same_origin,
    slices_column,
)
from stofm.heads.head import refuse_reserved
from stofm.heads.request import check_whole_number
from stofm.nn.model import load_model
from stofm.spatial.domains import Centering, directions, find_levels
from stofm.spatial.plane import neighbor_means
from stofm.tl._embed import embed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.nn import Stofm

_RESOLUTION = 1.0
#: More domains get no colours.
_MOST_COLORS = 102
#: How many times as many neighbours the second mean is over.
_FARTHER = 3


def domains(
    adata: Any,
    n_domains: int | None = None,
    *,
    resolution: float | None = None,
    library_key: str | None = None,
    shared: bool = True,
    coarser: Sequence[int] = (),
    n_neighbors: int | None = None,
    smooth: int = 0,
    centering: Centering = "slice",
    use_rep: str = Obsm.X,
    model: Stofm | str | Path | None = None,
    spatial_key: str = Obsm.SPATIAL,
    seed: int = 0,
    key_added: str = Obs.DOMAIN,
    table_key: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Find the regions of slices, without labels, as clusters of the embedding.

    Clusters are found in the first ten principal components of the embedding and of its mean over
    near and farther cells (20 of the embedding alone): a given number of them with a Gaussian mixture
    whose components share one covariance, or as many as Leiden finds on the neighbour graph. On
    most slices with annotated layers the mixture agrees better with these than k-means does. The
    order of the cells does not matter. Cells without embeddings are embedded first. Most calls need
    `n_domains` and `library_key`; the rest is for special cases.

    Parameters
    ----------
    adata
        Annotated data with an embedding, or with counts and coordinates to embed, or a SpatialData
        with such a table.
    n_domains
        Number of domains; with ``shared=False`` of each slice.
    resolution
        Resolution of Leiden instead, 1.0 if neither is given; higher values give more domains.
    library_key
        Column of ``adata.obs`` that names each cell's slice; by default the one that was embedded
        with, if any. Without it all cells are one slice.
    shared
        Cluster all slices together, so that a domain is the same in each. False: each slice by
        itself, with domains named ``"slice:0"`` and so on.
    coarser
        Falling numbers of domains of coarser levels, such as ``(4, 2)``. Each is made of whole
        domains of the level below: those two are merged that differ least (Ward).
    use_rep
        Entry of ``adata.obsm`` with the embedding, (n_obs, d).
    model
        Model to embed with, by :func:`stofm.tl.embed`: a :class:`stofm.Stofm`, a checkpoint folder
        or a hub id. Cells that are embedded with another one are embedded again. None: whichever
        made what is there, or ``"stofm-mini"``.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData. Sets:

    ``adata.obs['stofm_domain']`` : category
        Domain of each cell, ``"0"``, ``"1"``, ... by falling number of cells.
    ``adata.obs['stofm_domain_level1']``, ... : category
        Domains of the coarser levels, if asked for.
    ``adata.uns['stofm_domain_colors']``, ... : list
        Colours, the same for the same number of domains; a coarser domain has that of its largest
        part. Not set for more than 102 domains.
    ``adata.uns['stofm']['stofm_domain']`` : dict
        Parameters, and fingerprints of the embedding's model.

    Other Parameters
    ----------------
    n_neighbors
        Nearest neighbours in the plane, of the same slice, whose mean embedding is used beside the
        cell's own, and beside that the mean over three times as many. None: 10 for the embedding
        of a model, if there are coordinates, otherwise 0, none.
    smooth
        Give each cell the most frequent domain among itself and as many nearest neighbours in
        the plane, of its slice; 0 for none. Takes single cells out of a region, and thin layers
        and small regions with them; a domain may vanish.
    centering
        ``"slice"`` takes each slice's mean off its embedding first, so that what sets whole
        slices apart does not make domains of its own. ``"none"`` takes the mean of all cells off,
        and is better if slices show different regions. What is left is scaled to unit length: how
        far a cell is from the mean follows its number of counts.
    spatial_key
        Entry of ``adata.obsm`` with the coordinates, (n_obs, 2), any unit; by default what was
        embedded with. Needed to smooth and for `n_neighbors`.
    seed
        Seed of the clustering.
    key_added
        Column of ``adata.obs`` to write, and name of its record.
    table_key
        Table of a SpatialData.
    copy
        Return a changed copy and leave `adata` as it is.

    Raises
    ------
    KeyError
        `use_rep`, `spatial_key` or `library_key` is not there.
    ValueError
        Both `n_domains` and `resolution` are given, a number is not usable, the embedding is of
        other counts or coordinates than there are now, holds NaN or has fewer different rows than
        domains, `key_added` would replace something else, or there are several slices and no
        `library_key`.

    See Also
    --------
    stofm.pl.domains : draws domains with their outlines.
    stofm.tl.describe : says what each domain is.
    stofm.tl.annotate : learns regions from labels.
    stofm.metrics.ari : compares domains with known regions.

    Notes
    -----
    Of more than 50,000 cells a random sample of 50,000 is clustered; the others join the likeliest
    component, or the most frequent domain among the nearest of the sample. The mixture starts 40
    times, with more than 5,000 cells on a random sample of 5,000, and the likeliest start goes on.

    References
    ----------
    Scrucca et al. 2016, mclust 5 (R J 8:289): the mixture is its model EEE. Traag, Waltman and van
    Eck 2019, From Louvain to Leiden (Sci Rep 9:5233).

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(500, 100, seed=0)
    >>> st.tl.embed(adata)
    >>> st.tl.domains(adata, 4, coarser=[2])
    >>> adata.obs["stofm_domain"].nunique(), adata.obs["stofm_domain_level1"].nunique()
    (4, 2)
    """
    table = resolve_table(adata, table_key, copy=copy)
    _check_options(n_domains, resolution, coarser, smooth, centering, n_neighbors)
    check_seed(seed)
    library_key = slices_column(table, library_key)
    spatial_key = places_entry(table, spatial_key)
    columns = _level_columns(key_added, 1 + len(coarser))
    for column in columns:
        refuse_reserved(column, Obs.DOMAIN, use_rep, spatial_key, library_key)
    refuse_foreign(table, key_added, obs=columns[1:])
    slices = read_slices(table, library_key, spatial_key)
    if not shared and slices.column is None:
        raise ValueError(
            "shared=False clusters each slice by itself: pass `library_key` to tell slices apart."
        )
    table = table.copy() if copy else table
    if use_rep in MADE_BY_EMBED and (model is not None or use_rep not in table.obsm):
        model = load_model(model)
        if not same_origin(origin_of(table, use_rep), origin_by(model)[use_rep]):
            embed(table, model, library_key=library_key, spatial_key=spatial_key)
    features = read_representation(table, use_rep)
    if reason := stale_reason(table, use_rep):
        raise ValueError(f"{reason} Embed the cells again: st.tl.embed(adata).")
    if n_neighbors is None:
        is_read = use_rep in MADE_BY_EMBED and spatial_key in table.obsm
        n_neighbors = N_NEIGHBORS if is_read else 0
    features = directions(features, slices.rows, centering=centering)
    coordinates = read_coordinates(table, spatial_key) if smooth or n_neighbors else None
    beside = []
    if coordinates is not None and n_neighbors:
        sizes = (n_neighbors, _FARTHER * n_neighbors)
        beside = [neighbor_means(features, coordinates, slices.rows, size) for size in sizes]
    options: dict[str, Any] = {
        "n_domains": n_domains,
        "resolution": _RESOLUTION if resolution is None else resolution,
        "coarser": list(coarser),
        "smooth": smooth,
        "centering": centering,
        "seed": seed,
    }
    groups: dict[str, tuple[Any, list[NDArray[np.int64]]]] = {"": (slice(None), slices.rows)}
    if not shared:
        named = zip(slices.names, slices.rows, strict=True)
        groups = {f"{name}:": (rows, [np.arange(len(rows))]) for name, rows in named}
    found = {}
    for prefix, (rows, parts) in groups.items():
        places = coordinates[rows] if smooth and coordinates is not None else None
        around = [one[rows] for one in beside]
        levels = find_levels(features[rows], parts, beside=around, coordinates=places, **options)
        found[prefix] = (rows, levels)
    params = {
        **options,
        "resolution": None if n_domains is not None else options["resolution"],
        "library_key": slices.column,
        "shared": shared,
        "n_neighbors": n_neighbors,
        "n_farther": _FARTHER * n_neighbors,
        "use_rep": use_rep,
        "spatial_key": spatial_key,
    }
    with all_or_nothing(table):
        counts = _write_levels(table, key_added, found)
        write_record(table, key_added, params, **origin_of(table, use_rep))
    coarse = "".join(f", {n} at level {k}" for k, n in enumerate(counts[1:], start=1))
    plural = "" if len(slices.names) == 1 else "s"
    logger.info("%d domains in %d slice%s%s.", counts[0], len(slices.names), plural, coarse)
    return table if copy else None


def _check_options(
    n_domains: int | None,
    resolution: float | None,
    coarser: Sequence[int],
    smooth: int,
    centering: str,
    n_neighbors: int | None,
) -> None:
    if n_domains is not None and resolution is not None:
        raise ValueError(f"Pass n_domains={n_domains} or resolution={resolution}, not both.")
    if np.ndim(coarser) != 1:
        raise TypeError(
            f"coarser must be a list of numbers of domains, such as [4, 2]; found {coarser!r}."
        )
    check_whole_number("n_domains", 1 if n_domains is None else n_domains, least=1)
    check_whole_number("n_neighbors", 0 if n_neighbors is None else n_neighbors, least=0)
    check_whole_number("smooth", smooth, least=0)
    for number in coarser:
        check_whole_number("Each number in coarser", number, least=1)
    check_one_of("centering", centering, get_args(Centering))
    if resolution is not None and not 0.0 < resolution < np.inf:
        raise ValueError(f"resolution must be positive, found {resolution!r}.")
    numbers = [*([] if n_domains is None else [n_domains]), *coarser]
    if any(after >= before for before, after in pairwise(numbers)):
        below = "" if n_domains is None else f" below n_domains={n_domains}"
        raise ValueError(
            f"coarser must hold falling numbers of domains{below}, found {list(coarser)}."
        )


def _level_columns(key: str, n_levels: int) -> list[str]:
    """Columns of ``obs`` that levels are written to, the finest first."""
    return [key, *(key + Suffix.LEVEL.format(level) for level in range(1, n_levels))]


def _write_levels(
    adata: AnnData, key: str, found: Mapping[str, tuple[Any, list[NDArray[np.int64]]]]
) -> list[int]:
    """Write each level's column and colours, and drop those of an earlier run.

    `found` are rows and their labels at each level, the finest first, by what the names of their
    domains begin with. Returns the number of each level's domains.
    """
    import pandas as pd

    n_before = len((read_record(adata, key) or {}).get("params", {}).get("coarser", ()))
    n_levels = len(next(iter(found.values()))[1])
    for column in _level_columns(key, n_before + 1)[n_levels:]:
        if column in adata.obs:
            del adata.obs[column]
        adata.uns.pop(column + Suffix.COLORS, None)
    counts: list[int] = []
    for level, column in enumerate(_level_columns(key, n_levels)):
        names: list[str] = []
        codes = np.empty(adata.n_obs, dtype=np.int64)
        for prefix, (rows, labels) in found.items():
            codes[rows] = labels[level] + len(names)
            names += [f"{prefix}{k}" for k in range(int(labels[level].max()) + 1)]
        adata.obs[column] = pd.Categorical.from_codes(codes, categories=names)
        if level == 0:
            finest, colors = codes, _colors(len(names))
        # Those of an earlier run would be taken for these domains'.
        adata.uns.pop(column + Suffix.COLORS, None)
        if colors:
            # A domain has the colour of its largest part at the finest level.
            largest = pd.crosstab(codes, finest).to_numpy().argmax(axis=1)
            adata.uns[column + Suffix.COLORS] = [str(colors[k]) for k in largest]
        counts.append(len(names))
    return counts


def _colors(n_domains: int) -> Sequence[str]:
    """Colours for so many; none for more than can be told apart at all."""
    return distinct_colors(n_domains) if n_domains <= _MOST_COLORS else ()
