"""Many genes, each edited by itself in the same cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from stofm.perturb.null import compare
from stofm.perturb.perturbing import gene_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from stofm.perturb.perturbing import Question

#: A gene is expressed if it is in the input of this share of the cells.
_EXPRESSED: Final = 0.05


def screen_genes(
    question: Question,
    genes: Sequence[str] | Literal["expressed"],
    change: Literal["delete", "first"],
) -> pd.DataFrame:
    """Edit each gene by itself, test it against genes like it, and rank by z."""
    if change not in ("delete", "first"):
        raise ValueError(f"edit must be 'delete' or 'first', found {change!r}.")
    subject = question.subject
    if isinstance(genes, str):
        if genes != "expressed":
            raise ValueError(f"genes must be 'expressed' or a list of names, found {genes!r}.")
        is_common = question.n_with_gene >= max(1.0, _EXPRESSED * len(question.cells))
        tokens = np.flatnonzero(is_common)
        names = subject.names(tokens)
    else:
        names = list(dict.fromkeys(genes))
        tokens = np.array([subject.gene(name) for name in names], dtype=np.int64)
    if not len(tokens):
        raise ValueError(
            "There is no gene to screen: pass `genes` by name, or `cells` in which more are detected."
        )
    # Enough genes are each other's null; else others are embedded for it.
    among = tokens if len(np.unique(tokens)) > question.n_null else None
    null: dict[int, NDArray[np.int64]] = {}
    for gene in tokens if question.n_null else ():
        null |= question.alike({int(gene): change}, among)
    every = np.unique(np.concatenate([tokens, *null.values()]))
    found = question.gene_effects([{int(gene): change} for gene in every])
    effect = dict(zip(every.tolist(), found.tolist(), strict=True))
    tests = [
        compare(effect[int(gene)], np.array([effect[int(k)] for k in null.get(int(gene), ())]))
        for gene in tokens
    ]
    table = gene_table(names, tests, question.n_with_gene[tokens])
    order = ["z", "effect"] if question.n_null else ["effect"]
    return table.sort_values(order, ascending=False, kind="stable")
