"""Expression of a few genes for pictures, log-normalised from raw counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import kinds_of_others

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pandas as pd
    from anndata import AnnData

_TARGET_SUM: Final = 10_000.0


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
    from scipy import sparse

    parts = []
    for block in read_counts(adata):
        totals = np.asarray(block.sum(axis=1), dtype=np.float64).ravel()
        factors = np.divide(_TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
        scaled = sparse.diags_array(factors) @ block
        parts.append(sparse.csr_matrix(scaled).log1p().astype(np.float32))
    values = sparse.vstack(parts, format="csr")
    obs, var = (pd.DataFrame(index=names) for names in (adata.obs_names, adata.var_names))
    return AnnData(values, obs=obs, var=var)
