"""Expression, log-normalised from raw counts, and genes that mark groups of cells."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import kinds_of_others
from stofm._settings import keeping_threads

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

#: Counts are scaled to this total before the logarithm.
_TARGET_SUM: Final = 10_000.0


def log_normalised(
    counts: sparse.csr_matrix,
    totals: NDArray[np.float64] | None = None,
    *,
    target_sum: float = _TARGET_SUM,
) -> sparse.csr_matrix:
    """``log1p(target_sum x count / total)`` of each cell, (n, n_genes); 0 for a cell without counts.

    `totals` (n,) are the counts' own sums by default.
    """
    if totals is None:
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    factors = np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
    scaled = counts.data * np.repeat(factors, np.diff(counts.indptr))
    values = np.log1p(scaled).astype(np.float32)
    return sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def log_normalised_genes(
    adata: AnnData,
    genes: Sequence[str],
    *,
    layer: str | None = None,
    counted: Collection[str] = (),
) -> pd.DataFrame:
    """``log1p(10,000 x count / total)`` of some of `var_names`, float64 (n_obs, n_genes).

    Columns of one name are summed. Totals are over the genes in `counted`, or over all genes if
    `adata` has none of these. Raises NotRawCountsError where the matrix holds something other than
    raw counts.
    """
    import pandas as pd

    names, is_gene = adata.var_names, kinds_of_others(adata) == ""
    is_counted = names.isin(list(counted))
    weights = (is_counted | (not is_counted.any())).astype(np.float64)
    # An antibody may have the same name as its gene.
    columns = [np.flatnonzero((names == gene) & is_gene) for gene in genes]
    parts = []
    for block in read_counts(adata, layer=layer):
        totals = block @ weights
        factors = np.divide(_TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
        own = [np.asarray(block[:, one].sum(axis=1)).ravel() for one in columns]
        parts.append(np.log1p(np.stack(own, axis=1) * factors[:, None]))
    return pd.DataFrame(np.concatenate(parts), index=adata.obs_names, columns=list(genes))


def log_normalised_table(adata: AnnData) -> AnnData:
    """``log1p(10,000 x count / total)`` of all genes, in a new AnnData with the same names.

    Raises NotRawCountsError where ``X`` holds something other than raw counts.
    """
    import pandas as pd
    from anndata import AnnData

    values = sparse.vstack(list(map(log_normalised, read_counts(adata))), format="csr")
    obs, var = (pd.DataFrame(index=names) for names in (adata.obs_names, adata.var_names))
    return AnnData(values, obs=obs, var=var)


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
