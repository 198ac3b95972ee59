"""The stages of pretraining: their samples, and cell embeddings computed in advance.

References
----------
SToFM (arXiv 2507.11588), sections 3.4 and A.1.
"""

from __future__ import annotations

import shutil
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from stofm._logging import progress
from stofm.corpus.storage import digest_json, is_there, open_array, write_folder
from stofm.nn.inference import encode_cells
from stofm.spatial import SliceLayout, VirtualCells, lay_out_slice
from stofm.train.order import Draws, shares_of
from stofm.train.samples import CellSamples, SubSliceSamples, TokenReader

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from stofm.corpus.reader import Corpus, CorpusSlice
    from stofm.nn import Stofm
    from stofm.train.config import RunConfig, StageConfig
    from stofm.train.folder import RunFolder
    from stofm.train.processes import Processes

    Samples = CellSamples | SubSliceSamples

_CUDA_NODE_MULTIPLE = 8
#: Files that a checkpoint refers to stay on disk for this many checkpoints: the last two.
_REFERRED_TO = 2
_FORMAT_VERSION = 2
#: Rules that determine virtual cells; the others apply when a sub-slice is built.
_VIRTUAL_RULES = (
    *("leiden_resolution", "position_weight", "mixing"),
    *("n_components", "clustering", "max_virtual_cells"),
)
#: float16 ends at 65,504; no number in an embedding comes near it.
_STORED = np.float16


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every stage of a run needs."""

    model: Stofm  # the model that is trained; the objectives hold its networks
    run: RunConfig  # how all stages are trained
    #: Slices to train on, and held-out ones; None for no validation.
    corpus: Corpus
    validation: Corpus | None = None
    #: Where the run's files go. A stage's first cell embeddings go into its work folder, which
    #: several runs may share.
    folder: RunFolder
    processes: Processes  # those that train together
    show_progress_bar: bool = False  # show bars


@dataclass
class Stage:
    """A stage of training."""

    name: str  # such as ``"spatial"``; in the history
    number: int  # of the stage in the run; part of every seed
    #: Module whose ``forward(inputs, gather)`` returns a :class:`~stofm.train.objectives.LossPart`
    #: for each name in its attribute ``weights``.
    objective: nn.Module
    #: Samples to train on, and held-out ones, loaded with the draws of epoch 0; None if there are
    #: none. A batch is a list of sample numbers, the same in every process; each loads its share of
    #: one. The data loaded depend only on samples and epoch.
    samples: Samples
    validation: Samples | None = None
    #: Embeddings that sub-slices are built from; None if there are none.
    embeddings: KeptEmbeddings | None = None
    #: Optimiser steps after which :meth:`refresh` is called; None for never.
    refresh_every: int | None = None

    def refresh(self) -> None:
        """Update the stored cell embeddings; called by all processes at once."""
        if self.embeddings is not None:
            self.embeddings.refresh()


def make_stage(objective: nn.Module, setup: Setup, config: StageConfig, number: int) -> Stage:
    """Make a stage by its number in the run; held-out slices are cut as in inference."""
    model, rules, is_joint = setup.model, setup.model.config.subslice, config.name == "joint"
    is_cuda = setup.processes.device.type == "cuda"
    draws = Draws(seed=setup.run.seed, stage=number, batch_size=config.optimizer.batch_size)

    def samples(corpus: Corpus | None) -> Any:
        if corpus is None:
            return None
        reader = TokenReader(corpus, model.config.cell_encoder, model.vocabulary)
        is_held_out = corpus is setup.validation
        mixture = {} if is_held_out else setup.run.mixture
        shares = shares_of([one.about for one in corpus.slices], mixture)
        if config.name == "cell_encoder":
            dropout = config.contrastive.gene_dropout
            return CellSamples(reader, draws, config.masking, dropout, shares)
        n_cells = rules.n_cells if is_held_out else config.subslice_cells or rules.n_cells
        return SubSliceSamples(
            corpus,
            replace(rules, n_cells=n_cells),
            draws,
            config,
            vary=config.vary_subslices and not is_held_out,
            node_multiple=_CUDA_NODE_MULTIPLE if is_cuda else 1,
            reader=reader if is_joint else None,
            shares=shares,
        )

    training, held_out = samples(setup.corpus), samples(setup.validation)
    stage = Stage(config.name, number, objective, training, held_out)
    if config.name != "cell_encoder":
        stage.embeddings = KeptEmbeddings(setup, config, training, held_out)
    if is_joint:
        stage.refresh_every = config.refresh_every
    return stage


class KeptEmbeddings:
    """Cell embeddings on disk, from which a stage's sub-slices are built.

    The first ones are in the work folder, where other stages and runs may use them, and stay there.
    Later ones are in a folder of the run until no checkpoint refers to them. Held-out sub-slices
    keep the first ones, so that losses at different steps have the same targets.
    """

    def __init__(
        self,
        setup: Setup,
        config: StageConfig,
        training: SubSliceSamples,
        held_out: SubSliceSamples | None,
    ) -> None:
        self._setup, self._training, self._held_out = setup, training, held_out
        place = setup.folder.work / "cells"
        self._shared = CellCache(setup, setup.corpus, place, config.virtual_cells)
        self._own = replace(self._shared, folder=setup.folder.refreshed)
        self._first = self._key = ""
        self._referred: deque[str] = deque(maxlen=_REFERRED_TO)

    def refresh(self) -> None:
        """Encode all cells with the current cell encoder, and find the virtual cells.

        Whatever is on disk already is not computed again.
        """
        is_first = not self._first
        self._key = self._shared.key()
        self._first = self._first or self._key
        self._use(self._key, with_held_out=is_first)
        if self._setup.processes.rank == 0:
            self._own.remove(but={self._key, *self._referred})

    def state(self) -> dict[str, str]:
        """Return what a checkpoint stores; the current embeddings are then kept."""
        self._referred.append(self._key)
        return {"key": self._key, "first": self._first}

    def restore(self, state: Mapping[str, str]) -> None:
        """Use the embeddings that :meth:`state` named (FileNotFoundError if they are gone)."""
        self._key, self._first = state["key"], state["first"]
        self._referred.append(self._key)
        self._use(self._key, with_held_out=True)

    def _use(self, key: str, *, with_held_out: bool) -> None:
        cache, held_out = self._shared if key == self._first else self._own, self._setup.validation
        self._training.encoded = cache.encode(key)
        if with_held_out and self._held_out is not None and held_out is not None:
            self._held_out.encoded = replace(self._shared, corpus=held_out).encode(self._first)


class EncodedSlice(NamedTuple):
    """Input of the SE(2) Transformer for one slice: (n_cells, d_cell) features, memory-mapped."""

    features: NDArray[np.float16]
    layout: SliceLayout


@dataclass(frozen=True)
class CellCache:
    """Encodes the slices of a corpus and keeps the result in a folder.

    Results are keyed by the weights of the cell encoder, the tokens and the rules, so that stages,
    runs and processes can share one folder. Without `virtual_cells` sub-slices consist of cells
    alone.
    """

    setup: Setup
    corpus: Corpus
    folder: Path
    virtual_cells: bool

    @property
    def _dtype(self) -> torch.dtype:
        on_cuda = self.setup.processes.device.type == "cuda"
        is_bf16 = on_cuda and self.setup.run.precision == "bf16-mixed"
        return torch.bfloat16 if is_bf16 else torch.float32

    def key(self) -> str:
        """Key of the current cell encoder's results."""
        model = self.setup.model
        return digest_json(
            _FORMAT_VERSION,
            model.cell_encoder_fingerprint,
            model.vocabulary.fingerprint,
            asdict(model.config.cell_encoder),
            str(self._dtype),
        )

    def encode(self, key: str) -> list[EncodedSlice]:
        """Open the results of a key; missing ones are computed, a share by each process.

        A missing result of an older cell encoder raises FileNotFoundError.
        """
        processes, can_be_made = self.setup.processes, key == self.key()
        own = self.corpus.slices[processes.rank :: processes.count]
        for one in progress(own, "encode slices", "slice", show=self.setup.show_progress_bar):
            self._encode_slice(one, *self._folders(one, key), can_be_made=can_be_made)
        processes.wait()
        return [self._open_slice(one, *self._folders(one, key)) for one in self.corpus.slices]

    def remove(self, *, but: Collection[str]) -> None:
        """Delete all results in the folder except those of some keys."""
        kept = {p for key in but for one in self.corpus.slices for p in self._folders(one, key)}
        for folder in {*self.folder.glob("cells-*"), *self.folder.glob("virtual-*")} - kept:
            shutil.rmtree(folder, ignore_errors=True)

    def _folders(self, one: CorpusSlice, key: str) -> tuple[Path, Path]:
        """Folders of a slice's cell embeddings and of its virtual cells."""
        rules = {name: getattr(self.setup.model.config.subslice, name) for name in _VIRTUAL_RULES}
        return (
            self.folder / f"cells-{digest_json(key, one.digest)}",
            self.folder / f"virtual-{digest_json(key, one.digest, rules)}",
        )

    def _encode_slice(
        self, one: CorpusSlice, cells: Path, virtual: Path, *, can_be_made: bool
    ) -> None:
        setup, model = self.setup, self.setup.model
        if not is_there(cells):
            if not can_be_made:
                raise FileNotFoundError(
                    f"There are no cell embeddings of slice {one.name!r} in {self.folder} for the "
                    "cell encoder of the checkpoint, and it has changed since: delete the stage's "
                    "checkpoints and resume, and the stage begins again."
                )
            where: dict[str, Any] = {"device": setup.processes.device, "dtype": self._dtype}
            features = encode_cells(model.cell_encoder, one.ranked, model.vocabulary, **where)
            _write(cells, features=features.astype(_STORED))
        if self.virtual_cells and not is_there(virtual):
            # From the stored file, not from memory: the result must not depend on who computed it.
            features = open_array(cells / "features.npy").astype(np.float32)
            found = lay_out_slice(one.coordinates, features, model.config.subslice).virtual
            _write(virtual, coordinates=found.coordinates, features=found.features)

    def _open_slice(self, one: CorpusSlice, cells: Path, virtual: Path) -> EncodedSlice:
        features = open_array(cells / "features.npy")
        places, embedded = np.empty((0, 2)), np.empty((0, features.shape[1]), dtype=np.float32)
        if self.virtual_cells:
            places, embedded = (np.load(virtual / f"{n}.npy") for n in ("coordinates", "features"))
        # As a single piece: the sampler cuts it.
        nowhere = np.broadcast_to(np.int64(0), one.n_cells)
        found = VirtualCells(coordinates=places, features=embedded)
        layout = SliceLayout(one.coordinates, subslice=nowhere, virtual_cell=nowhere, virtual=found)
        return EncodedSlice(features, layout)


def _write(folder: Path, **arrays: NDArray[Any]) -> None:
    def fill(place: Path) -> None:
        for name, array in arrays.items():
            np.save(place / f"{name}.npy", array)

    write_folder(folder, fill)
