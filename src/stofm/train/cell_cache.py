"""Cell embeddings and virtual cells of a corpus, computed once and kept on disk."""

from __future__ import annotations

import shutil
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._logging import progress
from stofm.nn.inference import encode_cells
from stofm.spatial import SliceLayout, VirtualCells, lay_out_slice
from stofm.train.storage import digest_json, find_damage, is_there, open_array, write_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from stofm.nn import Stofm
    from stofm.spatial import SubSliceConfig
    from stofm.train.corpus import Corpus, TokenizedSlice
    from stofm.train.processes import Processes


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
#: What a checkpoint refers to stays on disk for this many checkpoints: the last, and the one before.
_REFERRED_TO = 2


@dataclass(frozen=True, eq=False)
class EncodedSlice:
    """What the SE(2) Transformer reads of one slice."""

    #: (n_cells, d_cell) cell embeddings, memory-mapped.
    features: NDArray[np.float16]
    #: Coordinates and virtual cells; for :func:`stofm.spatial.build_subslice`.
    layout: SliceLayout


@dataclass(frozen=True, kw_only=True)
class CellCache:
    """Encodes the slices of a corpus and keeps the result on disk.

    A result is found again by the weights of the cell encoder, the tokens and the rules that
    made it, so that stages, runs and processes share one folder. Without `virtual_cells`
    sub-slices consist of cells alone.
    """

    folder: Path
    corpus: Corpus
    rules: SubSliceConfig
    virtual_cells: bool
    device: torch.device
    dtype: torch.dtype

    def encode(
        self, model: Stofm, processes: Processes, *, show_progress_bar: bool = False
    ) -> tuple[str, list[EncodedSlice]]:
        """Encode all slices with the model's cell encoder as it is now.

        Each process encodes its share. Returns the key under which :meth:`open` finds the
        result, and the slices.
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
        """Open what :meth:`encode` wrote."""
        return [self._open_slice(s, key) for s in self.corpus.slices]

    def check(self, key: str, processes: Processes) -> None:
        """Compare this process's share of a result with what was written."""
        for one in self.corpus.slices[processes.rank :: processes.count]:
            for folder in self._folders(one, key):
                if folder.is_dir() and (damage := find_damage(folder)):
                    msg = f"{damage} {_BEGIN_AGAIN}"
                    raise ValueError(msg)

    def remove(self, key: str) -> None:
        """Delete a result that is not needed any more."""
        for one in self.corpus.slices:
            for folder in self._folders(one, key):
                shutil.rmtree(folder, ignore_errors=True)

    def key_of(self, model: Stofm) -> str:
        """Key of what :meth:`encode` would give for the cell encoder as it is now."""
        return digest_json(
            _FORMAT_VERSION,
            model.cell_encoder_fingerprint,
            model.vocabulary.fingerprint,
            asdict(model.config.cell_encoder),
            str(self.dtype),
        )

    def _folders(self, one: TokenizedSlice, key: str) -> tuple[Path, Path]:
        """Folders of a slice's cell embeddings and of its virtual cells."""
        rules = {name: getattr(self.rules, name) for name in _VIRTUAL_RULES}
        return (
            self.folder / f"cells-{digest_json(key, one.digest)}",
            self.folder / f"virtual-{digest_json(key, one.digest, rules)}",
        )

    def _encode_slice(self, model: Stofm, one: TokenizedSlice, key: str) -> None:
        cells, virtual = self._folders(one, key)
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
        cells, virtual = self._folders(one, key)
        if not cells.is_dir():
            msg = (
                f"There are no cell embeddings of slice {one.name!r} in {self.folder} for the cell "
                f"encoder of the checkpoint. {_BEGIN_AGAIN}"
            )
            raise FileNotFoundError(msg)
        features = open_array(cells / "features.npy")
        places, embedded = np.empty((0, 2)), np.empty((0, features.shape[1]), dtype=np.float32)
        if self.virtual_cells:
            places = np.load(virtual / "coordinates.npy", allow_pickle=False)
            embedded = np.load(virtual / "features.npy", allow_pickle=False)
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


class KeptResults:
    """Results of a stage on disk: the first, the present one, and older ones.

    The first is in the work folder, where other stages and runs may use it, and stays. Those
    after it are in a folder of the run, until no checkpoint refers to them; `remove` deletes one.
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
