"""Learning to deconvolve from a single-cell reference: spots simulated to match the query."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from scipy import sparse

from stofm._keys import Obsm
from stofm._logging import logger
from stofm.heads.embeddings import origin_by
from stofm.heads.gene_columns import warn_of_few_shared
from stofm.heads.network import HeadTraining, fit_head
from stofm.heads.spot_panel import (
    SpotPanel,
    component_loadings,
    genes_of,
    read_panel_counts,
    remark_on_empty,
)
from stofm.heads.spots import DeconvolutionHead, ProportionsTask, params_of, score_types
from stofm.heads.targets import Targets
from stofm.spatial.spots import TypedCells, gene_scales, simulate_spots

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.labels import Labels
    from stofm.heads.options import FitOptions, Reading
    from stofm.heads.sections import Sections
    from stofm.nn import Stofm
    from stofm.spatial.spots import SpotRules

#: Fewer shared genes than this say too little about types.
_MIN_GENES: Final = 10
#: Simulated spots that the components are found from.
_COMPONENT_SPOTS: Final = 5000
_HELD_OUT: Final = 0.1
#: Simulated spots are many, and a tenth of them tells well when to stop.
_TRAINING: Final = HeadTraining(
    learning_rate=2e-3, batch_size=512, max_epochs=40, patience=8, dropout=0.1
)


@dataclass(frozen=True, eq=False)
class Panels:
    """Query and reference, reduced to the genes that both have counts of.

    Attributes
    ----------
    places
        (n_genes,) places of the genes in the model's vocabulary, ascending.
    query
        (n_obs, n_genes) counts of the query.
    cells
        The reference's cells over the same genes.
    types
        Names of the types, in alphabetical order.
    """

    places: NDArray[np.int64]
    query: sparse.csr_matrix
    cells: TypedCells
    types: list[str]

    @property
    def query_mean(self) -> NDArray[np.float64]:
        """(n_genes,) mean counts of the query."""
        return np.asarray(self.query.mean(axis=0), dtype=np.float64).ravel()

    @property
    def depths(self) -> NDArray[np.float64]:
        """Totals of the query's spots over the genes, those without any left out."""
        totals = np.asarray(self.query.sum(axis=1), dtype=np.float64).ravel()
        return totals[totals > 0]


@dataclass(frozen=True, eq=False)
class SimulatedTraining:
    """What a head is fitted to, and what it reads of the query.

    Attributes
    ----------
    panel
        Genes and components that the features are made of.
    features, proportions
        (n_spots, d) and (n_spots, n_types) of simulated spots.
    query_features
        (n_obs, d) of the query.
    fitted, held_out
        Rows of simulated spots to fit and to validate.
    """

    panel: SpotPanel
    features: NDArray[np.float32]
    proportions: NDArray[np.float32]
    query_features: NDArray[np.float32]
    fitted: NDArray[np.int64]
    held_out: NDArray[np.int64]

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of the cell embeddings, and of the components."""
        n_components = self.panel.loadings.shape[1]
        return self.features.shape[1] - n_components, n_components


@dataclass(frozen=True, kw_only=True)
class SpotSimulation:
    """How a head is taught on simulated spots: the options of :func:`stofm.tl.deconvolve`.

    Attributes
    ----------
    model
        Its cell encoder is run.
    rules
        Numbers and kinds of spots.
    n_components
        Principal components of expression that are read beside cell embeddings; 0 for none.
    reading
        Where the cell encoder runs, and whether bars are shown.
    """

    model: Stofm
    rules: SpotRules
    n_components: int
    reading: Reading

    def run(
        self,
        panels: Panels,
        predict: Callable[[SimulatedTraining], NDArray[np.floating]],
        seeds: Sequence[int],
    ) -> list[SimulatedTraining]:
        """Simulate in two rounds, the second one for each of some networks.

        The first round takes all types for equally frequent and all genes for equally well seen
        by both technologies. What a head that is fitted to it finds in the query on average tells
        how frequent types are and, with that, how technologies differ: the second round simulates
        half of it, and half of equal frequencies, so that rare types are still learnt.

        Parameters
        ----------
        panels
            Query and reference.
        predict
            Fits a head to the first round and returns the query's proportions, (n_obs, n_types).
        seeds
            Of the networks; the first one's is that of the first round too. All read the components
            of the first one's spots.
        """
        equal = np.full(len(panels.types), 1 / len(panels.types))
        alike = np.ones(len(panels.places))
        found = predict(self._simulate(panels, alike, equal, 2 * seeds[0]))
        composition = found.mean(axis=0, dtype=np.float64)
        composition /= composition.sum()
        n_spots, means = panels.query.shape[0], panels.cells.mean_counts()
        scale = gene_scales(panels.query_mean, n_spots, means, composition)
        trainings: list[SimulatedTraining] = []
        for seed in seeds:
            first = trainings[0] if trainings else None
            own = self._simulate(panels, scale, (composition + equal) / 2, 2 * seed + 1, first)
            trainings.append(own)
        return trainings

    def _simulate(
        self,
        panels: Panels,
        gene_scale: NDArray[np.float64],
        composition: NDArray[np.float64],
        seed: int,
        first: SimulatedTraining | None = None,
    ) -> SimulatedTraining:
        spots = simulate_spots(
            panels.cells,
            depths=panels.depths,
            gene_scale=gene_scale,
            composition=composition,
            rules=self.rules,
            seed=seed,
        )
        if first is None:
            panel = self._find_panel(panels, spots.counts)
            query = panel.features(panels.query, self.model, self.reading)
        else:
            panel, query = first.panel, first.query_features
        n_spots = len(spots.proportions)
        n_fitted = n_spots - round(_HELD_OUT * n_spots)
        return SimulatedTraining(
            panel=panel,
            features=panel.features(spots.counts, self.model, self.reading),
            proportions=spots.proportions.astype(np.float32),
            query_features=query,
            fitted=np.arange(n_fitted),
            held_out=np.arange(n_fitted, n_spots),
        )

    def _find_panel(self, panels: Panels, counts: sparse.csr_matrix) -> SpotPanel:
        target_sum = float(np.median(panels.depths))
        loadings = component_loadings(
            counts[:_COMPONENT_SPOTS],
            panels.cells.mean_counts(),
            target_sum=target_sum,
            n_components=self.n_components,
        )
        return SpotPanel(self.model.vocabulary.gene_ids[panels.places], loadings, target_sum)


def fit_simulated(
    panels: Panels,
    simulation: SpotSimulation,
    options: FitOptions,
    source: Mapping[str, Any],
) -> tuple[DeconvolutionHead, NDArray[np.float32]]:
    """Fit a head to spots simulated from a reference; also what it reads of the query."""

    def head_of(trainings: Sequence[SimulatedTraining]) -> DeconvolutionHead:
        return _simulated_head(trainings, panels.types, simulation, options, source)

    def predict(training: SimulatedTraining) -> NDArray[np.float64]:
        head = head_of([training])
        return head.predict(head.inputs_of(training.query_features)).mean

    seeds = _seeds(options)
    trainings = simulation.run(panels, predict, seeds)
    head, first = head_of(trainings), trainings[0]
    rules = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(simulation.rules).items()}
    found = head.predict(head.inputs_of(first.features[first.held_out])).mean
    head = replace(
        head,
        params={**head.params, **rules, "n_components": simulation.n_components},
        validation_scores=score_types(head.types, first.proportions[first.held_out], found),
    )
    return head, first.query_features


def _seeds(options: FitOptions) -> list[int]:
    n_heads = 1 if options.n_heads is None else options.n_heads
    return [options.seed + ProportionsTask.seed_step * k for k in range(n_heads)]


def _simulated_head(
    trainings: Sequence[SimulatedTraining],
    types: Sequence[str],
    simulation: SpotSimulation,
    options: FitOptions,
    source: Mapping[str, Any],
) -> DeconvolutionHead:
    fits = [
        fit_head(
            one.features,
            Targets("proportions", one.proportions, len(types)),
            fitted=one.fitted,
            held_out=one.held_out,
            input_widths=one.widths,
            training=_TRAINING,
            seed=seed,
            device=simulation.reading.device,
        )
        for one, seed in zip(trainings, _seeds(options), strict=False)
    ]
    first = trainings[0]
    histories = [one.history.assign(network=k) for k, one in enumerate(fits)]
    return DeconvolutionHead(
        networks=tuple(one.head for one in fits),
        outputs=tuple(types),
        use_rep=(Obsm.X_CELL,),
        origin={Obsm.X_CELL: origin_by(simulation.model)[Obsm.X_CELL]},
        strategy=options.strategy,
        params=params_of(options, source, 0),
        split={
            "how": "simulated",
            "n_fitted": len(first.fitted),
            "n_held_out": len(first.held_out),
        },
        validation_scores=pd.DataFrame(),
        history=pd.concat(histories, ignore_index=True),
        panel=first.panel,
    )


def read_panels(
    query: Sections,
    reference: Sections,
    labels: Labels,
    model: Stofm,
    *,
    layer: str | None,
    reference_layer: str | None,
) -> Panels:
    """Read query and reference over the genes that all of their tables have, and the cells with a type."""
    genes = query.each(lambda table: genes_of(table, model, "the query"))
    theirs = reference.each(lambda table: genes_of(table, model, "the reference"))
    panel = reduce(np.intersect1d, (places[places >= 0] for places in (*genes, *theirs)))
    _require_genes(panel, query, reference)
    warn_of_few_shared(len(panel), [len(np.unique(own[own >= 0])) for own in (*genes, *theirs)])
    rows = np.flatnonzero(labels.is_known)
    counts = _read_counts(query, genes, panel, layer)
    cells = _read_counts(reference, theirs, panel, reference_layer)[rows]
    seen = [np.asarray(matrix.sum(axis=0)).ravel() > 0 for matrix in (counts, cells)]
    both = np.flatnonzero(seen[0] & seen[1])
    _require_genes(panel[both], query, reference)
    logger.info(
        "%d genes are in both query and reference, which has %d types in %d cells.",
        len(both),
        len(labels.classes),
        len(rows),
    )
    counts = counts[:, both]
    remark_on_empty(counts)
    typed = TypedCells.sort(cells[:, both], labels.codes[rows], len(labels.classes))
    return Panels(panel[both], counts, typed, list(labels.classes))


def _read_counts(
    sections: Sections,
    genes: Sequence[NDArray[np.int64]],
    panel: NDArray[np.int64],
    layer: str | None,
) -> sparse.csr_matrix:
    """Counts of all tables over a panel."""
    parts = []
    for k, (table, own) in enumerate(zip(sections.tables, genes, strict=True)):
        with sections.naming(k):
            parts.append(read_panel_counts(table, own, panel, layer))
    return sparse.csr_matrix(sparse.vstack(parts, format="csr"))


def _require_genes(panel: NDArray[np.int64], query: Sections, reference: Sections) -> None:
    if len(panel) >= _MIN_GENES:
        return
    first, other = query.tables[0], reference.tables[0]
    msg = (
        f"Query and reference share {len(panel)} genes with counts in both; at least {_MIN_GENES} "
        f"are needed. The query has {first.n_vars} genes ({_some(first)}), the reference "
        f"{other.n_vars} ({_some(other)}). Are both raw counts with gene names?"
    )
    raise ValueError(msg)


def _some(adata: AnnData) -> str:
    return ", ".join(map(str, adata.var_names[:3]))
