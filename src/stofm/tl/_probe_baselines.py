"""What ``stofm.tl.probe`` compares representations with: counts, their components and neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import sparse

from stofm._counts import read_counts
from stofm.genes import embedded_vocabulary
from stofm.heads.embeddings import counts_layer
from stofm.heads.gene_columns import GeneColumns, choose_panel, selector
from stofm.heads.inputs import N_NEIGHBORS
from stofm.heads.targets import log_normalised
from stofm.spatial.neighbor_graph import neighbor_means
from stofm.tl._probe_scores import side_by_side

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.sections import Sections

PCS: Final = "PCs"
PCS_AND_NEIGHBORS: Final = "PCs + neighbours"
LOG_COUNTS: Final = "log counts"
_N_COMPONENTS: Final = 50
#: Of more genes than this those that vary most are read.
_MOST_GENES: Final = 3000


def log_counts(sections: Sections, *, layer: str | None = None) -> sparse.csr_matrix:
    """Log-normalised counts of the genes that all tables have, (n_obs, n_genes).

    A cell's counts, of all its genes, are scaled to 10,000.

    Raises
    ------
    KeyError
        There is no such layer.
    ValueError
        A matrix does not hold raw counts, or the tables share fewer than two genes.
    """
    vocabulary = embedded_vocabulary()
    columns = sections.each(lambda table: GeneColumns.read(table, vocabulary, must_map=False))
    genes = choose_panel(columns, ()).inputs
    if len(genes) < 2:
        msg = f"The AnnData have a single gene in common, {genes[0].name!r}; two are needed."
        raise ValueError(msg)
    own = iter(columns)

    def read(table: AnnData) -> sparse.csr_matrix:
        names = next(own)
        choice = selector([names.same_gene(gene) for gene in genes], table.n_vars)
        parts = [
            log_normalised(
                sparse.csr_matrix(block @ choice),
                np.asarray(block.sum(axis=1, dtype=np.float64)).ravel(),
            )
            for block in read_counts(table, layer=counts_layer(table, layer))
        ]
        return sparse.vstack(parts, format="csr")

    return sparse.vstack(sections.each(read), format="csr")


def most_variable(values: sparse.csr_matrix) -> sparse.csr_matrix:
    """Of more than 3,000 genes those that vary most."""
    from sklearn.utils.sparsefuncs import mean_variance_axis

    if values.shape[1] <= _MOST_GENES:
        return values
    variance = mean_variance_axis(values, axis=0)[1]
    chosen = np.sort(np.argsort(-variance, kind="stable")[:_MOST_GENES])
    return sparse.csr_matrix(values[:, chosen])


def principal_components(values: sparse.csr_matrix) -> NDArray[np.float32]:
    """50 principal components of sparse values, (n_obs, 50), which are not made dense."""
    from sklearn.decomposition import PCA

    n_components = min(_N_COMPONENTS, min(values.shape) - 1)
    pca = PCA(n_components, svd_solver="arpack", random_state=0)
    scores: NDArray[np.float32] = pca.fit_transform(values.astype(np.float64)).astype(np.float32)
    return scores


def with_neighbors(
    components: NDArray[np.float32], sections: Sections, *, spatial_key: str
) -> NDArray[np.float32]:
    """Components beside their means over the ten nearest cells of the same slice."""
    means = neighbor_means(
        components, sections.coordinates(spatial_key), sections.slices.rows, N_NEIGHBORS
    )
    return side_by_side([components, means])
