"""Cell embeddings and virtual cells of a corpus, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stofm._logging import progress
from stofm.nn.inference import encode_cells
from stofm.spatial import SliceLayout, VirtualCells, lay_out_slice
from stofm.train.arrays import find_damage, is_there, open_array, write_folder

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from stofm.nn import Stofm
    from stofm.spatial import SubSliceConfig
    from stofm.train.corpus import Corpus, TokenizedSlice


class Together(Protocol):
    """Processes that train one model: which of them this one is, and waiting for the others."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        ...

    @property
    def count(self) -> int:
        """Number of processes."""
        ...

    def wait(self) -> None:
        """Wait until all processes have come here."""
        ...


_FORMAT_VERSION = 2
_BEGIN_AGAIN = (
    "The cell encoder has changed since, so it can't be made again: delete the stage's checkpoints "
    "and resume, and the stage begins again."
)
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
    """What the SE(2) Transformer reads of one slice.

    Attributes
    ----------
    features
        (n_cells, d_cell) cell embeddings, float16, memory-mapped.
    layout
        Coordinates and virtual cells; for :func:`stofm.spatial.build_subslice`.
    """

    features: NDArray[np.float16]
    layout: SliceLayout


@dataclass(frozen=True, kw_only=True)
class CellCache:
    """Encodes the slices of a corpus and keeps the result on disk.

    A result is found again by the weights of the cell encoder, the tokens and the rules that
    made it, so that stages, runs and processes share one folder.

    Attributes
    ----------
    folder
        Where the results are kept.
    corpus
        The slices.
    rules
        Rules of the virtual cells.
    virtual_cells
        Find virtual cells; without them sub-slices consist of cells alone.
    device, dtype
        Where and in which precision cells are encoded.
    """

    folder: Path
    corpus: Corpus
    rules: SubSliceConfig
    virtual_cells: bool
    device: torch.device
    dtype: torch.dtype

    def encode(
        self, model: Stofm, processes: Together, *, show_progress_bar: bool = False
    ) -> tuple[str, list[EncodedSlice]]:
        """Encode all slices with the model's cell encoder as it is now.

        Parameters
        ----------
        model
            Gives the cell encoder and the vocabulary.
        processes
            Those that train together; each encodes its share of the slices.
        show_progress_bar
            Show a bar.

        Returns
        -------
        A key under which :meth:`open` finds the result, and the slices.
        """
        key = self.key_of(model)
        own = self.corpus.slices[processes.rank :: processes.count]
        shown = progress(
            own,
            total=len(own),
            description="encode slices",
            unit="slice",
            show=show_progress_bar,
        )
        for one in shown:
            self._encode_slice(model, one, key)
        processes.wait()
        return key, self.open(key)

    def open(self, key: str) -> list[EncodedSlice]:
        """Open what :meth:`encode` wrote.

        Raises
        ------
        FileNotFoundError
            There is no result, or only part of one.
        """
        return [self._open_slice(s, key) for s in self.corpus.slices]

    def check(self, key: str, processes: Together) -> None:
        """Compare this process's share of a result with what was written.

        Raises
        ------
        ValueError
            A file is damaged.
        """
        for one in self.corpus.slices[processes.rank :: processes.count]:
            _require_sound(self._cells(one, key))
            if self.virtual_cells:
                _require_sound(self._virtual(one, key))

    def remove(self, key: str) -> None:
        """Delete a result that is not needed any more."""
        for s in self.corpus.slices:
            for place in (self._cells(s, key), self._virtual(s, key)):
                shutil.rmtree(place, ignore_errors=True)

    def key_of(self, model: Stofm) -> str:
        """Key of what :meth:`encode` would give for the cell encoder as it is now."""
        return _digest(
            _FORMAT_VERSION,
            model.cell_encoder_fingerprint,
            model.vocabulary.fingerprint,
            asdict(model.config.cell_encoder),
            str(self.dtype),
        )

    def _cells(self, one: TokenizedSlice, key: str) -> Path:
        return self.folder / f"cells-{_digest(key, one.digest)}"

    def _virtual(self, one: TokenizedSlice, key: str) -> Path:
        rules = {name: getattr(self.rules, name) for name in _VIRTUAL_RULES}
        return self.folder / f"virtual-{_digest(key, one.digest, rules)}"

    def _encode_slice(self, model: Stofm, one: TokenizedSlice, key: str) -> None:
        cells, virtual = self._cells(one, key), self._virtual(one, key)
        if not is_there(cells):
            features = encode_cells(
                model.cell_encoder,
                one.ranked,
                model.vocabulary,
                device=self.device,
                dtype=self.dtype,
            )
            _write(cells, features=features.astype(_STORED))
        if self.virtual_cells and not is_there(virtual):
            # From what is stored, not from what was computed: it must not matter who found it.
            features = open_array(cells / "features.npy").astype(np.float32)
            found = lay_out_slice(one.coordinates, features, self.rules).virtual
            _write(virtual, coordinates=found.coordinates, features=found.features)

    def _open_slice(self, one: TokenizedSlice, key: str) -> EncodedSlice:
        place = self._cells(one, key)
        if not place.is_dir():
            msg = (
                f"There are no cell embeddings of slice {one.name!r} in {self.folder} for the cell "
                f"encoder of the checkpoint. {_BEGIN_AGAIN}"
            )
            raise FileNotFoundError(msg)
        features = open_array(place / "features.npy")
        return EncodedSlice(
            features=features,
            layout=_layout(one, self._open_virtual(one, key, features.shape[1])),
        )

    def _open_virtual(self, one: TokenizedSlice, key: str, d_cell: int) -> VirtualCells:
        if not self.virtual_cells:
            return VirtualCells(np.empty((0, 2)), np.empty((0, d_cell), dtype=np.float32))
        place = self._virtual(one, key)
        return VirtualCells(
            coordinates=np.load(place / "coordinates.npy", allow_pickle=False),
            features=np.load(place / "features.npy", allow_pickle=False),
        )


def _layout(one: TokenizedSlice, virtual: VirtualCells) -> SliceLayout:
    """Lay a slice out in one piece: the sampler cuts it."""
    nowhere = np.broadcast_to(np.int64(0), one.n_cells)
    return SliceLayout(one.coordinates, subslice=nowhere, virtual_cell=nowhere, virtual=virtual)


def _digest(*parts: Any) -> str:
    described = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=8).hexdigest()


def _write(folder: Path, **arrays: NDArray[Any]) -> None:
    def fill(place: Path) -> None:
        for name, array in arrays.items():
            np.save(place / f"{name}.npy", array)

    write_folder(folder, fill)


def _require_sound(folder: Path) -> None:
    if folder.is_dir() and (damage := find_damage(folder)):
        msg = f"{damage} {_BEGIN_AGAIN}"
        raise ValueError(msg)
