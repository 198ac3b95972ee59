"""``stofm.tl.describe``: what a region is made of, where it lies, and which genes mark it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from scipy import sparse
from scipy.stats import false_discovery_control, hypergeom

from stofm._edge.counts import read_counts
from stofm._edge.expression import group_means, log_normalised, rank_markers
from stofm._edge.places import read_coordinates
from stofm._edge.slices import read_slices
from stofm._edge.tables import frame_names, label_text, resolve_table
from stofm._keys import Obs, Obsm
from stofm._messages import require_name
from stofm.heads.embeddings import counts_layer, places_entry, slices_column
from stofm.heads.request import check_whole_number
from stofm.spatial.regions import contacts, morans_i, pieces, touching_cells
from stofm.tl._description import Description

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.slices import Slices

#: Cells of a slice, inside and outside of a region, that its genes are compared between slices by, or
#: that a gene's pattern within the region is judged by.
_FEWEST: Final = 20
#: Share of a region's cells that have a gene whose pattern is judged, and the most such genes.
_DETECTED: Final = 0.1
_MOST_GENES: Final = 2000
_NOTES: Final = (
    "over_all: share in the region over the share in all cells. neighbors: shares of the contacts with "
    "cells of other regions; over_expected: over the share if the cells of each slice were shuffled.",
    "n_pieces: connected pieces that hold nine tenths of the region's cells in that slice; "
    "largest_piece: the share in the largest.",
    "Markers are ranked by a t-test of the region's cells against all others. No p-value is given: "
    "regions that were found from the same genes differ in these genes by construction.",
    "agreement: mean over pairs of slices of the correlation, over genes, of the difference between "
    "the region and the rest.",
    "These are descriptions of groups of cells, not findings: names of tissues or cell types, and "
    "biology, are for the reader to check.",
)


def describe(
    adata: Any,
    groupby: str = Obs.DOMAIN,
    *,
    label_key: str | None = None,
    gene_sets: Any = None,
    n_genes: int = 10,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    table_key: str | None = None,
) -> Description:
    """Say what the regions of slices are: cell types, neighbours, genes, size, and how they lie.

    The result prints as a report in Markdown; ``to_json()`` gives the same facts as JSON, with notes
    on what each number means, to keep or to paste into a language model. Nothing is sent anywhere.
    `adata` stays as it is.

    Parameters
    ----------
    adata
        Annotated data with regions, raw counts and coordinates, or a SpatialData with such a table.
    groupby
        Column of ``adata.obs`` with the regions, such as of :func:`stofm.tl.domains`. Cells without
        one belong to no region, but to what regions are compared with.
    label_key
        Cell types: a column of ``adata.obs``, or a DataFrame of ``adata.obsm`` with proportions of
        types in spots. None: ``obs["stofm_annotation"]`` or ``obsm["stofm_deconvolution"]`` if they
        are there; otherwise no composition is given.
    gene_sets
        Sets of genes to name markers by: a dict of lists of genes, or a DataFrame with the columns
        ``"source"`` (the set) and ``"target"`` (the gene), as decoupler has them. Genes are called
        as in ``var_names``.
    n_genes
        Number of markers, of spatially variable genes and of gene sets for each region.
    library_key
        Column of ``adata.obs`` that names each cell's slice; by default the one that was embedded
        with, if any.

    Returns
    -------
    A :class:`stofm.tl.Description`.

    Other Parameters
    ----------------
    layer
        Layer with raw counts; by default ``X``, or the layer that was embedded.
    spatial_key
        Entry of ``adata.obsm`` with the coordinates, (n_obs, 2), any unit.
    table_key
        Table of a SpatialData.

    Raises
    ------
    KeyError
        `groupby`, `label_key`, `library_key`, `layer` or `spatial_key` is not there.
    TypeError
        `gene_sets` has another form.
    ValueError
        There are no regions, the counts are not raw, or no gene of `gene_sets` is in ``var_names``.

    See Also
    --------
    stofm.tl.domains : finds regions.
    stofm.pl.describe : a page of pictures for a region.
    stofm.pl.report : an interactive page of a slice.

    Notes
    -----
    Two cells touch if one is among the six nearest of the other. Counts are scaled to 10,000 for each
    cell and logarithmised. Markers: scanpy's t-test of a region against all other cells, with a
    positive fold change, in 10 % of the region's cells or more. Spatially variable genes: Moran's I
    over the cells of a region that touch, the mean over slices weighted by their cells, of genes in
    10 % of the region's cells or more, at most the 2,000 most frequent. Gene sets: hypergeometric
    test of the markers among all genes.

    References
    ----------
    Moran 1950, Notes on continuous stochastic phenomena (Biometrika 37:17).

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(500, 60, seed=0)
    >>> description = st.tl.describe(adata, "region", label_key="cell_type")
    >>> sorted(description.regions) == sorted(adata.obs["region"].unique())
    True
    >>> text = description.to_markdown(), description.to_json()
    """
    check_whole_number("n_genes", n_genes, least=1)
    table: AnnData = resolve_table(adata, table_key)
    names, codes = read_groups(table, groupby)
    spatial_key = places_entry(table, spatial_key)
    coordinates = read_coordinates(table, spatial_key)
    slices = read_slices(table, slices_column(table, library_key), spatial_key)
    genes = table.var_names.astype(str).tolist()
    sets = _read_sets(gene_sets, genes)
    label_key, types, shares = _read_types(table, label_key)
    values = read_expression(table, layer)
    touching = touching_cells(coordinates, slices.rows)
    found, expected = contacts(touching, codes, slices.rows, len(names))
    markers = rank_markers(values, genes, codes, len(names), n_genes)
    agreement = _agreement(values, codes, slices, len(names))
    regions = {}
    for k, name in enumerate(names):
        own = codes == k
        cells = _Region(own, touching, values, slices)
        marking = [row["gene"] for row in markers[k]]
        regions[name] = {
            "n_cells": int(own.sum()),
            "share": float(own.mean()),
            "slices": cells.places(),
            "contiguity": _ratio(found[k, k], found[k].sum()),
            "composition": _composition(types, shares, own),
            "neighbors": _neighbors(names, k, found[k], expected[k]),
            "markers": markers[k],
            "gene_sets": _name_sets(marking, genes, sets, n_genes),
            "spatially_variable_genes": cells.patterns(genes, n_genes),
            "agreement": agreement[k],
        }
    about = {
        "groupby": groupby,
        "label_key": label_key,
        "n_cells": table.n_obs,
        "n_genes": table.n_vars,
        "n_slices": len(slices.names),
        "notes": list(_NOTES),
    }
    return Description(regions, about)


def read_groups(adata: AnnData, groupby: str) -> tuple[list[str], NDArray[np.int64]]:
    """Names of a column's groups that have cells, in order, and their numbers, -1 for none."""
    import pandas as pd
    from natsort import natsorted

    hint = ": st.tl.domains(adata) writes it" if groupby == Obs.DOMAIN else ""
    require_name(groupby, adata.obs, f"There is no obs[{groupby!r}]{hint}.")
    text = label_text(adata.obs[groupby])
    present = set(text) - {""}
    if not present:
        raise ValueError(f"No cell has a region in obs[{groupby!r}]; pass another column.")
    column = adata.obs[groupby]
    order = natsorted(present)
    if isinstance(column.dtype, pd.CategoricalDtype):
        categories = label_text(pd.Series(column.cat.categories)).tolist()
        order = [name for name in categories if name in present]
    codes = pd.Categorical(text, categories=order).codes
    return order, np.asarray(codes, dtype=np.int64)


def read_expression(adata: AnnData, layer: str | None) -> sparse.csr_matrix:
    """Log-normalised counts, (n_obs, n_vars), of the layer that was embedded by default."""
    blocks = read_counts(adata, layer=counts_layer(adata, layer))
    return sparse.vstack([log_normalised(block) for block in blocks], format="csr")


def _name_sets(
    markers: Sequence[str], genes: Sequence[str], sets: Mapping[str, set[str]], n_sets: int
) -> list[dict[str, Any]]:
    """Sets that share more genes with the markers than as many measured genes drawn at random.

    Hypergeometric test, false discovery rate of Benjamini and Hochberg over the sets that share a
    gene; the `n_sets` with the lowest p.
    """
    measured, marking = set(genes), set(markers)
    rows: list[dict[str, Any]] = []
    for name, members in sets.items():
        own = members & measured
        if shared := sorted(own & marking):
            p = float(hypergeom.sf(len(shared) - 1, len(measured), len(own), len(marking)))
            rows.append({"set": name, "genes": shared, "n_measured": len(own), "p": p})
    rates = false_discovery_control([row["p"] for row in rows]) if rows else []
    for row, rate in zip(rows, rates, strict=True):
        row["fdr"] = float(rate)
    return sorted(rows, key=lambda row: (row["p"], row["set"]))[:n_sets]


def _read_types(
    adata: AnnData, label_key: str | None
) -> tuple[str | None, list[str], NDArray[np.float64]]:
    """Where types are read, their names, and shares (n, n_types) of each cell or spot."""
    if label_key is None:
        there = [(Obs.ANNOTATION, adata.obs), (Obsm.DECONVOLUTION, adata.obsm)]
        label_key = next((key for key, held in there if key in held), None)
        if label_key is None:
            return None, [], np.empty((adata.n_obs, 0))
    if label_key in adata.obsm:
        return label_key, frame_names(adata, label_key), np.asarray(adata.obsm[label_key], float)
    text = f"There is no obs[{label_key!r}] with cell types, nor an obsm with proportions."
    require_name(label_key, adata.obs, text)
    names, codes = read_groups(adata, label_key)
    return label_key, names, np.eye(len(names) + 1)[codes][:, :-1]


def _read_sets(given: Any, genes: list[str]) -> dict[str, set[str]]:
    """Sets of genes by name, of those that are measured."""
    if given is None:
        return {}
    if hasattr(given, "columns"):
        if not {"source", "target"} <= set(given.columns):
            raise TypeError(
                "gene_sets must have the columns 'source' and 'target', found "
                f"{list(given.columns)}; rename them, or pass a dict of lists of genes."
            )
        given = given.groupby("source")["target"].agg(list).to_dict()
    if not isinstance(given, dict) or any(isinstance(own, str) for own in given.values()):
        raise TypeError(
            f"gene_sets must be a dict of lists of genes, or a DataFrame; found {type(given).__name__}."
        )
    sets = {str(name): set(map(str, own)) for name, own in given.items()}
    if not any(own & set(genes) for own in sets.values()):
        some = sorted(set().union(*sets.values()))[:3]
        raise ValueError(
            f"No gene of gene_sets, such as {some}, is in var_names, such as {genes[:3]}. Call "
            "genes as var_names does."
        )
    return sets


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def _composition(
    types: list[str], shares: NDArray[np.float64], own: NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Types by falling share among the region's cells of known type."""
    inside, overall = shares[own].sum(axis=0), shares.sum(axis=0)
    if not inside.sum() > 0:
        return []
    inside, overall = inside / inside.sum(), overall / overall.sum()
    return [
        {"type": types[k], "share": float(inside[k]), "over_all": float(inside[k] / overall[k])}
        for k in np.argsort(-inside, kind="stable")
        if inside[k] > 0
    ]


def _neighbors(
    names: list[str], own: int, found: NDArray[np.float64], expected: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """Other regions by their share of the contacts with cells of other regions."""
    found, expected = np.delete(found, own), np.delete(expected, own)
    rows = []
    for k in np.argsort(-found, kind="stable")[: np.count_nonzero(found)]:
        share = found[k] / found.sum()
        over = _ratio(share, expected[k] / expected.sum())
        name = names[k + (k >= own)]
        rows.append({"region": name, "share": float(share), "over_expected": over})
    return rows


class _Region(NamedTuple):
    """Cells of a region, (n,), which cells touch, their expression, and the slices."""

    own: NDArray[np.bool_]
    touching: sparse.csr_array
    values: sparse.csr_matrix
    slices: Slices

    def places(self) -> list[dict[str, Any]]:
        """Size and pieces in each slice that has the region."""
        rows = []
        for name, cells in zip(self.slices.names, self.slices.rows, strict=True):
            here = np.zeros_like(self.own)
            here[cells] = self.own[cells]
            if here.any():
                n_pieces, largest = pieces(self.touching, here)
                size = {"n_cells": int(here.sum()), "share": float(self.own[cells].mean())}
                rows.append(
                    {"slice": name or "all", **size, "n_pieces": n_pieces, "largest_piece": largest}
                )
        return rows

    def patterns(self, genes: list[str], n_genes: int) -> list[dict[str, Any]]:
        """Genes whose expression is most alike where cells of the region touch."""
        inside = self.values[self.own]
        detected = np.asarray((inside > 0).mean(axis=0)).ravel()
        columns = np.argsort(-detected, kind="stable")[:_MOST_GENES]
        columns = columns[detected[columns] >= _DETECTED]
        total, weight = np.zeros(len(columns)), 0
        for cells in self.slices.rows:
            rows = cells[self.own[cells]]
            if len(rows) >= _FEWEST and len(columns):
                graph = self.touching[rows][:, rows]
                total += len(rows) * morans_i(graph, self.values[rows][:, columns])
                weight += len(rows)
        order = np.argsort(-total, kind="stable")[:n_genes]
        return [
            {"gene": genes[columns[k]], "morans_i": float(total[k] / weight)}
            for k in order
            if total[k] > 0
        ]


def _agreement(
    values: sparse.csr_matrix, codes: NDArray[np.int64], slices: Slices, n_regions: int
) -> list[float | None]:
    """Of each region the mean correlation between slices of what sets it apart from the rest."""
    profiles: list[list[NDArray[np.float64]]] = [[] for _ in range(n_regions)]
    for cells in slices.rows if len(slices.rows) > 1 else []:
        own = codes[cells]
        sizes = np.bincount(own[own >= 0], minlength=n_regions)
        means = group_means(values[cells], own, n_regions)
        whole = np.asarray(values[cells].mean(axis=0)).ravel()
        for k in np.flatnonzero((sizes >= _FEWEST) & (len(cells) - sizes >= _FEWEST)):
            rest = (whole * len(cells) - means[k] * sizes[k]) / (len(cells) - sizes[k])
            profiles[k].append(means[k] - rest)
    found: list[float | None] = []
    for one in profiles:
        pairs = itertools.combinations([profile for profile in one if np.ptp(profile) > 0], 2)
        correlations = [np.corrcoef(*pair)[0, 1] for pair in pairs]
        found.append(float(np.mean(correlations)) if correlations else None)
    return found
