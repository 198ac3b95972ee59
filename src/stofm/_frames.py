"""DataFrames in ``obsm`` whose columns are named by the user: classes, cell types, genes.

h5ad and Zarr can't hold every name as that of a column: a ``/`` would be a folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._anndata import read_record
from stofm._keys import Uns

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from anndata import AnnData

#: Names that mean something else in a file.
_RESERVED: Final = ("", ".", "..", "_index")
#: Entry of a record with the true names of columns.
_COLUMNS: Final = "columns"


def storable_names(names: Iterable[str]) -> list[str]:
    """Names that columns can have in a file, each once: ``_`` in place of ``/``.

    Names that can stay do. Two that would become the same are numbered.
    """
    given = list(names)
    taken = {name for name in given if _storable(name) == name}
    found = []
    for name in given:
        wanted = chosen = _storable(name)
        number = 2
        while chosen != name and chosen in taken:
            chosen, number = f"{wanted}_{number}", number + 1
        taken.add(chosen)
        found.append(chosen)
    return found


def _storable(name: str) -> str:
    plain = name.replace("/", "_")
    return f"{plain}_" if plain in _RESERVED else plain


def make_frame(adata: AnnData, values: Any, names: Sequence[str]) -> pd.DataFrame:
    """Values of all cells, (n_obs, n_names), with columns that can be written to a file."""
    import pandas as pd

    return pd.DataFrame(values, index=adata.obs_names, columns=storable_names(names))


def write_frame(adata: AnnData, key: str, frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Write what :func:`make_frame` made to ``obsm[key]``, after the record of `key` if it has one.

    The true names of the columns go into the record if some had to be changed.
    """
    adata.obsm[key] = frame
    record = dict(read_record(adata, key) or {})
    record.pop(_COLUMNS, None)
    if list(frame.columns) != list(names):
        record[_COLUMNS] = np.array(names, dtype=object)
    _replace_record(adata, key, record)


def remove_frame(adata: AnnData, key: str) -> None:
    """Remove ``obsm[key]`` with its record, if they are there."""
    if key in adata.obsm:
        del adata.obsm[key]
    _replace_record(adata, key, {})


def _replace_record(adata: AnnData, key: str, record: dict[str, Any]) -> None:
    entries = dict(adata.uns.get(Uns.STOFM, {}))
    entries.pop(key, None)
    if record:
        entries[key] = record
    if entries or Uns.STOFM in adata.uns:
        adata.uns[Uns.STOFM] = entries


def frame_names(adata: AnnData, key: str) -> list[str]:
    """True names of the columns of the DataFrame in ``obsm[key]``."""
    frame: Any = adata.obsm[key]
    names = [str(name) for name in (read_record(adata, key) or {}).get(_COLUMNS, ())]
    true = dict(zip(storable_names(names), names, strict=True))
    return [true.get(str(column), str(column)) for column in frame.columns]
