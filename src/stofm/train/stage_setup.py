"""What the stages of pretraining share: their surroundings, and what they keep on disk."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stofm.train.cell_cache import CellCache
from stofm.train.cell_samples import TokenReader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from stofm.nn import Stofm
    from stofm.train.cell_cache import Together
    from stofm.train.cell_samples import Draws
    from stofm.train.config import StageConfig
    from stofm.train.corpus import Corpus
    from stofm.train.subslice_samples import SubSliceSamples

#: What a checkpoint refers to stays on disk for this many checkpoints: the one that is there
#: until the next is written, and the next.
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
        Work folder, in which cell embeddings are kept.
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

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """The slices to train on, and those held out if there are any."""
        return (self.corpus,) if self.validation is None else (self.corpus, self.validation)


class KeptResults:
    """Results of a stage on disk: the present one, and older ones that checkpoints refer to.

    Parameters
    ----------
    remove
        Deletes a result.
    """

    def __init__(self, remove: Callable[[str], object]) -> None:
        self._remove = remove
        self._first: str | None = None
        self._key: str | None = None
        self._made: list[str] = []
        self._referred: deque[str] = deque(maxlen=_REFERRED_TO)

    def replace(self, key: str) -> None:
        """Take a new result, and delete those that nothing refers to.

        The first one stays: other stages and runs may use it.
        """
        if self._first is None:
            self._first = key
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
    """Cell embeddings on disk of the sub-slices to train on and to validate on."""

    def __init__(
        self, setup: StageSetup, config: StageConfig, samples: Sequence[SubSliceSamples]
    ) -> None:
        self._setup = setup
        self._samples = samples
        self._caches = [
            CellCache(
                folder=setup.folder,
                corpus=corpus,
                device=setup.device,
                dtype=setup.dtype,
                rules=setup.model.config.subslice,
                virtual_cells=config.virtual_cells,
            )
            for corpus in setup.corpora
        ]

    def encode(self) -> str:
        """Encode all cells with the cell encoder as it is; returns the result's key."""
        found = [
            cache.encode(
                self._setup.model,
                self._setup.processes,
                show_progress_bar=self._setup.show_progress_bar,
            )
            for cache in self._caches
        ]
        for samples, (_, encoded) in zip(self._samples, found, strict=True):
            samples.encoded = encoded
        return found[0][0]

    def reopen(self, key: str) -> None:
        """Use what a checkpoint noted; made again if the cell encoder is still the same."""
        if key == self._caches[0].key_of(self._setup.model):
            self.encode()
            return
        for samples, cache in zip(self._samples, self._caches, strict=True):
            samples.encoded = cache.open(key)

    def remove(self, key: str) -> None:
        """Delete cell embeddings on disk."""
        if self._setup.processes.rank == 0:
            for cache in self._caches:
                cache.remove(key)
