"""The stages of pretraining: what is trained on what, and what is computed once beforehand.

A stage is the samples to train on, with the objective, the samples to validate on, and what is
kept of the cell encoder's output while the stage runs. Before the first step, ``refresh()``
computes that; a stage that goes on from a checkpoint gets ``restore()`` instead.

References
----------
SToFM (arXiv 2507.11588), sections 3.4 and A.1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stofm.train.cell_samples import CellSamples
from stofm.train.stage_setup import KeptFeatures
from stofm.train.subslice_samples import JointSamples, SubSliceSamples

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from stofm.spatial import SubSliceConfig
    from stofm.train.config import StageConfig
    from stofm.train.objectives import CellEncoderObjective, JointObjective
    from stofm.train.protocols import Samples
    from stofm.train.spatial_objective import SpatialObjective
    from stofm.train.stage_setup import StageSetup


class CellEncoderStage(CellSamples):
    """Domain adaptation of the cell encoder: masked genes and contrastive learning.

    Parameters
    ----------
    objective
        Holds the model's cell encoder.
    setup
        Model, slices, draws.
    config
        Which genes are hidden.

    References
    ----------
    SToFM (arXiv 2507.11588), section A.1.
    """

    def __init__(
        self, objective: CellEncoderObjective, setup: StageSetup, config: StageConfig
    ) -> None:
        self.name: str = "cell_encoder"
        self.number: int = setup.draws.stage
        self.objective: nn.Module = objective
        self.refresh_every: int | None = None
        gene_dropout = objective.contrastive.gene_dropout
        super().__init__(
            setup.reader(setup.corpus),
            setup.draws,
            masking=config.masking,
            gene_dropout=gene_dropout,
        )
        self.validation: Samples | None = None
        if setup.validation is not None:
            self.validation = CellSamples(
                setup.reader(setup.validation),
                setup.draws,
                masking=config.masking,
                gene_dropout=gene_dropout,
            )

    def refresh(self) -> None:
        """Nothing: cells are encoded in each step."""

    def state(self) -> dict[str, str]:
        """Nothing: what is read are tokens."""
        return {}

    def restore(self, state: Mapping[str, str]) -> None:
        """Nothing: what is read are tokens."""


class SpatialStage(SubSliceSamples):
    """Masked cells and pair distances on embeddings of a cell encoder that stays as it is.

    Parameters
    ----------
    objective
        Holds the model's SE(2) Transformer.
    setup
        Model, slices, draws.
    config
        How sub-slices are made, and what is hidden and moved. Validation takes the sub-slices of
        inference.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4.
    """

    def __init__(self, objective: SpatialObjective, setup: StageSetup, config: StageConfig) -> None:
        self.name: str = "spatial"
        self.number: int = setup.draws.stage
        self.objective: nn.Module = objective
        self.refresh_every: int | None = None
        super().__init__(
            setup.corpus,
            _training_rules(setup, config),
            setup.draws,
            masking=config.spatial_masking,
            vary=config.vary_subslices,
            node_multiple=setup.node_multiple,
            n_surrounding=config.n_surrounding,
        )
        held_out = _held_out(setup, config)
        self.validation: Samples | None = held_out
        self._features = KeptFeatures(setup, config, self, held_out)

    def refresh(self) -> None:
        """Encode all cells and find the virtual cells, unless that is done already."""
        self._features.refresh()

    def state(self) -> dict[str, str]:
        """Which cell embeddings are in use."""
        return self._features.state()

    def restore(self, state: Mapping[str, str]) -> None:
        """Use the cell embeddings that :meth:`state` noted.

        Raises
        ------
        FileNotFoundError
            They are not on disk any more, and the cell encoder has changed since.
        """
        self._features.restore(state)


class JointStage(JointSamples):
    """The spatial losses with gradients into the cell encoder, through sampled cells.

    Parameters
    ----------
    objective
        Holds both of the model's networks.
    setup
        Model, slices, draws.
    config
        As for :class:`SpatialStage`; how many cells are sampled, and how often all others are
        encoded anew.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4.
    """

    def __init__(self, objective: JointObjective, setup: StageSetup, config: StageConfig) -> None:
        self.name: str = "joint"
        self.number: int = setup.draws.stage
        self.objective: nn.Module = objective
        self.refresh_every: int | None = config.refresh_every
        token_masking = None if objective.masked_genes is None else config.masking
        training = SubSliceSamples(
            setup.corpus,
            _training_rules(setup, config),
            setup.draws,
            masking=config.spatial_masking,
            vary=config.vary_subslices,
            node_multiple=setup.node_multiple,
            n_surrounding=config.n_surrounding,
        )
        super().__init__(
            training,
            setup.reader(setup.corpus),
            setup.draws,
            sampled_cells=config.sampled_cells,
            token_masking=token_masking,
        )
        self.validation: Samples | None = None
        held_out = _held_out(setup, config)
        if held_out is not None and setup.validation is not None:
            self.validation = JointSamples(
                held_out,
                setup.reader(setup.validation),
                setup.draws,
                sampled_cells=config.sampled_cells,
                token_masking=token_masking,
            )
        self._features = KeptFeatures(setup, config, training, held_out)

    def refresh(self) -> None:
        """Encode all cells with the cell encoder as it is now, and find the virtual cells.

        The held-out slices keep the stage's first embeddings.
        """
        self._features.refresh()

    def state(self) -> dict[str, str]:
        """Which cell embeddings are in use."""
        return self._features.state()

    def restore(self, state: Mapping[str, str]) -> None:
        """Use the cell embeddings that :meth:`state` noted.

        Raises
        ------
        FileNotFoundError
            They are not on disk any more, and the cell encoder has changed since.
        """
        self._features.restore(state)


def _training_rules(setup: StageSetup, config: StageConfig) -> SubSliceConfig:
    rules = setup.model.config.subslice
    return rules if config.subslice_cells is None else replace(rules, n_cells=config.subslice_cells)


def _held_out(setup: StageSetup, config: StageConfig) -> SubSliceSamples | None:
    """The held-out slices, cut as in inference."""
    if setup.validation is None:
        return None
    return SubSliceSamples(
        setup.validation,
        setup.model.config.subslice,
        setup.draws,
        masking=config.spatial_masking,
        vary=False,
        node_multiple=setup.node_multiple,
        n_surrounding=config.n_surrounding,
    )
