"""How ``stofm.tl.deconvolve`` fits a head: to known proportions, or to simulated spots."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._keys import Obsm
from stofm._writing import all_or_nothing
from stofm.metrics import mae, pearson, rmse
from stofm.nn import choose_device, choose_dtype
from stofm.tl._deconvolution_head import DeconvolutionHead
from stofm.tl._embeddings import origin_by
from stofm.tl._fit_options import check_whole_number
from stofm.tl._head_fitting import fit_task
from stofm.tl._head_inputs import read_inputs
from stofm.tl._neighborhood import choose_neighborhood
from stofm.tl._protocol import plan_runs, score_table, split_record
from stofm.tl._spot_reference import SpotSimulation
from stofm.tl._voter_fitting import fit_voters, splits_of_networks, voter_seeds
from stofm.tl._voting_head import add_expression, choose_n_components
from stofm.train import HeadTraining, Targets, fit_head
from stofm.train.head_fitting import row_order

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from stofm.nn import PredictionHead, Stofm
    from stofm.spatial.splits import SplitRule
    from stofm.spatial.spots import SpotRules
    from stofm.tl._head_inputs import Inputs
    from stofm.tl._heads import Strategy
    from stofm.tl._protocol import Protocol, Run
    from stofm.tl._spot_reference import Panels, SimulatedTraining
    from stofm.tl._spot_tables import SpotTable
    from stofm.train.head_fitting import FittedHead

_SCORES: Final = {"pearson": pearson, "rmse": rmse, "mae": mae}
#: With fewer spots than this there is nothing to hold out.
_MIN_SPOTS: Final = 20
#: Simulated spots are many, and a tenth of them tells well when to stop.
_ON_SIMULATED: Final = HeadTraining(
    learning_rate=2e-3, batch_size=512, max_epochs=40, patience=8, dropout=0.1
)


@dataclass(frozen=True, kw_only=True)
class DeconvolutionFitting:
    """The options of :func:`stofm.tl.deconvolve` that say how a head is fitted.

    Attributes
    ----------
    source
        What is learnt from, for the head's record.
    reading
        ``library_key``, ``layer``, ``spatial_key``, ``device``, ``show_progress_bar``.
    """

    strategy: Strategy
    n_neighbors: int | None
    n_components: int | None
    n_heads: int
    split: SplitRule
    protocol: Protocol | None
    seed: int
    source: dict[str, Any]
    reading: dict[str, Any]

    def __post_init__(self) -> None:
        """Check what is not checked where it is used."""
        check_whole_number("n_heads", self.n_heads, least=1)

    def fit(
        self,
        spots: SpotTable,
        *,
        use_rep: str | Sequence[str],
        model: Stofm | str | Path | None,
    ) -> DeconvolutionHead:
        """Fit a head to spots, or one for each run of a protocol, of which the first is kept."""
        targets = Targets("proportions", spots.proportions, len(spots.types))
        n_known = int(targets.is_known.sum())
        if n_known < _MIN_SPOTS:
            msg = (
                f"{n_known} of {len(targets)} spots have known proportions; at least {_MIN_SPOTS} "
                "are needed to fit a head and to hold some out. Pass more slices, or a smaller "
                "spot_size if cells are summed into spots."
            )
            raise ValueError(msg)
        with all_or_nothing(*spots.sections.tables):
            inputs = read_inputs(spots.sections, use_rep=use_rep, model=model, **self.reading)
            known = np.flatnonzero(targets.is_known)
            inputs, expression = add_expression(
                spots.sections,
                inputs,
                row_order(inputs.features, targets.values, known),
                n_components=choose_n_components(
                    self.n_components, inputs.use_rep, is_repeated=self.protocol is not None
                ),
                layer=self.reading["layer"],
                is_asked_for=self.n_components is not None,
            )
            inputs = choose_neighborhood(
                spots.sections,
                inputs,
                self.n_neighbors,
                rows=known,
                spatial_key=self.reading["spatial_key"],
                split=self.split,
                protocol=self.protocol,
            )
        heads, tested = [], []
        for run in self._plan(spots, targets, inputs, self.seed):
            head, read = self._fit_run(spots, inputs, targets, run, model)
            heads.append(head.with_components(expression))
            if len(run.test):
                found = head.predict(read.take(run.test)).mean
                scores = score_types(head.types, spots.proportions[run.test], found)
                tested.append(scores.mean().to_dict())
        return replace(heads[0], test_scores=score_table(tested) if tested else None)

    def _plan(self, spots: SpotTable, targets: Targets, inputs: Inputs, seed: int) -> list[Run]:
        return plan_runs(
            spots.sections,
            targets.is_known,
            inputs.features,
            split=self.split,
            protocol=self.protocol,
            spatial_key=self.reading["spatial_key"],
            seed=seed,
        )

    def _fit_run(
        self,
        spots: SpotTable,
        inputs: Inputs,
        targets: Targets,
        run: Run,
        model: Stofm | str | Path | None,
    ) -> tuple[DeconvolutionHead, Inputs]:
        fit = fit_task(
            spots.sections,
            inputs,
            targets,
            run.split,
            strategy=self.strategy,
            model=model,
            task=DeconvolutionHead.task,
            seed=run.seed,
            reading=self.reading,
        )
        voters = fit_voters(
            fit,
            targets,
            splits_of_networks(
                run,
                lambda seed: self._plan(spots, targets, inputs, seed),
                n_heads=self.n_heads,
                is_shared=self.protocol is not None or self.strategy != "frozen",
            ),
            n_heads=self.n_heads,
            refit=self.protocol is None,
            seed=run.seed,
        )
        types = tuple(spots.types)
        head = DeconvolutionHead(
            networks=voters.networks,
            reads=voters.reads,
            weights=voters.weights,
            n_neighbors=voters.n_neighbors,
            outputs=types,
            use_rep=fit.inputs.use_rep,
            origin=fit.inputs.origin,
            strategy=self.strategy,
            params=self._params(run.seed, inputs.n_neighbors),
            split=split_record(
                run.split, run.test, spots.sections, targets.is_known, self.protocol
            ),
            validation_scores=score_types(types, spots.proportions[voters.rows], voters.votes),
            history=voters.history,
            model=fit.model,
        )
        return head, fit.inputs

    def fit_simulated(
        self, panels: Panels, rules: SpotRules, n_components: int, model: Stofm
    ) -> tuple[DeconvolutionHead, NDArray[np.float32]]:
        """Fit a head to spots simulated from a reference; also what it reads of the query."""
        device = choose_device(self.reading["device"])
        simulation = SpotSimulation(
            model=model,
            rules=rules,
            n_components=n_components,
            device=device,
            dtype=choose_dtype("auto", device),
            show_progress_bar=self.reading["show_progress_bar"],
        )
        trainings = simulation.run(
            panels,
            lambda first: self._query_proportions(first, panels.types, simulation),
            voter_seeds(self.seed, self.n_heads),
        )
        head = self._simulated_head(trainings, panels.types, simulation)
        training = trainings[0]
        options = {**asdict(rules), "n_components": n_components}
        params = {**head.params, **{k: _as_list(value) for k, value in options.items()}}
        rows = training.held_out
        found = head.predict(head.inputs_of(training.features[rows])).mean
        scores = score_types(head.types, training.proportions[rows], found)
        head = replace(head, params=params, validation_scores=scores)
        return head, training.query_features

    def _query_proportions(
        self, training: SimulatedTraining, types: Sequence[str], simulation: SpotSimulation
    ) -> NDArray[np.float64]:
        head = self._simulated_head([training], types, simulation)
        return head.predict(head.inputs_of(training.query_features)).mean

    def _simulated_head(
        self,
        trainings: Sequence[SimulatedTraining],
        types: Sequence[str],
        simulation: SpotSimulation,
    ) -> DeconvolutionHead:
        fits: list[FittedHead] = [
            fit_head(
                training.features,
                Targets("proportions", training.proportions, len(types)),
                fitted=training.fitted,
                held_out=training.held_out,
                input_widths=training.widths,
                training=_ON_SIMULATED,
                seed=seed,
                device=simulation.device,
            )
            for training, seed in zip(
                trainings, voter_seeds(self.seed, len(trainings)), strict=True
            )
        ]
        first = trainings[0]
        networks: tuple[PredictionHead, ...] = tuple(one.head for one in fits)
        return DeconvolutionHead(
            networks=networks,
            outputs=tuple(types),
            use_rep=(Obsm.X_CELL,),
            origin={Obsm.X_CELL: origin_by(simulation.model)[Obsm.X_CELL]},
            strategy=self.strategy,
            params=self._params(self.seed, 0),
            split={
                "how": "simulated",
                "n_fitted": len(first.fitted),
                "n_held_out": len(first.held_out),
            },
            validation_scores=score_table([]),
            history=_joined([one.history for one in fits]),
            panel=first.panel,
        )

    def _params(self, seed: int, n_neighbors: int) -> dict[str, Any]:
        options = ("layer", "library_key", "spatial_key")
        return {
            **self.source,
            "n_neighbors": n_neighbors,
            "n_components": self.n_components,
            "n_heads": self.n_heads,
            "seed": seed,
            **{name: self.reading[name] for name in options},
        }


def score_types(
    types: Sequence[str], true: NDArray[np.floating], found: NDArray[np.floating]
) -> pd.DataFrame:
    """Score each type over some spots.

    Parameters
    ----------
    types
        Their names.
    true, found
        (n, n_types) proportions; fewer than two spots have no scores.

    Returns
    -------
    A row per type, with columns pearson, rmse and mae. Pearson is NaN for a constant type.
    """
    import pandas as pd

    index = pd.Index(types, name="type")
    if len(true) < 2:
        return pd.DataFrame(np.nan, index=index, columns=list(_SCORES))
    true = np.asarray(true, dtype=np.float64)
    scores = {name: np.asarray(score(true, found)) for name, score in _SCORES.items()}
    return pd.DataFrame(scores, index=index)


def _joined(histories: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Histories one below the other, numbered in the column ``network``."""
    import pandas as pd

    parts = [part.assign(network=k) for k, part in enumerate(histories)]
    return pd.concat(parts, ignore_index=True)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
