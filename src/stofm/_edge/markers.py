"""Genes that mark groups of cells."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._settings import keeping_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Cells that a group has at least, and that others have, to be tested.
_FEWEST: Final = 3
#: Share of a group's cells that have a marker at least.
_DETECTED: Final = 0.1


def group_means(
    values: sparse.csr_matrix, codes: NDArray[np.int64], n_groups: int
) -> NDArray[np.float64]:
    """Means of values (n, d) over groups, (n_groups, d); 0 for an empty one. -1 is no group."""
    rows = np.flatnonzero(codes >= 0)
    sizes = np.maximum(np.bincount(codes[rows], minlength=n_groups), 1)
    shape = (n_groups, values.shape[0])
    averaging = sparse.csr_matrix((1 / sizes[codes[rows]], (codes[rows], rows)), shape=shape)
    return np.asarray((averaging @ values).todense())


def rank_markers(
    values: sparse.csr_matrix,
    genes: Sequence[str],
    codes: NDArray[np.int64],
    n_groups: int,
    n_genes: int,
) -> list[list[dict[str, Any]]]:
    """Genes that each group has more of than all other cells, by scanpy's t-test.

    Parameters
    ----------
    values
        (n, n_vars) log-normalised expression.
    genes
        Their names.
    codes
        (n,) group of each cell; -1 for none, which counts as other.
    n_groups, n_genes
        Number of groups, and of genes of each.

    Returns
    -------
    Of each group its genes by falling score: names, scores, log2 fold changes, and shares of the cells
    inside and outside that have any count. None for groups of less than three cells.
    """
    import pandas as pd
    import scanpy as sc
    from anndata import AnnData

    sizes = np.bincount(codes[codes >= 0], minlength=n_groups)
    tested = np.flatnonzero((sizes >= _FEWEST) & (len(codes) - sizes >= _FEWEST))
    found: list[list[dict[str, Any]]] = [[] for _ in range(n_groups)]
    if not len(tested):
        return found
    names = np.array([*map(str, range(n_groups)), "other"])
    groups = pd.DataFrame(
        {"group": pd.Categorical(names[codes])}, index=[*map(str, range(len(codes)))]
    )
    table = AnnData(values, obs=groups)
    chosen = names[tested].tolist()
    with warnings.catch_warnings(), keeping_threads():
        # Genes without any count, and its own slow data frames.
        warnings.simplefilter("ignore")
        sc.tl.rank_genes_groups(table, "group", groups=chosen, method="t-test", use_raw=False)
    detected = group_means((values > 0).astype(np.float64), codes, n_groups)
    everywhere = np.asarray((values > 0).sum(axis=0), dtype=np.float64).ravel()
    result = table.uns["rank_genes_groups"]
    for group, name in zip(tested.tolist(), chosen, strict=True):
        columns = result["names"][name].astype(np.int64)
        inside = detected[group, columns]
        outside = (everywhere[columns] - inside * sizes[group]) / (len(codes) - sizes[group])
        fold = result["logfoldchanges"][name]
        is_marker = np.flatnonzero((fold > 0) & (inside >= _DETECTED))[:n_genes]
        found[group] = [
            {
                "gene": str(genes[columns[k]]),
                "score": float(result["scores"][name][k]),
                "log2_fold_change": float(fold[k]),
                "detected_inside": float(inside[k]),
                "detected_outside": float(outside[k]),
            }
            for k in is_marker
        ]
    return found
