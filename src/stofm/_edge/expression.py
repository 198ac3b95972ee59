"""Expression, log-normalised from raw counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import sparse

from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import kinds_of_others

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

    Columns of one name are summed. The totals are over the genes in `counted`, or over all if `adata`
    has none of these. Raises NotRawCountsError where the matrix holds something other than raw counts.
    """
    import pandas as pd

    names, is_gene = adata.var_names, kinds_of_others(adata) == ""
    is_counted = names.isin(list(counted))
    weights = (is_counted | (not is_counted.any())).astype(np.float64)
    # An antibody may have the name of its gene.
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
