"""Which genes are learnt from which slices: the ways to call :func:`stofm.tl.impute`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stofm._keys import Obsm
from stofm._messages import naming
from stofm.heads.base import refuse_reserved
from stofm.heads.fitting import fit
from stofm.heads.gene_columns import choose_panel, find_genes, new_genes
from stofm.heads.imputation import (
    ExpressionTask,
    impute_with,
    log_summary,
    model_and_vocabulary,
    read_columns,
)
from stofm.heads.options import checked_reps
from stofm.heads.sections import resolve_slices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stofm.genes import GeneVocabulary
    from stofm.heads.gene_columns import Gene, GeneColumns
    from stofm.heads.genes import ImputationHead
    from stofm.heads.options import FitOptions
    from stofm.heads.sections import Sections


def learn(
    sections: Sections,
    reference: Sections | None,
    options: FitOptions,
    genes: Sequence[str] | None,
    reference_layer: str | None,
    key: str,
) -> ImputationHead:
    """Fit a head to slices, or to a reference and impute with it what these lack."""
    reading = options.reading
    refuse_reserved(key, Obsm.IMPUTED, reading.spatial_key, *checked_reps(options.use_rep))
    training, layer = sections, reading.layer
    if reference is not None:
        training = reference
        layer, reference_layer = _layers(sections, training, layer, reference_layer)
    options.check(training)
    loaded, vocabulary = model_and_vocabulary(options.model, options.use_rep)
    name = "the data" if reference is None else "the reference"
    columns = read_columns(training, loaded, vocabulary, name)
    query = None if reference is None else read_columns(sections, loaded, vocabulary, "the query")
    targets = _choose_targets(genes, columns, query, vocabulary)
    panel = choose_panel(columns, targets, query)
    own = replace(reading, layer=layer if reference is None else reference_layer)
    fitting = replace(options, model=loaded, reading=own)
    head: ImputationHead = fit(*ExpressionTask.of(training, columns, panel, fitting))
    log_summary(head)
    if reference is not None:
        applying = replace(
            options, model=head.model or loaded, reading=replace(reading, layer=layer)
        )
        impute_with(sections, head, applying, key)
    return head


def check_call(
    *,
    genes: Sequence[str] | None,
    reference: Any,
    head: ImputationHead | None,
    copy: bool,
) -> None:
    """Refuse arguments that do not go together."""
    if head is not None and reference is not None:
        msg = "head= is fitted already: leave out reference=, or leave out head=."
        raise ValueError(msg)
    if head is None and reference is None and genes is None:
        msg = (
            "Pass genes= to learn some genes of these slices, reference= to learn from other "
            "slices the genes that these lack, or head= to use what was learnt."
        )
        raise ValueError(msg)
    if copy and head is None:
        what = "nothing is written to data" if reference is None else "the head is returned"
        msg = f"copy=True is for head=; without it {what}. Pass data.copy() if need be."
        raise ValueError(msg)


def resolve_reference(
    reference: Any, library_key: str | None, spatial_key: str, table_key: str | None
) -> Sections:
    """Slices of a reference, which may do without the query's column of slices."""
    if library_key is not None:
        plain = reference.values() if isinstance(reference, dict) else reference
        tables = plain if isinstance(plain, list | tuple) else [plain]
        if not any(library_key in getattr(table, "obs", {}) for table in tables):
            library_key = None
    with naming("the reference", adata="reference"):
        return resolve_slices(
            reference,
            library_key,
            spatial_key=spatial_key,
            table_key=table_key,
            role="reference",
        )


def _layers(
    query: Sections, reference: Sections, layer: str | None, reference_layer: str | None
) -> tuple[str | None, str | None]:
    """Layers of both: what is asked for, on the side that has it if that is one only."""
    if reference_layer is not None or layer is None:
        return layer, reference_layer
    has_query, has_reference = (
        any(layer in table.layers for table in sections.tables) for sections in (query, reference)
    )
    own = layer if has_query or not has_reference else None
    return own, layer if has_reference else None


def _choose_targets(
    genes: Sequence[str] | None,
    training: Sequence[GeneColumns],
    query: Sequence[GeneColumns] | None,
    vocabulary: GeneVocabulary,
) -> tuple[Gene, ...]:
    if genes is not None:
        return find_genes(genes, training, vocabulary)
    assert query is not None
    return new_genes(training, query)
