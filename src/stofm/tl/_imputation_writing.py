"""Applying a head of ``stofm.tl.impute``: what is embedded, read and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from stofm._edge.embedding import load_model
from stofm._logging import logger
from stofm._messages import warn
from stofm.genes import embedded_vocabulary
from stofm.tl._embeddings import MADE_BY_EMBED
from stofm.tl._gene_columns import GeneColumns
from stofm.tl._head_inputs import checked_reps, read_inputs
from stofm.tl._imputation_fitting import read_panel
from stofm.tl._imputation_head import write_imputed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stofm.genes import GeneVocabulary
    from stofm.nn import Stofm
    from stofm.tl._gene_columns import Gene
    from stofm.tl._imputation_head import ImputationHead
    from stofm.tl._sections import Sections

#: A query with a smaller share of a head's input genes is refused, or warned of.
_LEAST_SHARE: Final = 0.1
_LOW_SHARE: Final = 0.5


@dataclass(frozen=True)
class ImputationWriting:
    """How a head is applied: options of :func:`impute`."""

    key_added: str
    layer: str | None
    spatial_key: str
    reading: dict[str, Any]

    def impute(
        self,
        sections: Sections,
        head: ImputationHead,
        model: Stofm | str | Path | None,
        genes: Sequence[str] | None,
    ) -> None:
        """Embed cells on a head's input genes, and write what it makes of them."""
        columns = head.columns_of(genes)
        loaded, vocabulary = model_and_vocabulary(model, head.use_rep)
        known = read_columns(sections, loaded, vocabulary, "the query")
        if loaded is not None:
            for one in known:
                _check_overlap(one, head.inputs)
        bare, _ = read_panel(
            sections,
            known,
            head.inputs,
            (),
            use_rep=head.use_rep,
            layer=self.layer,
            spatial_key=self.spatial_key,
        )
        inputs = read_inputs(
            bare, use_rep=head.use_rep, model=loaded, expected=head.origin, **self.reading
        )
        head.check_inputs(inputs)
        read = [
            table.var_names[one.columns_of(head.inputs)].astype(str).tolist()
            for table, one in zip(sections.tables, known, strict=True)
        ]
        inputs = head.read_beside_panel(
            sections, known, inputs, layer=self.layer, spatial_key=self.spatial_key
        )
        write_imputed(sections, head, inputs, columns, read, self.key_added)


def model_and_vocabulary(
    model: Stofm | str | Path | None, use_rep: str | Sequence[str]
) -> tuple[Stofm | None, GeneVocabulary]:
    """Load the model if something of it is read."""
    reps = checked_reps(use_rep)
    others = [rep for rep in reps if rep not in MADE_BY_EMBED]
    if others:
        logger.info(
            "obsm%s are read as they are; genes to impute must have no part in them.", others
        )
    if len(others) == len(reps):
        return None, embedded_vocabulary()
    loaded = load_model(model)
    return loaded, loaded.vocabulary


def read_columns(
    sections: Sections, model: Stofm | None, vocabulary: GeneVocabulary, name: str
) -> list[GeneColumns]:
    """Genes of each table; without a model they need not be in its vocabulary."""
    return sections.each(
        lambda table: GeneColumns.read(table, vocabulary, must_map=model is not None, name=name)
    )


def _check_overlap(columns: GeneColumns, inputs: Sequence[Gene]) -> None:
    """Refuse a query that lacks nearly all that the head reads, and warn if it lacks much."""
    missing = [gene.name for gene in inputs if not columns.same_gene(gene)]
    share = 1 - len(missing) / len(inputs)
    found = (
        f"The query has {len(inputs) - len(missing)} of the {len(inputs)} genes that the head reads "
        f"({share:.0%}); missing are, for example, {missing[:3]}."
    )
    if share < _LEAST_SHARE:
        msg = (
            f"{found} At least {_LEAST_SHARE:.0%} are needed. Fit a head on the genes that both "
            "have: st.tl.impute(query, reference=training)."
        )
        raise ValueError(msg)
    if share < _LOW_SHARE:
        warn(
            f"{found} Its embeddings differ from those that the head was fitted to; "
            "st.tl.impute(query, reference=training) fits one on the genes that both have."
        )
