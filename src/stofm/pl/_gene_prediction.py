"""``stofm.pl.gene_prediction``, and maps of predicted genes beside what was measured of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stofm import metrics
from stofm._edge.expression import log_normalised_genes
from stofm._edge.tables import frame_names, read_record, resolve_table
from stofm._keys import Obsm
from stofm._messages import require_name
from stofm.pl._colors import Values, read_frame, value_limits
from stofm.pl._maps import Look, draw_maps
from stofm.pl._tissue import Around, open_tissue

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from stofm.pl._maps import Panel
    from stofm.pl._style import Save


def gene_prediction(
    adata: Any,
    gene: str | Sequence[str],
    *,
    measured: AnnData | None = None,
    layer: str | None = None,
    key: str = Obsm.PREDICTED,
    image: Any = None,
    scale: float | Mapping[str, float] | None = None,
    alpha: float = 0.7,
    shared: bool = False,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = "p1",
    vmax: float | str | None = "p99",
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    size: float | None = None,
    ncols: int = 4,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw a gene as it was measured beside what the image predicts, over the tissue.

    As :func:`stofm.pl.imputation` draws imputed genes, which says how measured counts are normalised
    and what the correlation is; a gene that was not measured has its predicted map only.

    Parameters
    ----------
    adata
        AnnData with predicted genes by :func:`stofm.tl.predict_genes` and an image, or SpatialData.
    gene
        Gene among the columns of ``obsm[key]``, or several.
    measured, layer
        AnnData of the same cells with the gene's raw counts, and their layer. None: `adata`, ``X``.
    key
        Entry of ``obsm`` with a DataFrame of predicted genes.
    image, scale
        Another image, and its pixels per unit of the coordinates: see :func:`stofm.im.embed`.
    shared
        One colour scale for both maps of a gene; False: each map has its own.
    ax
        Axes to draw into, gene by gene, measured first, one for each slice. None: a new figure.

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Other Parameters
    ----------------
    alpha
        How opaque points are.
    cmap, vmin, vmax, library_key, spatial_key, size, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        The predicted values, a gene, the layer or the image is missing.
    TypeError
        ``obsm[key]`` is no DataFrame.
    ValueError
        The measured values are no raw counts, or `ax` does not fit the number of panels.

    See Also
    --------
    stofm.tl.predict_genes : predicts expression from the image.
    stofm.pl.imputation : genes imputed from other genes.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> import stofm as st
    >>> adata = st.datasets.load("mouse_olfactory_bulb_st")
    >>> values = np.log1p(adata[:, "Penk"].X.toarray())
    >>> adata.obsm["stofm_predicted"] = pd.DataFrame(values, adata.obs_names, ["Penk"])
    >>> measured, predicted = st.pl.gene_prediction(adata, "Penk", show=False)
    """
    table = resolve_table(adata, table_key)
    predicted = read_frame(table, key, gene, "predict_genes(adata, aligner)", "gene")
    limits: dict[str, Any] = {"shared": shared, "cmap": cmap, "vmin": vmin, "vmax": vmax}
    around = Around(image=image, scale=scale, needs_image=True)
    with open_tissue(adata, table_key, spatial_key, library_key, around) as (panels, tissue):
        colors, titles = compare_maps(
            table, predicted, panels, "predicted", key=key, measured=measured, layer=layer, **limits
        )
        # An even number of columns keeps the two maps of a gene beside each other.
        n_columns = max(2, ncols - ncols % 2)
        look = Look(ax, n_columns, size, show, save, "gene_prediction", tissue, alpha=alpha)
        return draw_maps(panels, colors, look, titles=titles, what=f"maps of {list(predicted)}")


def compare_maps(
    adata: AnnData,
    predicted: pd.DataFrame,
    panels: Sequence[Panel],
    word: str,
    *,
    key: str,
    measured: AnnData | None,
    layer: str | None,
    shared: bool,
    cmap: Any,
    vmin: float | str | None,
    vmax: float | str | None,
) -> tuple[list[Values], list[list[str]]]:
    """Maps of genes, measured (where they were) and predicted in turn, with a title for each panel.

    `word` is how predicted ones are called; see :func:`stofm.pl.imputation`.
    """
    # Genes whose counts are the total, as recorded; without a record all that were not predicted.
    params = (read_record(adata, key) or {}).get("params", {})
    counted = params.get("inputs", adata.var_names.difference(frame_names(adata, key)))
    known = _read_measured(adata, list(predicted), measured, layer, counted)
    colors: list[Values] = []
    titles: list[list[str]] = []
    for name in predicted:
        maps = {"measured": known[name].to_numpy()} if name in known else {}
        maps[word] = predicted[name].to_numpy()
        together = np.concatenate(list(maps.values()))
        for which, values in maps.items():
            limits = value_limits(together if shared else values, vmin, vmax)
            colors.append(Values(name, values, *limits, cmap))
            true = maps.get("measured") if which == word else None
            titles.append([_title(panel, f"{name}, {which}", values, true) for panel in panels])
    return colors, titles


def _read_measured(
    adata: AnnData,
    genes: list[str],
    measured: AnnData | None,
    layer: str | None,
    counted: Sequence[str],
) -> pd.DataFrame:
    """Log-normalised expression (n_obs, genes that were measured), NaN for cells without it."""
    source = adata if measured is None else measured
    there = [gene for gene in genes if gene in source.var_names]
    if measured is not None:
        for gene in genes:
            require_name(gene, measured.var_names, f"`measured` has no gene {gene!r}.")
        names = measured.obs_names
        if not names.is_unique or not names.isin(adata.obs_names).any():
            found, expected = list(names[:3]), list(adata.obs_names[:3])
            raise ValueError(
                f"`measured` must hold cells of `adata` once: found {found}, expected {expected}."
            )
    if not there:
        return pd.DataFrame(index=adata.obs_names)
    values = log_normalised_genes(source, there, layer=layer, counted=counted)
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
