"""What is said of a mapping of genes: what was found, what is left out, what is lost."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._features import read_features
from stofm._keys import Var
from stofm._logging import logger
from stofm._messages import warn
from stofm.genes.mapping import MOST_UNKNOWN, counts_of_shared_genes, spreadsheet_dates

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.pp._map_genes import MappedGenes

#: Unknown columns that are named, and the share of the unknown counts that makes them all.
_N_NAMED: Final = 3
_MOST_OF_UNKNOWN: Final = 0.9
#: Share of genes with names that became dates from which on more than a few are meant.
_MOST_DATES: Final = 0.01
#: Letters from which on the start of names says what a column is.
_SHORTEST_START: Final = 3


def report_mapping(
    adata: AnnData, genes: MappedGenes, counts_per_gene: NDArray[np.float64] | None
) -> None:
    """Log which genes were found by what names, and what is left out; warn of lost counts."""
    mapping = replace(genes.mapping, counts_per_gene=counts_per_gene)
    sources = " and ".join(filter(None, (genes.params["source"], genes.params["fallback"])))
    logger.info("%s; names in %s", mapping.summary(), sources)
    read_features(adata).report()
    if genes.advice:
        warn(
            f"{len(mapping.lost)} of {mapping.n_vars} genes were not found. Of those, {genes.advice}."
        )
    if dates := spreadsheet_dates(mapping.lost):
        tell = warn if len(dates) >= _MOST_DATES * mapping.n_vars else logger.info
        tell(
            f"{len(dates)} of {mapping.n_vars} genes are lost, because a spreadsheet turned their names "
            f"into dates, such as {dates[0]}. Take adata.var_names from where they came from."
        )
    if counts_per_gene is not None:
        warn_of_counts(adata, mapping.gene_index, counts_per_gene)


def warn_of_counts(
    adata: AnnData, genes: NDArray[np.integer], counts_per_column: NDArray[np.float64]
) -> None:
    """Warn if many counts are in columns that no gene was found for, or that share their gene.

    Parameters
    ----------
    genes
        (n_vars,) number of each column's gene, negative for none.
    counts_per_column
        (n_vars,) counts over all cells.
    """
    _warn_of_unknown_counts(adata, genes >= 0, counts_per_column)
    _warn_of_shared_genes(adata, genes, counts_per_column)


def _warn_of_shared_genes(
    adata: AnnData, genes: NDArray[np.integer], counts_per_column: NDArray[np.float64]
) -> None:
    shared, keep = counts_of_shared_genes(genes, counts_per_column)
    if not shared.any():
        return
    total = counts_per_column.sum()
    side, argument = ("before", "") if keep == "first" else ("after", "keep='last'")
    n_genes = len(np.unique(genes[shared > 0]))
    warn(
        f"{shared.sum() / total:.1%} of the counts are in {_columns(shared)} of {n_genes} "
        f"gene{'s' if n_genes > 1 else ''} that another column {side} them has too: "
        f"{_largest(adata, shared / total)}. The columns of a gene count together. If these are no "
        f"genes (antibodies, another modality), drop them: gene = adata.var[{Var.GENE!r}]; "
        f"adata = adata[:, ((gene == '') | ~gene.duplicated({argument})).to_numpy()].copy()"
    )


def _warn_of_unknown_counts(
    adata: AnnData, is_known: NDArray[np.bool_], counts_per_column: NDArray[np.float64]
) -> None:
    unknown = np.where(is_known, 0.0, counts_per_column)
    total = counts_per_column.sum()
    if unknown.sum() <= MOST_UNKNOWN * total:
        return
    warn(
        f"{unknown.sum() / total:.1%} of the counts are in {_columns(unknown)} that no gene of the "
        f"vocabulary was found for: {_largest(adata, unknown / total)}. They count in the "
        "totals that the values of all genes are shares of. If they are no genes (controls, "
        "spike-ins, antibodies, another species), drop them: "
        f"adata = adata[:, {_code_for_others(adata, is_known, unknown)}].copy()"
    )


def _columns(counts: NDArray[np.float64]) -> str:
    n_columns = np.count_nonzero(counts)
    return f"{n_columns} column{'s' if n_columns > 1 else ''}"


def _largest(adata: AnnData, shares: NDArray[np.float64]) -> str:
    """The columns with most counts, with their shares."""
    order = np.argsort(-shares, kind="stable")[:_N_NAMED]
    named = ", ".join(f"{adata.var_names[k]} ({shares[k]:.1%})" for k in order if shares[k])
    return f"most of them in {named}" if np.count_nonzero(shares) > _N_NAMED else named


def _code_for_others(
    adata: AnnData, is_known: NDArray[np.bool_], unknown: NDArray[np.float64]
) -> str:
    """Code that is True for all but the unknown columns: by few names, their start, or mapping."""
    names = adata.var_names.astype(str)
    largest = np.argsort(-unknown, kind="stable")[:_N_NAMED]
    enough = _MOST_OF_UNKNOWN * unknown.sum()
    if unknown[largest].sum() >= enough:
        few = [names[k] for k in largest if unknown[k]]
        return f"~adata.var_names.isin({few!r})"
    start = re.split(r"[\W\d_]", names[largest[0]])[0]
    has_start = np.asarray(names.str.startswith(start))
    is_start = len(start) >= _SHORTEST_START and not (has_start & is_known).any()
    if is_start and unknown[has_start].sum() >= enough:
        return f"~adata.var_names.str.startswith({start!r})"
    return f"adata.var[{Var.GENE!r}] != ''"
