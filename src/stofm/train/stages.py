"""The stages of pretraining: what is trained on what, and what is computed once beforehand.

References
----------
SToFM (arXiv 2507.11588), sections 3.4 and A.1.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from stofm.nn.device import seeded
from stofm.train.cell_cache import CellCache
from stofm.train.objectives import CellEncoderObjective, JointObjective, SpatialObjective
from stofm.train.samples import CellSamples, SubSliceSamples, TokenReader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from stofm.corpus.reader import Corpus
    from stofm.nn import Stofm
    from stofm.train.config import StageConfig
    from stofm.train.processes import Processes
    from stofm.train.samples import Draws

    Made = TypeVar("Made")

_CUDA_NODE_MULTIPLE = 8
#: What a checkpoint refers to stays on disk for this many checkpoints: the last, and the one before.
_REFERRED_TO = 2


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


class Samples(Protocol):
    """Samples of a stage, from the slices to train on or from those held out.

    A batch is a list of sample numbers; each process loads its share of one. What :meth:`load`
    returns depends on the samples and the epoch only, not on batch, process or thread.
    """

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """Batches of an epoch; the same in every process."""
        ...

    def load(self, samples: NDArray[np.int64], epoch: int) -> Any:
        """Inputs of the objective, with ``n_cells``, ``n_tokens`` and ``to(device)``."""
        ...

    def describe(self, samples: NDArray[np.int64]) -> str:
        """Name the slices that samples come from, for messages."""
        ...


@dataclass
class Stage:
    """A stage of training.

    Attributes
    ----------
    name
        Such as ``"spatial"``; in the history.
    number
        Of the stage in the run; part of every seed.
    objective
        Module whose ``forward(inputs, gather)`` returns a :class:`~stofm.train.losses.LossPart`
        for each name in its attribute ``weights``.
    samples, validation
        Samples to train on, and held-out ones, loaded with the draws of epoch 0; None if there
        are none.
    embeddings
        What sub-slices are built from; None if there are none.
    refresh_every
        Optimiser steps after which :meth:`refresh` is called; None for never.
    """

    name: str
    number: int
    objective: nn.Module
    samples: Samples
    validation: Samples | None = None
    embeddings: KeptEmbeddings | None = None
    refresh_every: int | None = None

    def refresh(self) -> None:
        """Compute anew what is kept of the model's output; called by all processes at once."""
        if self.embeddings is not None:
            self.embeddings.refresh()


class KeptEmbeddings:
    """Cell embeddings on disk, from which a stage's sub-slices are built.

    The first are in the work folder, where other stages and runs may use them, and stay. Those
    after them are in a folder of the run, until no checkpoint refers to them. Held-out sub-slices
    keep the first, so that losses at different steps are of the same targets.
    """

    def __init__(
        self,
        setup: StageSetup,
        config: StageConfig,
        training: SubSliceSamples,
        held_out: SubSliceSamples | None,
    ) -> None:
        self._setup, self._training, self._held_out = setup, training, held_out
        self._shared = CellCache(setup, setup.corpus, setup.folder, config.virtual_cells)
        self._own = replace(self._shared, folder=setup.own_folder)
        self._first = self._key = ""
        self._referred: deque[str] = deque(maxlen=_REFERRED_TO)

    def refresh(self) -> None:
        """Encode all cells with the cell encoder as it is now, and find the virtual cells.

        Nothing is computed that is on disk already.
        """
        is_first = not self._first
        self._key = self._shared.key_of(self._setup.model)
        self._first = self._first or self._key
        self._use(self._key, with_held_out=is_first)
        if self._setup.processes.rank == 0:
            self._own.remove(but={self._key, *self._referred})

    def state(self) -> dict[str, str]:
        """What a checkpoint notes; the embeddings in use are then kept."""
        self._referred.append(self._key)
        return {"key": self._key, "first": self._first}

    def restore(self, state: Mapping[str, str]) -> None:
        """Use the embeddings that :meth:`state` noted.

        Raises
        ------
        FileNotFoundError
            They are not on disk any more, and the cell encoder has changed since.
        """
        self._key, self._first = state["key"], state["first"]
        self._referred.append(self._key)
        self._use(self._key, with_held_out=True)

    def _use(self, key: str, *, with_held_out: bool) -> None:
        cache, held_out = self._shared if key == self._first else self._own, self._setup.validation
        self._training.encoded = cache.encode(key)[1]
        if with_held_out and self._held_out is not None and held_out is not None:
            self._held_out.encoded = replace(self._shared, corpus=held_out).encode(self._first)[1]


def make_stage(objective: nn.Module, setup: StageSetup, config: StageConfig) -> Stage:
    """Make the stage that trains an objective; held-out slices are cut as in inference."""
    draws, rules = setup.draws, setup.model.config.subslice

    def both(make: Callable[[Corpus], Made]) -> tuple[Made, Made | None]:
        return make(setup.corpus), None if setup.validation is None else make(setup.validation)

    def cells(corpus: Corpus) -> CellSamples:
        reader = setup.reader(corpus)
        return CellSamples(reader, draws, config.masking, config.contrastive.gene_dropout)

    def subslices(corpus: Corpus) -> SubSliceSamples:
        is_held_out = corpus is setup.validation
        n_cells = rules.n_cells if is_held_out else config.subslice_cells or rules.n_cells
        return SubSliceSamples(
            corpus,
            replace(rules, n_cells=n_cells),
            draws,
            config.spatial_masking,
            vary=config.vary_subslices and not is_held_out,
            node_multiple=setup.node_multiple,
            n_surrounding=config.n_surrounding,
            reader=setup.reader(corpus) if config.name == "joint" else None,
            sampled_cells=config.sampled_cells,
            token_masking=config.masking if config.trains_masked_genes else None,
        )

    stage = partial(Stage, config.name, draws.stage, objective)
    if config.name == "cell_encoder":
        return stage(*both(cells))
    training, held_out = both(subslices)
    embeddings = KeptEmbeddings(setup, config, training, held_out)
    every = config.refresh_every if config.name == "joint" else None
    return stage(training, held_out, embeddings, every)


def make_objectives(model: Stofm, stages: Sequence[StageConfig], *, seed: int) -> nn.ModuleList:
    """Make the objectives of all stages; heads that several stages need are one."""
    heads: dict[str, nn.Module] = {}
    with seeded(seed):
        return nn.ModuleList(_share_heads(_make_objective(model, stage), heads) for stage in stages)


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
