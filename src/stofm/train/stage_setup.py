"""What the stages of pretraining share: their surroundings, and what they keep on disk."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from stofm.train.cell_cache import CellCache
from stofm.train.cell_samples import TokenReader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from stofm.nn import Stofm
    from stofm.train.cell_cache import EncodedSlice, Together
    from stofm.train.cell_samples import Draws
    from stofm.train.config import StageConfig
    from stofm.train.corpus import Corpus
    from stofm.train.subslice_samples import SubSliceSamples

#: What a checkpoint refers to stays on disk for this many checkpoints: the last, and the one before.
_REFERRED_TO = 2
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
    processes: Together
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


class KeptResults:
    """Results of a stage on disk: the first, the present one, and older ones.

    The first is in the work folder, where other stages and runs may use it, and stays. Those
    after it are in a folder of the run, until no checkpoint refers to them.

    Parameters
    ----------
    remove
        Deletes a result from the run's folder.
    """

    def __init__(self, remove: Callable[[str], object]) -> None:
        self._remove = remove
        self._first: str | None = None
        self._key: str | None = None
        self._made: list[str] = []
        self._referred: deque[str] = deque(maxlen=_REFERRED_TO)

    def first(self, key: str) -> str:
        """Key of the first result; that of the result that is to come if there is none."""
        return key if self._first is None else self._first

    def replace(self, key: str) -> None:
        """Take a new result, and delete those that nothing refers to."""
        self._first = self.first(key)
        if key not in (self._first, self._key):
            self._made.append(key)
        self._key = key
        for old in [k for k in self._made if k not in (key, *self._referred)]:
            self._made.remove(old)
            self._remove(old)

    def state(self) -> dict[str, str]:
        """What a checkpoint notes; the present result is then kept."""
        if self._key is None or self._first is None:
            return {}
        self._referred.append(self._key)
        return {"key": self._key, "first": self._first, "made": " ".join(self._made)}

    def restore(self, state: Mapping[str, str]) -> str | None:
        """Go on from what a checkpoint noted; returns the result's key."""
        self._key = state.get("key")
        self._first = state.get("first")
        self._made = state.get("made", "").split()
        if self._key is not None:
            self._referred.append(self._key)
        return self._key


class KeptFeatures:
    """Cell embeddings on disk of the sub-slices to train on and to validate on.

    Those to validate on are the stage's first, so that losses at different steps are of the same
    targets.

    Parameters
    ----------
    setup
        Model, slices, folders.
    config
        Whether there are virtual cells.
    training, held_out
        Sub-slices that are built from the embeddings.
    """

    def __init__(
        self,
        setup: StageSetup,
        config: StageConfig,
        training: SubSliceSamples,
        held_out: SubSliceSamples | None,
    ) -> None:
        self._setup = setup
        self._training = training
        self._held_out = held_out
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
        self._results = KeptResults(self._remove)

    def refresh(self) -> None:
        """Encode all cells with the cell encoder as it is, unless that is done already."""
        key = self._present_key()
        self._fill(key, encode=True)
        self._results.replace(key)

    def state(self) -> dict[str, str]:
        """Which cell embeddings are in use."""
        return self._results.state()

    def restore(self, state: Mapping[str, str]) -> None:
        """Use what :meth:`state` noted; made again if the cell encoder is still the same.

        Raises
        ------
        FileNotFoundError
            It is lost, and the cell encoder has changed since.
        """
        if (key := self._results.restore(state)) is not None:
            self._fill(key, encode=key == self._present_key())

    def _present_key(self) -> str:
        return self._shared[0].key_of(self._setup.model)

    def _fill(self, key: str, *, encode: bool) -> None:
        """Give the sub-slices a result: make it, or open what is there."""
        first = self._results.first(key)
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
        return cache.encode(
            setup.model, setup.processes, show_progress_bar=setup.show_progress_bar
        )[1]

    def _remove(self, key: str) -> None:
        if self._setup.processes.rank == 0:
            self._own.remove(key)
