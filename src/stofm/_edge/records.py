"""What stofm writes into an AnnData: all of it or nothing, each entry with a record of its making."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._keys import Uns
from stofm._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

#: Entry of a record with the true names of a DataFrame's columns.
_COLUMNS: Final = "columns"


def write_record(adata: AnnData, key: str, params: Mapping[str, Any], **more: Any) -> None:
    """Record in ``uns["stofm"][key]`` how `key` was made: parameters, fingerprints and the like."""
    params = {name: _writable(value) for name, value in params.items()}
    _put_record(adata, key, {"params": params, "version": __version__, **more})


def read_record(adata: AnnData, key: str) -> dict[str, Any] | None:
    """Return the record of `key`, or None if stofm has not written it."""
    record = adata.uns.get(Uns.STOFM, {}).get(key)
    return None if record is None else dict(record)


def _put_record(adata: AnnData, key: str, record: dict[str, Any]) -> None:
    """Replace a record; an empty one removes it."""
    entries = dict(adata.uns.get(Uns.STOFM, {}))
    entries.pop(key, None)
    if record:
        entries[key] = record
    if entries or Uns.STOFM in adata.uns:
        adata.uns[Uns.STOFM] = entries


def same_params(record: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    """Whether `record` was made with `params` (also after a round trip through a file)."""
    stored = dict(record.get("params", {}))
    return stored.keys() == params.keys() and all(
        stored[name] == _writable(value) for name, value in params.items()
    )


def _writable(value: Any) -> Any:
    # h5ad and Zarr hold no None.
    return "" if value is None else value


def remove_entry(adata: AnnData, key: str) -> None:
    """Remove ``obsm[key]`` with its record, if they are there."""
    if key in adata.obsm:
        del adata.obsm[key]
    _put_record(adata, key, {})


def storable_names(names: Iterable[str]) -> list[str]:
    """Names that columns can have in a file, each once: ``_`` in place of ``/``, a folder there.

    Names that can stay do. Two that would become the same are numbered.
    """
    found = list(names)
    for place, name in enumerate(found):
        plain = chosen = name.replace("/", "_")
        number = 2
        while chosen != name and chosen in found:
            chosen, number = f"{plain}_{number}", number + 1
        found[place] = chosen
    return found


def make_frame(adata: AnnData, values: Any, names: Sequence[str]) -> pd.DataFrame:
    """Values of all cells, (n_obs, n_names), with columns that can be written to a file."""
    import pandas as pd

    return pd.DataFrame(values, index=adata.obs_names, columns=storable_names(names))


def write_frame(adata: AnnData, key: str, frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Write what :func:`make_frame` made to ``obsm[key]``, after the record of `key` if it has one.

    The true names of the columns go into the record if some had to be changed.
    """
    adata.obsm[key] = frame
    record = read_record(adata, key) or {}
    record.pop(_COLUMNS, None)
    if list(frame.columns) != list(names):
        record[_COLUMNS] = np.array(names, dtype=object)
    _put_record(adata, key, record)


def frame_names(adata: AnnData, key: str) -> list[str]:
    """True names of the columns of the DataFrame in ``obsm[key]``."""
    frame: Any = adata.obsm[key]
    names = [str(name) for name in (read_record(adata, key) or {}).get(_COLUMNS, ())]
    true = dict(zip(storable_names(names), names, strict=True))
    return [true.get(str(column), str(column)) for column in frame.columns]


@contextmanager
def all_or_nothing(*tables: AnnData) -> Iterator[None]:
    """Put back what the tables held if what is done within it does not come to its end.

    That is their ``obs``, ``var``, ``obsm`` and ``uns``, also of a backed AnnData: stofm writes
    nothing else. Arrays are not copied: stofm puts new ones in their place and changes none.
    """
    before = [_held(table) for table in tables]
    try:
        yield
    except BaseException:
        for table, held in zip(tables, before, strict=True):
            if not table.is_view:  # to one that still is a view nothing was written
                _put_back(table, *held)
        raise


def _held(adata: AnnData) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any], dict[str, Any]]:
    # Entries of a view are bound to it, and it ends with the first thing that is written.
    obsm = adata.obsm.copy() if adata.is_view else adata.obsm
    return adata.obs.copy(deep=False), adata.var.copy(deep=False), dict(obsm), dict(adata.uns)


def _put_back(
    adata: AnnData,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    obsm: dict[str, Any],
    uns: dict[str, Any],
) -> None:
    for held, former in ((adata.obsm, obsm), (adata.uns, uns)):
        for key in set(held) - set(former):
            del held[key]
        for key, value in former.items():
            if key not in held or held[key] is not value:
                held[key] = value
    adata.obs, adata.var = obs, var


def refuse_taken(key_added: str, suggestion: str, *taken: str | None) -> None:
    """Refuse a name that files can't hold, or that is one of `taken`, and suggest another."""
    if not key_added.strip(".") or set(key_added) & {"/", "\0"}:
        raise ValueError(
            f"key_added={key_added!r} can't be written to a file: a name has to have letters and no "
            f"'/'. Choose one such as {suggestion!r}."
        )
    if key_added in taken:
        raise ValueError(
            f"key_added={key_added!r} would replace something that is read or that means something "
            f"else; choose another name, such as {suggestion!r}."
        )


def refuse_foreign(
    adata: AnnData, key: str, *, obs: Iterable[str] = (), obsm: Iterable[str] = ()
) -> None:
    """Refuse to replace what stands under names made of `key` that stofm has not written."""
    if key.startswith(Uns.STOFM) or read_record(adata, key) is not None:
        return
    found = [f"obs[{name!r}]" for name in obs if name in adata.obs]
    found += [f"obsm[{name!r}]" for name in obsm if name in adata.obsm]
    if found:
        raise ValueError(
            f"key_added={key!r} would replace {' and '.join(found)}, which stofm has not written. "
            "Choose another name, or delete it first."
        )


def refuse_not_finite(task: str, *predicted: NDArray[Any] | None) -> None:
    """Refuse to write predictions that are NaN or infinite."""
    for values in predicted:
        if values is not None and (n_bad := int((~np.isfinite(values)).any(axis=1).sum())):
            raise FloatingPointError(
                f"The {task} of {n_bad} of {len(values)} cells is not finite, and nothing is "
                "written: the head's weights are damaged. Fit it again, or load it from where it "
                "was saved."
            )
