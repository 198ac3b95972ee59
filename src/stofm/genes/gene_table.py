"""Tables of numbers for genes, such as embeddings of texts about them or of their proteins."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._config import require_rules
from stofm._digests import fingerprint
from stofm._files import local, read_table, reading
from stofm.genes.mapping import clean_names, map_gene_ids, strip_version

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    from numpy.typing import NDArray

    from stofm.genes.vocabulary import GeneVocabulary

_SEPARATORS: Final = {".tsv": "\t", ".tsv.gz": "\t", ".csv": ",", ".csv.gz": ","}
_SUFFIXES: Final = (".parquet", ".npz", *_SEPARATORS)
#: Array of an ``.npz`` file with the names of the genes.
_GENES: Final = "genes"
_EXPECTED: Final = "Expected human or mouse genes, as Ensembl ids or symbols."


@dataclass(frozen=True, eq=False)
class GeneTable:
    """Numbers for genes, the same count for each.

    Each Ensembl id or symbol in `names` (n,) occurs once; `values` (n, width) are finite. `file` is
    the name of the file, and `digest` stands for its content, in 16 hexadecimal digits.
    """

    names: tuple[str, ...]
    values: NDArray[np.float32]
    file: str
    digest: str

    @property
    def width(self) -> int:
        """Numbers of a gene."""
        return int(self.values.shape[1])

    @classmethod
    def read(cls, path: str | PathLike[str]) -> GeneTable:
        """Read a table; pickles in it are not.

        ``.parquet``, ``.tsv`` or ``.csv``, the latter two also with ``.gz``: genes in the first
        column (Parquet: or in the index), numbers in all others. ``.npz``: the array ``genes``,
        (n,) of text, and one other, (n, width). Rows without a gene are left out.
        """
        suffix = require_suffix(path, "A table of genes must be a file")
        place = local(path)
        if not place.is_file():
            raise FileNotFoundError(f"There is no table of genes {path}.")
        with reading(place, "table of genes"), np.errstate(over="ignore"):
            names, values = _read_arrays(place) if suffix == ".npz" else _read_frame(place, suffix)
            values = values.astype(np.float32, copy=False)
            digest = fingerprint(place.read_bytes())
        is_named = np.array([bool(name) for name in names], dtype=bool)
        names = [name for name in names if name]
        _require_numbers_of_genes(names, values[is_named], place)
        return cls(tuple(names), values[is_named], place.name, digest)

    def rows_of(self, vocabulary: GeneVocabulary) -> NDArray[np.int64]:
        """Find the row of each gene of a vocabulary: (n_genes,), -1 for none.

        If several rows are the same gene, the first with its id or symbol is used, or else the
        first with one of its other names (aliases, mouse orthologs).
        """
        mapping = map_gene_ids(self.names, vocabulary)
        genes = mapping.gene_index
        if not mapping.n_matched:
            found = ", ".join(repr(name) for name in mapping.unmatched)
            raise ValueError(
                f"{self.file}: none of its {len(self.names)} genes is in the vocabulary; found, for "
                f"example, {found}. {_EXPECTED}"
            )
        bare = np.array([strip_version(name) for name in self.names])
        is_own = (bare == mapping.gene_id) | (bare == vocabulary.symbols[genes])
        order = np.argsort(~is_own, kind="stable")
        order = order[genes[order] >= 0]
        found_genes, first = np.unique(genes[order], return_index=True)
        rows = np.full(vocabulary.n_genes, -1, dtype=np.int64)
        rows[found_genes] = order[first]
        return rows


def require_suffix(path: str | PathLike[str], what: str) -> str:
    """Return the ending of a table's name; `what` begins the message if it is none of these."""
    suffix = next((one for one in _SUFFIXES if str(path).endswith(one)), "")
    if not suffix:
        raise ValueError(
            f"{what} that ends in {', '.join(_SUFFIXES)}, found {str(path)!r}. Pickles are never "
            "read: write what they hold to one of these."
        )
    return suffix


def _read_frame(path: Path, suffix: str) -> tuple[list[str], NDArray[Any]]:
    """Names in the first column, and the numbers in the others."""
    import pandas as pd

    separator = _SEPARATORS.get(suffix)
    frame = read_table(path, sep=separator) if separator else pd.read_parquet(path)
    if not isinstance(frame.index, pd.RangeIndex):
        # The header of R's tables has no entry for the names.
        frame = frame.reset_index()
    numbers = frame.iloc[:, 1:]
    is_text = [name for name, kind in numbers.dtypes.items() if kind.kind not in "biuf"]
    if numbers.empty or is_text:
        found = f"{is_text[0]!r} holds something else" if is_text else f"the table is {frame.shape}"
        raise ValueError(
            f"{path}: expected genes in the first column and numbers in all others; {found}."
        )
    return clean_names(frame.iloc[:, 0]), numbers.to_numpy(dtype=np.float32, na_value=np.nan)


def _read_arrays(path: Path) -> tuple[list[str], NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        try:
            arrays = dict(file)
        except ValueError as error:
            raise ValueError(
                f"{path} can't be read without unpickling ({error}): save names as np.array(names, dtype=str)."
            ) from error
    names = arrays.pop(_GENES, np.empty(0))
    values = next(iter(arrays.values()), np.empty(0))
    is_table = names.ndim == 1 and values.ndim == 2 and len(names) == len(values)
    if len(arrays) != 1 or not is_table or values.dtype.kind not in "biuf":
        raise ValueError(
            f"{path}: expected the array {_GENES!r}, (n,), and one other, of numbers, (n, width)."
        )
    return clean_names(names), values


def _require_numbers_of_genes(names: list[str], values: NDArray[np.float32], path: Path) -> None:
    n, width = values.shape
    twice = [name for name, number in Counter(names).items() if number > 1]
    bad = [names[row] for row in np.flatnonzero(~np.isfinite(values).all(axis=1))]
    require_rules(
        {
            f"{path} names {n} genes, with {width} numbers each. {_EXPECTED}": min(n, width) > 0,
            f"{path}: {len(twice)} genes occur more than once, for example {twice[:3]}.": not twice,
            f"{path}: numbers of {len(bad)} genes are missing, infinite or beyond float32, for "
            f"example those of {bad[:3]}. Fill them in, or leave them out.": not bad,
        }
    )
