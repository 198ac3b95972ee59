"""The stages of pretraining: what is trained on what, and what is computed once beforehand.

A stage is the samples to train on, with the objective, the samples to validate on, and what is
kept of the cell encoder's output while the stage runs. Before the first step, ``refresh()``
computes that; a stage that goes on from a checkpoint gets ``restore()`` instead.

References
----------
SToFM (arXiv 2507.11588), sections 3.4 and A.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from stofm.nn.device import seeded
from stofm.train.cell_cache import CellCache, KeptResults
from stofm.train.objectives import CellEncoderObjective, JointObjective, SpatialObjective
from stofm.train.samples import CellSamples, JointSamples, SubSliceSamples, TokenReader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from stofm.nn import Stofm
    from stofm.train.cell_cache import EncodedSlice
    from stofm.train.config import StageConfig
    from stofm.train.corpus import Corpus
    from stofm.train.epochs import Draws
    from stofm.train.processes import Processes
    from stofm.train.protocols import Samples, Stage

_CUDA_NODE_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class StageSetup:
    """What every stage needs.

    Attributes
    ----------
    model
        The model that is trained; the objective holds its networks.
    corpus, validation
        Slices to train on, and held-out ones; None for no validation.
    draws
        What samples are drawn by.
    folder
        Work folder, in which a stage's first cell embeddings are kept; several runs may share it.
    own_folder
        Folder of the run alone, for what is computed anew while a stage goes on.
    processes
        Those that train together.
    device, dtype
        Where and in which precision cells are encoded beforehand.
    show_progress_bar
        Show a bar while cells are encoded.
    """

    model: Stofm
    corpus: Corpus
    validation: Corpus | None = None
    draws: Draws
    folder: Path
    own_folder: Path
    processes: Processes
    device: torch.device
    dtype: torch.dtype = torch.float32
    show_progress_bar: bool = False

    def reader(self, corpus: Corpus) -> TokenReader:
        """Reads token lists of `corpus` as the model takes them."""
        return TokenReader(corpus, self.model.config.cell_encoder, self.model.vocabulary)

    @property
    def node_multiple(self) -> int:
        """What the padded number of nodes is a multiple of."""
        return _CUDA_NODE_MULTIPLE if self.device.type == "cuda" else 1


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
        self.validation: Samples | None = None
        dropout, masking = objective.contrastive.gene_dropout, config.masking
        reader = setup.reader(setup.corpus)
        super().__init__(reader, setup.draws, masking=masking, gene_dropout=dropout)
        if setup.validation is not None:
            reader = setup.reader(setup.validation)
            self.validation = CellSamples(
                reader, setup.draws, masking=masking, gene_dropout=dropout
            )

    def refresh(self) -> None:
        """Nothing: cells are encoded in each step."""

    def state(self) -> dict[str, str]:
        """Nothing: what is read are tokens."""
        return {}

    def restore(self, state: Mapping[str, str]) -> None:
        """Nothing: what is read are tokens."""


class _KeptFeatures:
    """Cell embeddings on disk of the sub-slices to train on and to validate on.

    Those to validate on are the stage's first, so that losses at different steps are of the same
    targets.
    """

    def __init__(
        self,
        setup: StageSetup,
        config: StageConfig,
        training: SubSliceSamples,
        held_out: SubSliceSamples | None,
    ) -> None:
        self._setup, self._training, self._held_out = setup, training, held_out
        self._shared = [
            CellCache(
                folder=setup.folder,
                corpus=corpus,
                device=setup.device,
                dtype=setup.dtype,
                rules=setup.model.config.subslice,
                virtual_cells=config.virtual_cells,
            )
            for corpus in (setup.corpus, setup.validation)
            if corpus is not None
        ]
        self._own = replace(self._shared[0], folder=setup.own_folder)
        self.results = KeptResults(self._remove)

    def present_key(self) -> str:
        """Key of the embeddings of the cell encoder as it is now."""
        return self._shared[0].key_of(self._setup.model)

    def fill(self, key: str, *, encode: bool) -> None:
        """Give the sub-slices a result: make it, or open what is there."""
        first = self.results.first(key)
        cache = self._shared[0] if key == first else self._own
        self._training.encoded = self._get(cache, key, encode=encode)
        if self._held_out is not None:
            is_new = encode and key == first
            self._held_out.encoded = self._get(self._shared[1], first, encode=is_new)

    def _get(self, cache: CellCache, key: str, *, encode: bool) -> list[EncodedSlice]:
        setup = self._setup
        if not encode:
            cache.check(key, setup.processes)
            return cache.open(key)
        shows = setup.show_progress_bar
        return cache.encode(setup.model, setup.processes, show_progress_bar=shows)[1]

    def _remove(self, key: str) -> None:
        if self._setup.processes.rank == 0:
            self._own.remove(key)


class _OnFeatures:
    """A stage whose sub-slices are built from cell embeddings on disk."""

    _features: _KeptFeatures

    def refresh(self) -> None:
        """Encode all cells with the cell encoder as it is now, and find the virtual cells.

        Nothing is computed that is on disk already. The held-out slices keep the stage's first
        embeddings.
        """
        key = self._features.present_key()
        self._features.fill(key, encode=True)
        self._features.results.replace(key)

    def state(self) -> dict[str, str]:
        """Which cell embeddings are in use."""
        return self._features.results.state()

    def restore(self, state: Mapping[str, str]) -> None:
        """Use the cell embeddings that :meth:`state` noted.

        Raises
        ------
        FileNotFoundError
            They are not on disk any more, and the cell encoder has changed since.
        """
        if (key := self._features.results.restore(state)) is not None:
            self._features.fill(key, encode=key == self._features.present_key())


class SpatialStage(_OnFeatures, SubSliceSamples):
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
        super().__init__(**_training(setup, config))
        held_out = _held_out(setup, config)
        self.validation: Samples | None = held_out
        self._features = _KeptFeatures(setup, config, self, held_out)


class JointStage(_OnFeatures, JointSamples):
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
        self.validation: Samples | None = None
        masking = None if objective.masked_genes is None else config.masking
        sampling: dict[str, Any] = {
            "draws": setup.draws,
            "sampled_cells": config.sampled_cells,
            "token_masking": masking,
        }
        training, held_out = SubSliceSamples(**_training(setup, config)), _held_out(setup, config)
        super().__init__(training, setup.reader(setup.corpus), **sampling)
        if held_out is not None and setup.validation is not None:
            self.validation = JointSamples(held_out, setup.reader(setup.validation), **sampling)
        self._features = _KeptFeatures(setup, config, training, held_out)


def _training(setup: StageSetup, config: StageConfig) -> dict[str, Any]:
    """Arguments of the sub-slices to train on."""
    rules = setup.model.config.subslice
    if config.subslice_cells is not None:
        rules = replace(rules, n_cells=config.subslice_cells)
    return {
        "corpus": setup.corpus,
        "rules": rules,
        "draws": setup.draws,
        "masking": config.spatial_masking,
        "vary": config.vary_subslices,
        "node_multiple": setup.node_multiple,
        "n_surrounding": config.n_surrounding,
    }


def _held_out(setup: StageSetup, config: StageConfig) -> SubSliceSamples | None:
    """The held-out slices, cut as in inference."""
    if setup.validation is None:
        return None
    as_in_inference = {"rules": setup.model.config.subslice, "vary": False}
    corpus = {"corpus": setup.validation}
    return SubSliceSamples(**_training(setup, config) | as_in_inference | corpus)


def make_stage(objective: nn.Module, setup: StageSetup, config: StageConfig) -> Stage:
    """Make the stage that trains an objective."""
    if isinstance(objective, CellEncoderObjective):
        return CellEncoderStage(objective, setup, config)
    if isinstance(objective, SpatialObjective):
        return SpatialStage(objective, setup, config)
    assert isinstance(objective, JointObjective)
    return JointStage(objective, setup, config)


def make_objectives(model: Stofm, stages: Sequence[StageConfig], *, seed: int) -> list[nn.Module]:
    """Make the objectives of all stages; heads that several stages need are one."""
    heads: dict[str, nn.Module] = {}
    with seeded(seed):
        return [_share_heads(_make_objective(model, stage), heads) for stage in stages]


def _make_objective(model: Stofm, config: StageConfig) -> nn.Module:
    weights, genes = config.weights, config.masked_genes
    if config.name == "cell_encoder":
        return CellEncoderObjective(
            model.cell_encoder, masked_genes=genes, contrastive=config.contrastive, weights=weights
        )
    spatial = SpatialObjective(
        model.se2_transformer,
        learned_mask=config.spatial_masking.mask_value == "learned",
        cell_loss=config.cell_loss,
        distance_unit=config.distance_unit,
        weights=weights,
    )
    if config.name == "spatial":
        return spatial
    trained = genes if config.trains_masked_genes else None
    return JointObjective(model.cell_encoder, spatial, masked_genes=trained, weights=weights)


def _share_heads(objective: nn.Module, heads: dict[str, nn.Module]) -> nn.Module:
    """Put the heads that earlier stages train in place of an objective's own."""
    for owner in (objective, getattr(objective, "spatial", None)):
        for name in ("gene_head", "cell_head", "pair_head", "visible_head", "surroundings_head"):
            if (own := getattr(owner, name, None)) is not None:
                learns_mask = getattr(own, "mask", None) is not None
                setattr(owner, name, heads.setdefault(f"{name}, {learns_mask}", own))
    return objective
