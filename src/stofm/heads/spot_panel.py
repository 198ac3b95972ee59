"""Counts over a panel of genes, and what a head that was fitted on simulated spots reads of them.

Simulated spots have no place, and a measured slice has genes that they lack. Both are reduced to
the genes that they share before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import sparse

from stofm._edge.counts import read_counts
from stofm._messages import warn
from stofm.genes import rank_genes
from stofm.heads.components import principal_axes
from stofm.heads.gene_columns import map_columns
from stofm.heads.targets import log_normalised
from stofm.nn import choose_device, choose_dtype, encode_cells

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.options import Reading
    from stofm.nn import Stofm

#: Genes that enter the components: those that differ most between types.
_MAX_GENES: Final = 2000


def genes_of(adata: AnnData, model: Stofm, name: str) -> NDArray[np.int64]:
    """Return the place in the model's vocabulary of each column's gene, -1 for none.

    Parameters
    ----------
    name
        What `adata` is, in messages.
    """
    tokens = map_columns(adata, model.vocabulary, name).token_ids
    place = np.full(int(model.vocabulary.tokens.max()) + 2, -1, dtype=np.int64)
    place[model.vocabulary.tokens] = np.arange(len(model.vocabulary.tokens))
    # Token -1, no gene, reads the last entry.
    found: NDArray[np.int64] = place[tokens]
    return found


def read_panel_counts(
    adata: AnnData, genes: NDArray[np.integer], panel: NDArray[np.integer], layer: str | None
) -> sparse.csr_matrix:
    """Read raw counts over a panel; columns of one gene are added up, genes not there are 0.

    Parameters
    ----------
    adata
        Cells or spots x genes.
    genes
        (n_vars,) place in the vocabulary of each column's gene, from :func:`genes_of`.
    panel
        (n_genes,) places in the vocabulary, ascending.
    layer
        Layer with raw counts; None for ``X``.

    Returns
    -------
    (n_obs, n_genes) counts.
    """
    target = np.searchsorted(panel, genes)
    columns = np.flatnonzero(np.isin(genes, panel))
    shape = (adata.n_vars, len(panel))
    entries = (np.ones(len(columns), dtype=np.int64), (columns, target[columns]))
    choice = sparse.csr_matrix(entries, shape=shape)
    blocks = [sparse.csr_matrix(block @ choice) for block in read_counts(adata, layer=layer)]
    return sparse.csr_matrix(sparse.vstack(blocks, format="csr"))


def remark_on_empty(counts: sparse.csr_matrix) -> None:
    """Warn of spots of a query without counts in the panel, (n_obs, n_genes)."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    if n_empty := int((totals == 0).sum()):
        warn(
            f"{n_empty} of {len(totals)} spots have no counts in the genes that the head reads; what "
            "is predicted for them says nothing."
        )


@dataclass(frozen=True, eq=False)
class SpotPanel:
    """Genes that a head reads, and principal components of their expression.

    Attributes
    ----------
    genes
        (n_genes,) gene ids of the vocabulary, in its order.
    loadings
        (n_genes, n_components) of log-normalised counts; without columns for none.
    target_sum
        Total to which counts are scaled before the logarithm.
    """

    genes: NDArray[np.str_]
    loadings: NDArray[np.float32]
    target_sum: float

    def __post_init__(self) -> None:
        """Check how the parts fit together."""
        if self.loadings.ndim != 2 or len(self.loadings) != len(self.genes):
            msg = f"{len(self.genes)} genes, and loadings of shape {self.loadings.shape}."
            raise ValueError(msg)
        if not self.target_sum or not 0 < self.target_sum < np.inf:
            msg = f"target_sum must be positive, found {self.target_sum}."
            raise ValueError(msg)

    def places(self, model: Stofm) -> NDArray[np.int64]:
        """Places of the genes in the model's vocabulary."""
        rows = model.vocabulary.rows_by_id
        return np.array([rows[gene] for gene in self.genes.tolist()], dtype=np.int64)

    def features(
        self, counts: sparse.csr_matrix, model: Stofm, reading: Reading
    ) -> NDArray[np.float32]:
        """What the head reads of spots, (n_spots, d_cell + n_components): cell embeddings, and components.

        Parameters
        ----------
        counts
            (n_spots, n_genes) over the panel.
        model
            Model whose cell encoder to run.
        reading
            Where to run it, and whether to show a bar.
        """
        vocabulary, places = model.vocabulary, self.places(model)
        ranked = rank_genes(
            counts,
            vocabulary.tokens[places],
            vocabulary.medians[places],
            max_tokens=model.config.max_tokens,
            values=model.config.cell_encoder.reads_values,
        )
        device = choose_device(reading.device)
        embedded = encode_cells(
            model.cell_encoder,
            ranked,
            vocabulary,
            device=device,
            dtype=choose_dtype("auto", device),
            show_progress_bar=reading.show_progress_bar,
        )
        if not self.loadings.shape[1]:
            return embedded
        scores = log_normalised(counts, target_sum=self.target_sum) @ self.loadings
        return np.hstack([embedded, np.asarray(scores, dtype=np.float32)])


def component_loadings(
    counts: sparse.csr_matrix,
    mean_counts: NDArray[np.floating],
    *,
    target_sum: float,
    n_components: int,
) -> NDArray[np.float32]:
    """Return loadings of principal components of log-normalised counts.

    Of more than 2,000 genes those are used that differ most between types; the others' loadings
    are 0.

    Parameters
    ----------
    counts
        (n_spots, n_genes) to find the components from.
    mean_counts
        (n_types, n_genes) mean counts of each type.
    target_sum
        Total to which counts are scaled.
    n_components
        Number of components; fewer where there are fewer genes.

    Returns
    -------
    (n_genes, n_components).
    """
    profiles = log_normalised(sparse.csr_matrix(mean_counts), target_sum=target_sum).toarray()
    chosen = np.sort(np.argsort(-profiles.var(axis=0), kind="stable")[:_MAX_GENES])
    values = sparse.csr_matrix(log_normalised(counts, target_sum=target_sum)[:, chosen])
    if not n_components:
        return np.zeros((counts.shape[1], 0), dtype=np.float32)
    axes = principal_axes(values, n_components)[1]
    loadings = np.zeros((counts.shape[1], axes.shape[1]), dtype=np.float32)
    loadings[chosen] = axes
    return loadings
