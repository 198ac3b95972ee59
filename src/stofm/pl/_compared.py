"""What was predicted of genes, beside what was measured of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stofm import metrics
from stofm._edge.expression import log_normalised_genes
from stofm._edge.tables import frame_names, read_record
from stofm._messages import require_name
from stofm.pl._colors import Values, value_limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.pl._maps import Panel


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
