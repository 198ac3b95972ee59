"""``stofm.pl.imputation``: measured and imputed expression of a gene, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from stofm import metrics
from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import kinds_of_others
from stofm._edge.records import frame_names, read_record
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm.pl._colors import Values, nearest_names, value_limits
from stofm.pl._deconvolution import read_frame
from stofm.pl._figure import finish
from stofm.pl._maps import Look, draw_maps
from stofm.pl._panels import read_panels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from stofm.pl._panels import Panel

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
    imputed = read_frame(adata, key, gene, "impute", "gene")
    # Genes that the head read, as it recorded; without a record all that were not imputed.
    params = (read_record(adata, key) or {}).get("params", {})
    counted = params.get("inputs", adata.var_names.difference(frame_names(adata, key)))
    known = _read_measured(adata, list(imputed), measured, layer, pd.Index(counted, dtype=object))
    panels = read_panels(adata, spatial_key, library_key)
    colors: list[Values] = []
    titles: list[list[str]] = []
    for name in imputed:
        maps = {"measured": known[name].to_numpy()} if name in known else {}
        maps["imputed"] = imputed[name].to_numpy()
        together = np.concatenate(list(maps.values()))
        for which, values in maps.items():
            limits = value_limits(together if shared else values, vmin, vmax)
            colors.append(Values(name, values, *limits, cmap))
            true = maps.get("measured") if which == "imputed" else None
            titles.append([_title(panel, f"{name}, {which}", values, true) for panel in panels])
    # An even number of columns keeps the two maps of a gene beside each other.
    look = Look(max(2, ncols - ncols % 2), size, invert_y, ax)
    axes = draw_maps(panels, colors, look, titles=titles, what=f"maps of {list(imputed)}")
    return finish(axes, show=show, save=save)


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
    if measured is not None:
        if lacking := [gene for gene in genes if gene not in there]:
            near = nearest_names(lacking[0], source.var_names)
            msg = f"`measured` has no gene {lacking[0]!r}.{near}"
            raise KeyError(msg)
        names = measured.obs_names
        if not names.is_unique or not names.isin(adata.obs_names).any():
            msg = (
                "`measured` must hold cells of `adata` under their obs_names, each once; found "
                f"{list(names[:3])}, expected {list(adata.obs_names[:3])}."
            )
            raise ValueError(msg)
    if not there:
        return pd.DataFrame(index=adata.obs_names)
    # An antibody may have the name of its gene.
    own = np.flatnonzero(kinds_of_others(source) == "")
    columns = own[source.var_names[own].get_indexer(there)]
    is_counted = source.var_names.isin(counted)
    weights = (is_counted | (not is_counted.any())).astype(np.float64)
    parts = []
    for block in read_counts(source, layer=layer):
        totals = block @ weights
        factors = np.divide(_TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
        parts.append(np.log1p(block[:, columns].toarray() * factors[:, None]))
    values = pd.DataFrame(np.concatenate(parts), index=source.obs_names, columns=there)
    return values if measured is None else values.reindex(adata.obs_names)


def _title(
    panel: Panel, text: str, values: NDArray[np.float64], true: NDArray[np.float64] | None
) -> str:
    """Name of a map, with the correlation where there is a `true` one."""
    title = panel.titled(text)
    if true is not None:
        rows = panel.rows[np.isfinite(true[panel.rows]) & np.isfinite(values[panel.rows])]
        r = metrics.pearson(true[rows], values[rows]) if len(rows) > 1 else np.nan
        title += "" if np.isnan(r) else f" (r = {r:.2f})"
    return title
