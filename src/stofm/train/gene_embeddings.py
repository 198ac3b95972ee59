"""First gene embeddings: random, from the co-expression of genes, or from a table."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from stofm._logging import logger
from stofm._messages import warn
from stofm.genes.gene_table import GeneTable, require_suffix
from stofm.spatial.virtual_cells import principal_components
from stofm.train.coexpression import initialize_from_coexpression

if TYPE_CHECKING:
    from os import PathLike

    from numpy.typing import NDArray

    from stofm.nn import Stofm
    from stofm.train.corpus import Corpus
    from stofm.train.pretraining import Initializer

#: What is no table.
WORDS: Final = ("random", "coexpression")
#: Share of the vocabulary that a table may lack without a warning.
_MOST_LACKING: Final = 0.5


def require_gene_embeddings(gene_embeddings: str | PathLike[str]) -> None:
    """Refuse what is neither a word nor the name of a table.

    Raises
    ------
    ValueError
        It is neither.
    """
    if gene_embeddings not in WORDS:
        words = ", ".join(map(repr, WORDS))
        require_suffix(gene_embeddings, f"gene_embeddings must be {words} or a table")


def read_gene_embeddings(gene_embeddings: str | PathLike[str]) -> str | GeneTable:
    """Read the table that gene embeddings are to come from; ``"random"`` and the like stay.

    Raises
    ------
    FileNotFoundError, ValueError
        See :meth:`~stofm.genes.gene_table.GeneTable.read`.
    """
    require_gene_embeddings(gene_embeddings)
    return str(gene_embeddings) if gene_embeddings in WORDS else GeneTable.read(gene_embeddings)


def make_initializer(
    gene_embeddings: str | GeneTable, model: Stofm, *, seed: int
) -> Initializer | None:
    """What sets a model's first gene embeddings; None to leave them.

    Raises
    ------
    ValueError
        The table has fewer numbers than gene embeddings, or no gene of the model.
    """
    if isinstance(gene_embeddings, GeneTable):
        return partial(_put_in, *_embeddings_of(gene_embeddings, model))
    if gene_embeddings == "random":
        return None
    return partial(initialize_from_coexpression, seed=seed)


def _embeddings_of(table: GeneTable, model: Stofm) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tokens that a table has, and their embeddings.

    These are the table's rows less their mean or, if the table is wider than embeddings, the first
    principal components of the rows. They are as spread as the embeddings of a new model.
    """
    encoder = model.cell_encoder
    width = encoder.gene_embeddings.weight.shape[1]
    if table.width < width:
        msg = (
            f"{table.file} has {table.width} numbers for each gene, and gene embeddings have {width}. "
            "Lower that (d_gene of the cell encoder, or d_hidden where that is not set), or take a "
            "wider table."
        )
        raise ValueError(msg)
    vocabulary = model.vocabulary
    rows = table.rows_of(vocabulary)
    found = table.values[rows[rows >= 0]]
    if table.width > width:
        values = principal_components(found, width)
    else:
        values = found - found.mean(axis=0, dtype=np.float64)
    spread = float(np.sqrt(np.mean(values**2)))
    if not spread > 0:
        msg = f"{table.file} has the same numbers for all genes of the model, which tell nothing."
        raise ValueError(msg)
    values *= float(encoder.bert.config.initializer_range) / spread
    _tell_lacking(table, len(values), vocabulary.n_genes)
    return vocabulary.tokens[rows >= 0], values.astype(np.float32)


def _tell_lacking(table: GeneTable, n_found: int, n_genes: int) -> None:
    n_lacking = n_genes - n_found
    tell = warn if n_lacking > _MOST_LACKING * n_genes else logger.info
    tell(
        f"{n_found} of the model's {n_genes} genes begin with embeddings from {table.file}; the other "
        f"{n_lacking}, which it lacks, keep theirs."
    )


def _put_in(
    tokens: NDArray[np.int32], values: NDArray[np.float32], corpus: Corpus, model: Stofm
) -> None:
    """Set the embeddings of some tokens, in place."""
    del corpus
    words = model.cell_encoder.gene_embeddings.weight
    with torch.no_grad():
        words[torch.from_numpy(tokens.astype(np.int64))] = torch.from_numpy(values).to(words)
