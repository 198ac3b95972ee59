"""Raw counts of simulated cells: Gamma-Poisson, with dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stofm.datasets._tissues import Panel

#: Entries of a dense block of cells by genes; bounds the memory.
_BLOCK: Final = 4_000_000


def draw_counts(
    mixture: NDArray[np.float32],
    fields: NDArray[np.float32],
    depth: NDArray[np.float32],
    panel: Panel,
    *,
    dropout: float,
    rng: np.random.Generator,
) -> sp.csr_matrix:
    """Draw the counts of cells.

    Parameters
    ----------
    mixture
        (n_cells, n_types) share of each type's transcripts in a cell.
    fields
        (n_cells, 2) fields of position, -1 to 1.
    depth
        (n_cells,) expected counts of a cell of average size.
    dropout
        Probability that a gene is not detected at all; falls with its expected count.

    Returns
    -------
    (n_cells, n_genes) int32.
    """
    n_cells, n_genes = len(mixture), len(panel.symbols)
    step = max(1, _BLOCK // n_genes)
    blocks = [
        _draw_block(mixture[rows], fields[rows], depth[rows], panel, dropout=dropout, rng=rng)
        for rows in (slice(start, start + step) for start in range(0, n_cells, step))
    ]
    return sp.vstack(blocks, format="csr")


def _draw_block(
    mixture: NDArray[np.float32],
    fields: NDArray[np.float32],
    depth: NDArray[np.float32],
    panel: Panel,
    *,
    dropout: float,
    rng: np.random.Generator,
) -> sp.csr_matrix:
    expected = mixture @ panel.expression
    expected *= np.exp(fields @ panel.gradients)
    expected *= depth[:, None]
    rate = rng.standard_gamma(panel.shape, expected.shape, dtype=np.float32)
    rate *= expected
    rate /= panel.shape
    counts = rng.poisson(rate)
    rows, genes = counts.nonzero()
    lost = rng.random(len(rows)) < dropout * np.exp(-expected[rows, genes])
    rows, genes = rows[~lost], genes[~lost]
    values = counts[rows, genes].astype(np.int32)
    return sp.csr_matrix((values, (rows, genes)), shape=counts.shape)
