"""Learning the expression of genes, and imputing it: genes to impute are in nothing that is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import numpy as np
import pandas as pd

from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import warn
from stofm.genes import embedded_vocabulary
from stofm.heads.base import refuse_reserved, require_head
from stofm.heads.components import fit_components
from stofm.heads.embeddings import MADE_BY_EMBED, counts_layer, places_entry, read_places
from stofm.heads.ensemble import fit_networks, stack_weights
from stofm.heads.fitting import Task
from stofm.heads.gene_columns import GeneColumns
from stofm.heads.genes import (
    Ballot,
    ImputationHead,
    error_products,
    score_genes,
    write_imputed,
)
from stofm.heads.inputs import read_inputs
from stofm.heads.network import HeadTraining, row_order
from stofm.heads.options import checked_reps
from stofm.heads.targets import ExpressionTargets, expression_targets, on_panel
from stofm.nn.model import load_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from scipy import sparse

    from stofm.genes import GeneVocabulary
    from stofm.heads.components import ExpressionComponents
    from stofm.heads.fitting import FirstFit
    from stofm.heads.gene_columns import Gene, GenePanel
    from stofm.heads.inputs import Inputs
    from stofm.heads.options import FitOptions, Reading
    from stofm.heads.sections import Sections
    from stofm.nn import Stofm
    from stofm.spatial import Split

#: Column of ``obs`` that tells slices apart in the AnnData that models read.
_SLICE: Final = "slice"
#: Stronger dropout than for classes: expression is noisy, and the networks vote.
_TRAINING: Final = HeadTraining(dropout=0.4)
#: A query with a smaller share of a head's input genes is refused, or warned of.
_LEAST_SHARE: Final = 0.1
_LOW_SHARE: Final = 0.5


def read_panel(
    sections: Sections,
    columns: Sequence[GeneColumns],
    inputs: Sequence[Gene],
    targets: Sequence[Gene],
    use_rep: str | Sequence[str],
    reading: Reading,
) -> tuple[Sections, list[sparse.csr_matrix]]:
    """AnnData of the input genes alone, and the counts of the target genes beside them.

    Nothing else of the given AnnData is in them but places, slices, and representations that no
    model makes.
    """
    names = np.empty(sections.n_obs, dtype=object)
    for name, rows in zip(sections.slices.names, sections.slices.rows, strict=True):
        names[rows] = name
    reps = checked_reps(use_rep)
    own = [rep for rep in reps if rep not in MADE_BY_EMBED]
    tables, counts = [], []
    parts = zip(sections.tables, columns, sections.places, strict=True)
    for k, (table, known, place) in enumerate(parts):
        where = places_entry(table, reading.spatial_key)
        with sections.naming(k):
            bare, wanted = on_panel(
                table,
                known,
                inputs,
                targets,
                layer=counts_layer(table, reading.layer),
                kept_obsm=own,
            )
            if Obsm.X in reps:
                bare.obsm[reading.spatial_key] = read_places(table, where)
        if where in table.obsm:
            bare.obsm.setdefault(reading.spatial_key, table.obsm[where])
        bare.obs[_SLICE] = pd.Categorical(names[place])
        tables.append(bare)
        counts.append(wanted)
    return replace(sections, tables=tuple(tables)), counts


def _of_panel(reading: Reading) -> Reading:
    """How what :func:`read_panel` returns is read."""
    return replace(reading, library_key=_SLICE, layer=None)


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpressionTask(Task):
    """Learning the expression of genes.

    Attributes
    ----------
    source
        The slices with all their genes; those to fit to have the input genes alone.
    columns
        Genes of each of their tables.
    panel
        Which genes are read and which are learnt.
    layer
        Layer of `source` with raw counts.
    """

    name: ClassVar[str] = ImputationHead.task
    training: ClassVar[HeadTraining | None] = _TRAINING
    seed_step: ClassVar[int] = 1

    source: Sections
    columns: Sequence[GeneColumns]
    panel: GenePanel
    layer: str | None

    @classmethod
    def of(
        cls,
        sections: Sections,
        columns: Sequence[GeneColumns],
        panel: GenePanel,
        options: FitOptions,
    ) -> tuple[ExpressionTask, Sections]:
        """The task, and the slices to fit to; refuses genes of which nothing can be learnt."""
        reading = options.reading
        bare, counts = read_panel(
            sections, columns, panel.inputs, panel.targets, options.use_rep, reading
        )
        targets = expression_targets(bare, counts)
        known = _learnable(targets, panel.targets)
        own = replace(options, reading=_of_panel(reading))
        task = cls(
            targets=targets.standardised(known),
            options=own,
            source=sections,
            columns=columns,
            panel=panel,
            layer=reading.layer,
        )
        return task, bare

    def add_expression(
        self, sections: Sections, inputs: Inputs, rows: NDArray[np.int64]
    ) -> tuple[Inputs, ExpressionComponents | None]:
        """Find components of the expression of the input genes."""
        n_components = self.options.components_beside(inputs.use_rep)
        if not n_components:
            return inputs, None
        layers = [counts_layer(table, self.layer) for table in self.source.tables]
        components, scores = fit_components(
            self.source, rows, self.columns, self.panel.inputs, layers, n_components
        )
        return replace(inputs, expression=scores), components

    def make_head(
        self, first: FirstFit, splits: Sequence[Split], common: dict[str, Any]
    ) -> ImputationHead:
        """Fit networks to what the first one reads and what is beside it, and weigh these kinds."""
        targets = cast("ExpressionTargets", self.targets)
        seeds, sources = self.seeds, first.inputs.sources
        splits = [splits[k % len(splits)] for k in range(len(seeds))]
        fits = [
            fit_networks(first, reads, targets, splits, seeds, self.training) for reads in sources
        ]
        features = [first.inputs.of(reads) for reads in sources]
        rounds = [
            [
                Ballot(one.head, read)
                for one, read in zip(own, features, strict=True)
                if read is not None
            ]
            for own in zip(*fits, strict=True)
        ]
        histories = [one.history for own in zip(*fits, strict=True) for one in own]
        weights = _weigh(rounds, targets, splits)
        rounds = [
            [
                ballot._replace(weight=weight / len(rounds))
                for ballot, weight in zip(own, weights, strict=True)
            ]
            for own in rounds
        ]
        scores = [
            score_genes(own, targets, split.held_out)
            for own, split in zip(rounds, splits, strict=True)
        ]
        head = ImputationHead(
            **common,
            networks=tuple(one.network for own in rounds for one in own),
            reads=sources * len(rounds),
            weights=tuple(one.weight for own in rounds for one in own),
            n_neighbors=first.inputs.neighbors_of(sources),
            outputs=tuple(gene.name for gene in self.panel.targets),
            params={
                "seed": self.options.seed,
                "n_heads": len(seeds),
                "n_inputs": len(self.panel.inputs),
            },
            validation_scores=_by_round(scores),
            history=pd.concat(
                [one.assign(network=k) for k, one in enumerate(histories, 1)], ignore_index=True
            ),
            gene_scores=pd.concat([one["pearson"] for one in scores], axis=1).mean(axis=1),
            inputs=self.panel.inputs,
            output_ids=tuple(gene.id for gene in self.panel.targets),
            mean=targets.mean,
            scale=targets.scale,
        )
        return head


def _weigh(
    rounds: Sequence[Sequence[Ballot]], targets: ExpressionTargets, splits: Sequence[Split]
) -> list[float]:
    """Weight of each kind of networks, as is best for held-out cells."""
    errors = [
        error_products(
            ballots, targets, row_order(ballots[0].features, targets.values, one.held_out)
        )
        for ballots, one in zip(rounds, splits, strict=True)
    ]
    weights: list[float] = stack_weights(np.sum(errors, axis=0)).tolist()
    return weights


def _learnable(targets: ExpressionTargets, genes: Sequence[Gene]) -> NDArray[np.int64]:
    """Cells to learn from; refuse genes of which they tell nothing."""
    known = np.flatnonzero(targets.is_known)
    if not len(known):
        msg = "No cell has any count in the genes that are read, so there is nothing to learn from."
        raise ValueError(msg)
    flat = targets.is_constant(known)
    examples = [gene.name for gene, is_flat in zip(genes, flat, strict=True) if is_flat][:3]
    if flat.all():
        msg = (
            f"All {len(genes)} genes to impute are constant over the training cells, for example "
            f"{examples}: there is nothing to learn. Choose other genes."
        )
        raise ValueError(msg)
    if flat.any():
        warn(
            f"{int(flat.sum())} of {len(genes)} genes are constant over the training cells and will "
            f"be imputed as such, which says nothing, for example {examples}. Leave them out of "
            "`genes`."
        )
    return known


def _by_round(scores: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean over the genes for the networks of each split on its held-out cells."""
    index = pd.RangeIndex(1, len(scores) + 1, name="network")
    return pd.DataFrame([one.mean() for one in scores]).set_index(index)


def log_summary(head: ImputationHead) -> None:
    """Say how well genes are predicted."""
    logger.info(
        "Head for %d genes from %d others: mean correlation %.3f with held-out cells; %d genes are "
        "below 0.1.",
        len(head.outputs),
        len(head.inputs),
        head.gene_scores.mean(),
        int((head.gene_scores < 0.1).sum()),
    )


def impute_with(
    sections: Sections,
    head: ImputationHead,
    options: FitOptions,
    key: str,
    genes: Sequence[str] | None = None,
) -> None:
    """Embed cells on a head's input genes, and write what it makes of them."""
    reading = options.reading
    require_head(head, ImputationHead)
    refuse_reserved(key, Obsm.IMPUTED, reading.spatial_key, *head.use_rep)
    columns = head.columns_of(genes)
    model = head.model if options.model is None else options.model
    loaded, vocabulary = model_and_vocabulary(model, head.use_rep)
    known = read_columns(sections, loaded, vocabulary, "the query")
    if loaded is not None:
        for one in known:
            _check_overlap(one, head.inputs)
    bare, _ = read_panel(sections, known, head.inputs, (), head.use_rep, reading)
    inputs = read_inputs(
        bare, _of_panel(reading), use_rep=head.use_rep, model=loaded, expected=head.origin
    )
    head.check_inputs(inputs)
    read = [
        table.var_names[one.columns_of(head.inputs)].astype(str).tolist()
        for table, one in zip(sections.tables, known, strict=True)
    ]
    inputs = head.read_beside_panel(sections, known, inputs, reading)
    write_imputed(sections, head, inputs, columns, read, key)


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
