"""How ``stofm.tl.impute`` fits a head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import warn
from stofm.heads.blending import drop_light, stack_weights
from stofm.heads.components import fit_components
from stofm.heads.embeddings import MADE_BY_EMBED, counts_layer, places_entry, read_places
from stofm.heads.expression import expression_targets, on_panel
from stofm.heads.fitting import fit_task
from stofm.heads.genes import Ballot, ImputationHead, error_products, score_genes
from stofm.heads.inputs import checked_reps, read_inputs
from stofm.heads.neighborhood import choose_neighborhood
from stofm.heads.network import HeadTraining, fit_head, row_order
from stofm.heads.options import check_whole_number
from stofm.heads.splits import plan_runs, score_table, split_record
from stofm.heads.voting import choose_n_components

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy import sparse

    from stofm.heads.base import Strategy
    from stofm.heads.components import ExpressionComponents
    from stofm.heads.expression import ExpressionTargets
    from stofm.heads.fitting import TaskFit
    from stofm.heads.gene_columns import Gene, GeneColumns, GenePanel
    from stofm.heads.inputs import Inputs, Source
    from stofm.heads.sections import Sections
    from stofm.heads.splits import Protocol, Run
    from stofm.nn import Stofm
    from stofm.spatial import Split
    from stofm.spatial.splits import SplitRule

#: Column of ``obs`` that tells slices apart in the AnnData that models read.
_SLICE: Final = "slice"
#: Stronger dropout than for classes: expression is noisy, and the networks vote.
_TRAINING: Final = HeadTraining(dropout=0.4)


def read_panel(
    sections: Sections,
    columns: Sequence[GeneColumns],
    inputs: Sequence[Gene],
    targets: Sequence[Gene],
    *,
    use_rep: str | Sequence[str],
    layer: str | None,
    spatial_key: str,
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
        where = places_entry(table, spatial_key)
        with sections.naming(k):
            bare, wanted = on_panel(
                table, known, inputs, targets, layer=counts_layer(table, layer), kept_obsm=own
            )
            if Obsm.X in reps:
                bare.obsm[spatial_key] = read_places(table, where)
        if where in table.obsm:
            bare.obsm.setdefault(spatial_key, table.obsm[where])
        bare.obs[_SLICE] = pd.Categorical(names[place])
        tables.append(bare)
        counts.append(wanted)
    return replace(sections, tables=tuple(tables)), counts


def reading_of_panel(*, spatial_key: str, device: Any, show_progress_bar: bool) -> dict[str, Any]:
    """Options of ``read_inputs`` for what :func:`read_panel` returns."""
    return {
        "library_key": _SLICE,
        "layer": None,
        "spatial_key": spatial_key,
        "device": device,
        "show_progress_bar": show_progress_bar,
    }


@dataclass(frozen=True, kw_only=True)
class ImputationFitting:
    """The options of :func:`stofm.tl.impute` that say how a head is fitted."""

    strategy: Strategy
    n_neighbors: int | None
    n_components: int | None
    n_heads: int
    split: SplitRule
    protocol: Protocol | None
    seed: int
    layer: str | None
    reading: dict[str, Any]

    def __post_init__(self) -> None:
        """Check what is not checked where it is used."""
        check_whole_number("n_heads", self.n_heads, least=1)

    def fit(
        self,
        sections: Sections,
        columns: Sequence[GeneColumns],
        panel: GenePanel,
        *,
        use_rep: str | Sequence[str],
        model: Stofm | None,
    ) -> ImputationHead:
        """Fit a head, or one for each run of a protocol, of which the first is kept."""
        bare, counts = read_panel(
            sections,
            columns,
            panel.inputs,
            panel.targets,
            use_rep=use_rep,
            layer=self.layer,
            spatial_key=self.reading["spatial_key"],
        )
        targets = expression_targets(bare, counts)
        _refuse_constant(targets, panel.targets)
        inputs = read_inputs(bare, use_rep=use_rep, model=model, **self.reading)
        inputs, expression = self._with_expression(sections, columns, panel, inputs, targets)
        inputs = choose_neighborhood(
            bare,
            inputs,
            self.n_neighbors,
            rows=np.flatnonzero(targets.is_known),
            spatial_key=self.reading["spatial_key"],
            split=self.split,
            protocol=self.protocol,
        )
        heads, tested = [], []
        for run in self._plan(bare, targets, inputs, self.seed):
            head, scores = self._fit_run(bare, inputs, targets, panel, run, model)
            heads.append(head.with_components(expression))
            if scores is not None:
                tested.append(scores)
        _log_summary(heads[0])
        return replace(heads[0], test_scores=score_table(tested) if tested else None)

    def _with_expression(
        self,
        sections: Sections,
        columns: Sequence[GeneColumns],
        panel: GenePanel,
        inputs: Inputs,
        targets: ExpressionTargets,
    ) -> tuple[Inputs, ExpressionComponents | None]:
        n_components = choose_n_components(
            self.n_components, inputs.use_rep, is_repeated=self.protocol is not None
        )
        if not n_components:
            return inputs, None
        rows = row_order(inputs.features, targets.values, np.flatnonzero(targets.is_known))
        layers = [counts_layer(table, self.layer) for table in sections.tables]
        components, scores = fit_components(
            sections, rows, columns, panel.inputs, layers, n_components
        )
        return replace(inputs, expression=scores), components

    def _plan(
        self, bare: Sections, targets: ExpressionTargets, inputs: Inputs, seed: int
    ) -> list[Run]:
        return plan_runs(
            bare,
            targets.is_known,
            inputs.features,
            split=self.split,
            protocol=self.protocol,
            spatial_key=self.reading["spatial_key"],
            seed=seed,
        )

    def _fit_run(
        self,
        bare: Sections,
        inputs: Inputs,
        targets: ExpressionTargets,
        panel: GenePanel,
        run: Run,
        model: Stofm | None,
    ) -> tuple[ImputationHead, dict[str, float] | None]:
        # Networks differ in the cells they hold out; but none may be fitted to those that a
        # protocol tests on, nor scored on those that a model was tuned with.
        is_shared = self.protocol is not None or self.strategy != "frozen"
        splits = [
            run.split if is_shared else self._plan(bare, targets, inputs, run.seed + k)[0].split
            for k in range(self.n_heads)
        ]
        trained = np.setdiff1d(np.flatnonzero(targets.is_known), run.test)
        targets = targets.standardised(trained)
        first = fit_task(
            bare,
            inputs,
            targets,
            splits[0],
            strategy=self.strategy,
            model=model,
            task=ImputationHead.task,
            training=_TRAINING,
            seed=run.seed,
            reading=self.reading,
        )
        rounds, history = self._fit_all(first, targets, splits, run.seed)
        rounds, reads = _weigh(rounds, first.inputs.sources, targets, splits)
        by_round = [
            score_genes(ballots, targets, split.held_out)
            for ballots, split in zip(rounds, splits, strict=True)
        ]
        head = ImputationHead(
            networks=tuple(one.network for ballots in rounds for one in ballots),
            reads=reads * len(rounds),
            weights=tuple(one.weight for ballots in rounds for one in ballots),
            n_neighbors=first.inputs.neighbors_of(reads),
            outputs=tuple(gene.name for gene in panel.targets),
            use_rep=first.inputs.use_rep,
            origin=first.inputs.origin,
            strategy=self.strategy,
            params={"seed": self.seed, "n_heads": self.n_heads, "n_inputs": len(panel.inputs)},
            split=split_record(run.split, run.test, bare, targets.is_known, self.protocol),
            validation_scores=_by_round(by_round),
            history=history,
            model=first.model,
            gene_scores=pd.concat([one["pearson"] for one in by_round], axis=1).mean(axis=1),
            inputs=panel.inputs,
            output_ids=tuple(gene.id for gene in panel.targets),
            mean=targets.mean,
            scale=targets.scale,
        )
        if not len(run.test):
            return head, None
        every = [ballot for ballots in rounds for ballot in ballots]
        scores = score_genes(every, targets, run.test)
        return head, {name: float(value) for name, value in scores.mean().items()}

    def _fit_all(
        self, first: TaskFit, targets: ExpressionTargets, splits: Sequence[Split], seed: int
    ) -> tuple[list[list[Ballot]], pd.DataFrame]:
        """Fit networks to what the first one reads and what is beside it, each with its own split."""
        inputs = first.inputs
        read = [
            (features, inputs.widths_of(source))
            for source in inputs.sources
            if (features := inputs.of(source)) is not None
        ]
        rounds: list[list[Ballot]] = []
        histories: list[pd.DataFrame] = []
        for k, split in enumerate(splits):
            ballots: list[Ballot] = []
            for features, widths in read:
                network, history = first.network, first.history
                if histories:
                    fitted = fit_head(
                        features,
                        targets,
                        fitted=split.fitted,
                        held_out=split.held_out,
                        input_widths=widths,
                        training=_TRAINING,
                        seed=seed + k,
                    )
                    network, history = fitted.head, fitted.history
                ballots.append(Ballot(network, features))
                histories.append(history.assign(network=len(histories) + 1))
            rounds.append(ballots)
        return rounds, pd.concat(histories, ignore_index=True)


def _weigh(
    rounds: Sequence[Sequence[Ballot]],
    sources: tuple[Source, ...],
    targets: ExpressionTargets,
    splits: Sequence[Split],
) -> tuple[list[list[Ballot]], tuple[Source, ...]]:
    """Weigh each kind of networks as is best for held-out cells; also what those that count read."""
    errors = [
        error_products(
            ballots, targets, row_order(ballots[0].features, targets.values, one.held_out)
        )
        for ballots, one in zip(rounds, splits, strict=True)
    ]
    weights = drop_light(stack_weights(np.sum(errors, axis=0))).tolist()
    # The first network stays: a tuned model was tuned with it.
    kept = [k for k, weight in enumerate(weights) if weight or not k]
    weighed = [
        [ballots[k]._replace(weight=weights[k] / len(rounds)) for k in kept] for ballots in rounds
    ]
    return weighed, tuple(sources[k] for k in kept)


def _refuse_constant(targets: ExpressionTargets, genes: Sequence[Gene]) -> None:
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


def _by_round(scores: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean over the genes for the networks of each split on its held-out cells."""
    index = pd.RangeIndex(1, len(scores) + 1, name="network")
    return pd.DataFrame([one.mean() for one in scores]).set_index(index)


def _log_summary(head: ImputationHead) -> None:
    logger.info(
        "Head for %d genes from %d others: mean correlation %.3f with held-out cells; %d genes are "
        "below 0.1.",
        len(head.outputs),
        len(head.inputs),
        head.gene_scores.mean(),
        int((head.gene_scores < 0.1).sum()),
    )
