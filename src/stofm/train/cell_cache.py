"""Embeddings of all cells, kept on disk while a stage trains on sub-slices."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._logging import progress
from stofm.corpus.storage import digest_json, is_there, open_array, write_folder
from stofm.nn.inference import encode_cells
from stofm.spatial import SliceLayout, VirtualCells, lay_out_slice

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from numpy.typing import NDArray

    from stofm.corpus.reader import Corpus, CorpusSlice
    from stofm.nn import Stofm
    from stofm.train.stages import StageSetup

_FORMAT_VERSION = 2
#: Rules that decide virtual cells; the others take effect when a sub-slice is built.
_VIRTUAL_RULES = (
    "leiden_resolution",
    "position_weight",
    "mixing",
    "n_components",
    "clustering",
    "max_virtual_cells",
)
#: float16 ends at 65,504; no number of an embedding comes near it.
_STORED = np.float16


@dataclass(frozen=True, eq=False)
class EncodedSlice:
    """What the SE(2) Transformer reads of one slice."""

    #: (n_cells, d_cell) cell embeddings, memory-mapped.
    features: NDArray[np.float16]
    #: Coordinates and virtual cells; for :func:`stofm.spatial.build_subslice`.
    layout: SliceLayout


@dataclass(frozen=True)
class CellCache:
    """Encodes the slices of a corpus and keeps the result in a folder.

    A result is found again by the weights of the cell encoder, the tokens and the rules that
    made it, so that stages, runs and processes share one folder. Without `virtual_cells`
    sub-slices consist of cells alone.
    """

    setup: StageSetup
    corpus: Corpus
    folder: Path
    virtual_cells: bool

    def encode(
        self, key: str | None = None, *, model: Stofm | None = None
    ) -> tuple[str, list[EncodedSlice]]:
        """Encode all slices with the cell encoder as it is now, or find the older result of a key.

        The cell encoder is that of the setup's model, or of another. Each process encodes its share
        of what is not there. Returns the key of the result and the slices.

        Raises
        ------
        FileNotFoundError
            The older result of that key is not there, or damaged.
        """
        model = model or self.setup.model
        present = self.key_of(model)
        key = key or present
        processes, show = self.setup.processes, self.setup.show_progress_bar
        own = self.corpus.slices[processes.rank :: processes.count]
        for one in progress(
            own, total=len(own), description="encode slices", unit="slice", show=show
        ):
            self._encode_slice(model, one, key, can_be_made=key == present)
        processes.wait()
        return key, [self._open_slice(one, key) for one in self.corpus.slices]

    def remove(self, *, but: Collection[str]) -> None:
        """Delete all results in the folder but those of some keys."""
        kept = {p for key in but for one in self.corpus.slices for p in self._folders(one, key)}
        for folder in {*self.folder.glob("cells-*"), *self.folder.glob("virtual-*")} - kept:
            shutil.rmtree(folder, ignore_errors=True)

    def key_of(self, model: Stofm) -> str:
        """Key of what :meth:`encode` would give for the cell encoder as it is now."""
        return digest_json(
            _FORMAT_VERSION,
            model.cell_encoder_fingerprint,
            model.vocabulary.fingerprint,
            asdict(model.config.cell_encoder),
            str(self.setup.dtype),
        )

    def _folders(self, one: CorpusSlice, key: str) -> tuple[Path, Path]:
        """Folders of a slice's cell embeddings and of its virtual cells."""
        rules = {name: getattr(self.setup.model.config.subslice, name) for name in _VIRTUAL_RULES}
        return (
            self.folder / f"cells-{digest_json(key, one.digest)}",
            self.folder / f"virtual-{digest_json(key, one.digest, rules)}",
        )

    def _encode_slice(self, model: Stofm, one: CorpusSlice, key: str, *, can_be_made: bool) -> None:
        cells, virtual = self._folders(one, key)
        if not is_there(cells):
            if not can_be_made:
                raise FileNotFoundError(
                    f"There are no cell embeddings of slice {one.name!r} in {self.folder} for the "
                    "cell encoder of the checkpoint, and it has changed since: delete the stage's "
                    "checkpoints and resume, and the stage begins again."
                )
            where: dict[str, Any] = {"device": self.setup.device, "dtype": self.setup.dtype}
            features = encode_cells(model.cell_encoder, one.ranked, model.vocabulary, **where)
            _write(cells, features=features.astype(_STORED))
        if self.virtual_cells and not is_there(virtual):
            # From what is stored, not from what was computed: it must not matter who found it.
            features = open_array(cells / "features.npy").astype(np.float32)
            rules = self.setup.model.config.subslice
            found = lay_out_slice(one.coordinates, features, rules).virtual
            _write(virtual, coordinates=found.coordinates, features=found.features)

    def _open_slice(self, one: CorpusSlice, key: str) -> EncodedSlice:
        cells, virtual = self._folders(one, key)
        features = open_array(cells / "features.npy")
        places, embedded = np.empty((0, 2)), np.empty((0, features.shape[1]), dtype=np.float32)
        if self.virtual_cells:
            places, embedded = (np.load(virtual / f"{n}.npy") for n in ("coordinates", "features"))
        # In one piece: the sampler cuts it.
        nowhere = np.broadcast_to(np.int64(0), one.n_cells)
        layout = SliceLayout(
            one.coordinates,
            subslice=nowhere,
            virtual_cell=nowhere,
            virtual=VirtualCells(coordinates=places, features=embedded),
        )
        return EncodedSlice(features, layout)


def _write(folder: Path, **arrays: NDArray[Any]) -> None:
    def fill(place: Path) -> None:
        for name, array in arrays.items():
            np.save(place / f"{name}.npy", array)

    write_folder(folder, fill)
