"""``stofm.pl.imputation``: measured and imputed expression of a gene, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from stofm import metrics
from stofm._edge.counts import read_counts
from stofm._edge.features import read_features
from stofm._edge.records import frame_names, read_record
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm.pl._maps import draw_maps
from stofm.pl._panels import finish
from stofm.pl._slices import read_panels
from stofm.pl._style import Values, nearest_names, value_limits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from stofm.pl._slices import Panel

_TARGET_SUM: Final = 10_000.0


def imputation(
    adata: AnnData,
    gene: str | Sequence[str],
    *,
    measured: AnnData | None = None,
    layer: str | None = None,
    key: str = Obsm.IMPUTED,
    shared: bool = False,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = "p1",
    vmax: float | str | None = "p99",
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    size: float | None = None,
    ncols: int = 4,
    invert_y: bool = True,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw a gene as it was measured beside what was imputed, with their correlation.

    Measured counts are normalised for the picture as :func:`stofm.tl.impute` normalises them, to
    ``log1p(10,000 x count / total)``, with the total over the genes that the head read, which the
    record of `key` names; without a record over the genes of `adata` that were not imputed; over
    all of `measured` if it has none of these. The AnnData stays as it is. The correlation is
    Pearson's over the cells of the panel. A gene that was not measured has its imputed map only.

    Parameters
    ----------
    adata
        AnnData with imputed genes, such as of :func:`stofm.tl.impute`, or SpatialData.
    gene
        Gene among the columns of ``obsm[key]``, or several.
    measured
        AnnData of the same cells, found by ``obs_names``, with the gene's raw counts; cells that
        it lacks are light grey. None: `adata`.
    layer
        Layer of `measured` with raw counts; None: ``X``.
    key
        Entry of ``obsm`` with a DataFrame of imputed genes.
    shared
        One colour scale for both maps of a gene: imputed values vary less than measured ones,
        and look pale in it. False: each map has its own.
    cmap, vmin, vmax
        Colour map and its ends: a number, a percentile such as ``"p99"``, or None for the
        extreme.
    library_key
        Column of ``obs`` that separates slices. None: the one that the sub-slices were made
        with, if any.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    size
        Area of a point in square points. None: fitted to the distance between cells.
    ncols
        Panels side by side.
    invert_y
        Let y grow downwards, as in images.
    table_key
        Table of a SpatialData.
    ax
        Axes to draw into, gene by gene, measured first, one for each slice. None: a new figure.
    show
        Show the figure. None: where scanpy would, except with a backend that only writes files.
    save
        File to write (150 dpi, points as pixels in vector formats).

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Raises
    ------
    KeyError
        The imputed values, the gene, the layer, the coordinates or a slice's column is missing;
        or `measured` is given and lacks the gene.
    TypeError
        ``obsm[key]`` is no DataFrame.
    ValueError
        The measured values are no raw counts, `measured` has none of the cells or some twice, or
        `ax` does not fit the number of panels.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> values = np.log1p(adata[:, "GFAP"].X.toarray())
    >>> adata.obsm["stofm_imputed"] = pd.DataFrame(values, adata.obs_names, ["GFAP"])
    >>> measured, imputed = st.pl.imputation(adata, "GFAP", show=False)
    >>> measured.get_title()
    'GFAP, measured'
    """
    adata = resolve_table(adata, table_key)
    genes = [gene] if isinstance(gene, str) else list(gene)
    imputed = _read_imputed(adata, genes, key)
    counted = _genes_in_totals(adata, key)
    known = _read_measured(adata, genes, measured, layer, counted)
    panels = read_panels(adata, spatial_key, library_key)
    colors: list[Values] = []
    titles: list[list[str]] = []
    for name in genes:
        maps = {"imputed": imputed[name].to_numpy()}
        if name in known:
            maps = {"measured": known[name].to_numpy(), **maps}
        together = np.concatenate(list(maps.values()))
        for which, values in maps.items():
            limits = value_limits(together if shared else values, vmin, vmax)
            colors.append(Values(name, values, *limits, cmap))
            true = maps.get("measured") if which == "imputed" else None
            titles.append([_title(panel, name, which, values, true) for panel in panels])
    axes = draw_maps(
        panels, colors, titles=titles, ncols=_even(ncols), size=size, invert_y=invert_y, ax=ax,
        what=f"maps of {genes}",
    )  # fmt: skip
    return finish(axes, show=show, save=save)


def _read_imputed(adata: AnnData, genes: list[str], key: str) -> pd.DataFrame:
    if key not in adata.obsm:
        msg = (
            f"There is no obsm[{key!r}]: st.tl.impute(adata, head=head) writes it, or pass `key`."
            f"{nearest_names(key, adata.obsm)}"
        )
        raise KeyError(msg)
    stored = adata.obsm[key]
    if not isinstance(stored, pd.DataFrame):
        msg = (
            f"obsm[{key!r}] must be a DataFrame with a column for each gene, found "
            f"{type(stored).__name__}."
        )
        raise TypeError(msg)
    places = {name: k for k, name in enumerate(frame_names(adata, key))}
    if not genes:
        msg = f"Name a gene to draw; obsm[{key!r}] has {list(places)[:10]}."
        raise ValueError(msg)
    for gene in genes:
        if gene not in places:
            msg = f"{gene!r} was not imputed into obsm[{key!r}]."
            raise KeyError(msg + nearest_names(gene, places))
    chosen = stored.iloc[:, [places[gene] for gene in genes]]
    return chosen.astype(np.float64).set_axis(genes, axis=1)


def _genes_in_totals(adata: AnnData, key: str) -> pd.Index:
    """Genes that the head read, as it recorded; without a record all that were not imputed."""
    params = (read_record(adata, key) or {}).get("params", {})
    read = params.get("inputs", adata.var_names.difference(frame_names(adata, key)))
    return pd.Index(read, dtype=object)


def _read_measured(
    adata: AnnData,
    genes: list[str],
    measured: AnnData | None,
    layer: str | None,
    counted: pd.Index,
) -> pd.DataFrame:
    """Log-normalised expression (n_obs, genes that were measured), NaN for cells without it."""
    source = adata if measured is None else measured
    there = [gene for gene in genes if gene in source.var_names]
    if measured is not None and len(there) < len(genes):
        lacking = next(gene for gene in genes if gene not in there)
        msg = f"`measured` has no gene {lacking!r}.{nearest_names(lacking, source.var_names)}"
        raise KeyError(msg)
    if not there:
        return pd.DataFrame(index=adata.obs_names)
    if measured is not None:
        _require_same_cells(adata, measured)
    values = _log_normalize(source, there, layer, counted)
    return values if measured is None else values.reindex(adata.obs_names)


def _require_same_cells(adata: AnnData, measured: AnnData) -> None:
    names = measured.obs_names
    if not names.is_unique or not names.isin(adata.obs_names).any():
        msg = (
            "`measured` must hold cells of `adata` under their obs_names, each once; found "
            f"{list(names[:3])}, expected {list(adata.obs_names[:3])}."
        )
        raise ValueError(msg)


def _log_normalize(
    adata: AnnData, genes: list[str], layer: str | None, counted: pd.Index
) -> pd.DataFrame:
    # An antibody may have the name of its gene.
    own = np.flatnonzero(read_features(adata).is_gene)
    columns = own[adata.var_names[own].get_indexer(genes)]
    is_counted = adata.var_names.isin(counted)
    weights = (is_counted | (not is_counted.any())).astype(np.float64)
    parts = []
    for block in read_counts(adata, layer=layer):
        totals = block @ weights
        factors = np.divide(_TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
        parts.append(np.log1p(block[:, columns].toarray() * factors[:, None]))
    return pd.DataFrame(np.concatenate(parts), index=adata.obs_names, columns=genes)


def _title(
    panel: Panel,
    gene: str,
    which: str,
    values: NDArray[np.float64],
    true: NDArray[np.float64] | None,
) -> str:
    title = f"{panel.name}: {gene}, {which}" if panel.name else f"{gene}, {which}"
    if true is None:
        return title
    rows = panel.rows[np.isfinite(true[panel.rows]) & np.isfinite(values[panel.rows])]
    if len(rows) < 2:
        return title
    r = metrics.pearson(true[rows], values[rows])
    return title if np.isnan(r) else f"{title} (r = {r:.2f})"


def _even(ncols: int) -> int:
    """Columns in which the two maps of a gene stay beside each other."""
    return max(2, ncols - ncols % 2)
