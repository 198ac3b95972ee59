"""Fine-tuning: a model and a head on it learn a task together, sub-slice by sub-slice."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stofm._keys import Obsm
from stofm._logging import step_bar
from stofm.heads.targets import head_loss
from stofm.heads.tuning_samples import FineTuningSamples
from stofm.train.config import RunConfig, SpatialMasking
from stofm.train.folder import Progress
from stofm.train.loop import TrainingLoop
from stofm.train.objectives import LossPart, with_fresh
from stofm.train.samples import SubSliceSamples
from stofm.train.stages import CellCache, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stofm.heads.targets import Targets
    from stofm.heads.tuning_lora import LowRankModel
    from stofm.heads.tuning_samples import FineTuningBatch, FineTuningConfig, KnownCells
    from stofm.nn import Stofm
    from stofm.nn.prediction_head import PredictionHead
    from stofm.train.objectives import Gather
    from stofm.train.processes import Processes
    from stofm.train.stages import StageSetup

_NOTHING_HIDDEN = SpatialMasking(masked=0.0, moved=0.0)


class FineTuningObjective(nn.Module):
    """Loss of a head on the embeddings of cells, with gradients into the model.

    Parameters
    ----------
    model
        Trained in place; with the changes in it if `low_rank` is given.
    head
        Trained in place.
    use_rep
        What the head reads, in the order of its input: ``"X_stofm_cell"``, ``"X_stofm"``.
    targets
        Gives the kind of loss and the weights of the classes.
    low_rank
        The changes that are trained in place of the model's own weights.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: Stofm,
        head: PredictionHead,
        *,
        use_rep: Sequence[str],
        targets: Targets,
        low_rank: LowRankModel | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.use_rep = tuple(use_rep)
        self._kind = targets.kind
        weights = targets.class_weights
        self.register_buffer(
            "class_weights",
            None if weights is None else torch.as_tensor(weights, dtype=torch.float32),
        )
        self._low_rank = low_rank
        #: Weight of the only loss part that :meth:`forward` returns.
        self.weights = {"head": 1.0}

    def forward(self, inputs: FineTuningBatch, gather: Gather | None = None) -> dict[str, LossPart]:
        """Compute the loss over the cells with a target.

        Parameters
        ----------
        inputs
            Sub-slices, tokens of the cells to embed anew, targets.
        gather
            Not used: the loss looks at no other process's cells.
        """
        outputs = self.predict(inputs)
        total, count = head_loss(outputs, inputs.targets, self._kind, self.class_weights)
        return {"head": LossPart(total, count)}

    def predict(self, inputs: FineTuningBatch) -> Tensor:
        """Raw outputs of the head for the cells with a target, (n_targets, d_output)."""
        subslices, features = inputs.cells.subslices, with_fresh(self._encoder(), inputs.cells)
        found = {Obsm.X_CELL: features}
        if Obsm.X in self.use_rep:
            batch = replace(subslices, features=features)
            found[Obsm.X] = self.model.se2_transformer.embed(batch)
        read = [found[name].flatten(0, 1)[inputs.places].float() for name in self.use_rep]
        with torch.autocast(features.device.type, enabled=False):
            predicted: Tensor = self.head(torch.cat(read, dim=1))
        return predicted

    def _encoder(self) -> Any:
        """The cell encoder as it is called, with the low-rank changes in its weights."""
        encoder = self.model.cell_encoder
        if self._low_rank is None:
            return encoder
        weights = self._low_rank.encoder_weights()
        return lambda group: functional_call(encoder, weights, (group,))


class FineTuningStage(Stage):
    """Sub-slices with targets to train on, and those to validate on.

    Both come from the same slices: they differ in the cells whose targets count. All cells are
    embedded anew before each validation, so that the validation is of the model as it is, and
    the sub-slices to train on are kept up to date with it.

    Parameters
    ----------
    objective
        Holds model and head.
    setup
        Model, slices, draws.
    config
        How sub-slices are made.
    fitted, held_out
        Cells whose targets are trained on, and validated on; None for no validation.
    low_rank
        As in the objective.
    """

    def __init__(
        self,
        objective: FineTuningObjective,
        setup: StageSetup,
        config: FineTuningConfig,
        *,
        fitted: KnownCells,
        held_out: KnownCells | None,
        low_rank: LowRankModel | None = None,
    ) -> None:
        self._setup = setup
        self._low_rank = low_rank
        reader = setup.reader(setup.corpus)
        sampled = {"reader": reader, "sampled_cells": config.sampled_cells}
        self._training = self._cut(vary=config.vary_subslices, **sampled)
        self._whole = self._cut(vary=False)
        samples = FineTuningSamples(self._training, fitted)
        validation = None
        if held_out is not None:
            validation = FineTuningSamples(self._whole, held_out, before_epoch=self.refresh)
        super().__init__(
            name="fine-tuning",
            number=setup.draws.stage,
            objective=objective,
            samples=samples,
            validation=validation,
            # Also between validations, so that no sub-slice is built while the embeddings change.
            refresh_every=max(config.validate_every, len(samples.epoch(0))),
        )
        self._cache = CellCache(setup, setup.corpus, setup.folder, Obsm.X in objective.use_rep)

    def refresh(self) -> None:
        """Embed all cells with the model as it is, and find the virtual cells."""
        model = self._setup.model if self._low_rank is None else self._low_rank.merged()
        key, encoded = self._cache.encode(model=model)
        for subslices in (self._training, self._whole):
            subslices.encoded = encoded
        if self._setup.processes.rank == 0:
            self._cache.remove(but={key})

    def _cut(self, *, vary: bool, **sampled: Any) -> SubSliceSamples:
        setup = self._setup
        return SubSliceSamples(
            setup.corpus,
            setup.model.config.subslice,
            setup.draws,
            _NOTHING_HIDDEN,
            vary=vary,
            node_multiple=setup.node_multiple,
            **sampled,
        )


class BestWeights:
    """Takes a loop's reports and keeps the weights of its best validation in memory.

    The beginning is none of them: a head that was stopped early by the loss on the same held-out
    cells has the lowest that it can reach, and says little of others.

    Parameters
    ----------
    loop
        The loop.
    show_progress_bar
        Show a bar.

    Attributes
    ----------
    rows
        The history.
    best_step
        Optimiser step whose weights are kept; the last one, if there is no validation.
    """

    def __init__(self, loop: TrainingLoop, *, show_progress_bar: bool) -> None:
        self._loop = loop
        self._trained = [w for w in loop.stage.objective.parameters() if w.requires_grad]
        self._kept: list[Tensor] | None = None
        self._bar = step_bar("fine-tune", total=loop.n_steps, done=0, show=show_progress_bar)
        self.rows: list[dict[str, Any]] = []
        self.best_step = 0

    def record(self, row: Mapping[str, Any]) -> None:
        """Take a row of the history."""
        self.rows.append(dict(row))

    def advance(self) -> None:
        """One more optimiser step is done."""
        self._bar.update()

    def keep(self) -> None:
        """Keep the weights, the best so far."""
        self._kept = [weight.detach().clone() for weight in self._trained]
        self.best_step = self._loop.progress.step

    def save(self) -> None:
        """Without a validation, the last weights are the best."""
        if self._loop.stage.validation is None:
            self.best_step = self._loop.progress.step

    def restore(self) -> None:
        """Put the best weights back, if there was a validation."""
        if self._kept is not None:
            with torch.no_grad():
                for weight, kept in zip(self._trained, self._kept, strict=True):
                    weight.copy_(kept)

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


def tune(
    stage: FineTuningStage,
    config: FineTuningConfig,
    *,
    processes: Processes,
    seed: int,
    show_progress_bar: bool,
) -> BestWeights:
    """Train the objective of a stage, and leave it with its best weights.

    Parameters
    ----------
    stage
        Samples and objective.
    config
        Length and schedule.
    processes
        Those that train together.
    seed
        Decides order, cuts, sampled cells and dropout.
    show_progress_bar
        Show a bar.

    Returns
    -------
    The history, and which step was best.
    """
    every, per_epoch = stage.refresh_every, len(stage.samples.epoch(0))
    assert every is not None
    # To the end with a validation, without one that follows on the heels of another.
    n_steps = -(-max(config.epochs * per_epoch, config.min_steps) // every) * every
    loop = TrainingLoop(
        stage,
        config.optimizer,
        run=RunConfig(
            seed=seed,
            validate_every=every,
            patience=config.patience,
            log_every=config.validate_every,
        ),
        n_epochs=-(-n_steps // per_epoch),
        max_steps=n_steps,
        processes=processes,
        progress=Progress(),
    )
    recorder = BestWeights(loop, show_progress_bar=show_progress_bar)
    try:
        stage.refresh()
        if stage.validation is not None:
            total, count = loop.evaluate()[:, 0].tolist()
            recorder.record({"split": "validation", "epoch": 0, "step": 0, "loss": total / count})
        loop.train(recorder)
    finally:
        recorder.close()
    recorder.restore()
    return recorder
