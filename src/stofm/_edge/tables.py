"""The user's table: what is read from it, and what is written to it with a record."""

from __future__ import annotations

import itertools
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._arrays import count_not_finite
from stofm._keys import Obsm, Uns
from stofm._logging import logger
from stofm._messages import require_name
from stofm._version import __version__
from stofm.genes.ranking import require_sound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

#: Functions that make a representation.
_STEPS: Final = {Obsm.X: "st.tl.embed", Obsm.X_CELL: "st.tl.encode_cells"}
#: Entry of a record with the true names of a DataFrame's columns.
_COLUMNS: Final = "columns"
#: Entry of a record: what has changed since.
OUTDATED: Final = "outdated"


def resolve_table(data: Any, table_key: str | None = None, *, copy: bool = False) -> AnnData:
    """Return the AnnData to work on: `data` itself, or the named table of a SpatialData.

    A SpatialData's table without ``obsm["spatial"]`` gets the centroids of the elements that it
    annotates. `copy` says whether the caller will copy the table, which a backed one does not
    allow.
    """
    if hasattr(data, "tables") and not hasattr(data, "obsm"):
        sdata, key = data, table_name(data.tables, table_key)
        data = sdata.tables[key]
        if Obsm.SPATIAL not in data.obsm:
            data = data.copy() if copy else data
            add_centroids(sdata, data, key)
    if not (hasattr(data, "obsm") and hasattr(data, "var_names")):
        raise TypeError(f"Expected an AnnData or a SpatialData, found {type(data).__name__}.")
    adata: AnnData = data
    if adata.isbacked and (copy or adata.is_view):
        raise ValueError(
            "A backed AnnData can't be copied, nor its view written to, without a new file: use "
            "adata.to_memory(), or work on the whole backed AnnData with copy=False."
        )
    for name in ("obs", "var"):
        frame: Any = getattr(adata, name)
        if hasattr(frame, "to_memory"):  # of anndata.experimental.read_lazy
            setattr(adata, name, frame.to_memory())
    return adata


def table_name(tables: Iterable[str], table_key: str | None) -> str:
    """Name of the table: the only one, if none is given."""
    names = sorted(tables)
    if not names:
        raise ValueError("This SpatialData has no table of counts. Pass one with a table.")
    if table_key is None and len(names) == 1:
        return names[0]
    if table_key not in names:
        raise KeyError(f"The SpatialData has the tables {names}; pass one of them as `table_key`.")
    return table_key


def add_centroids(sdata: Any, table: AnnData, key: str) -> None:
    """Set ``obsm["spatial"]`` of the table `key` to centroids of the elements that it annotates.

    Each region is read in the coordinate system "global", or in its only one. The record says
    which.
    """
    attrs = table.uns.get("spatialdata_attrs")
    if not attrs or table.n_obs == 0:
        return
    obs = table.obs.reset_index(drop=True)
    centroids, used = np.full((table.n_obs, 2), np.nan), {}
    for name, rows in obs.groupby(attrs["region_key"], observed=True).indices.items():
        if name not in sdata:
            logger.info(
                "The table annotates %r, which the SpatialData lacks: no centroids are taken.", name
            )
            return
        found, used[str(name)] = _centroids_of(sdata[name], f"sdata[{name!r}]")
        wanted = obs[attrs["instance_key"]].iloc[rows]
        is_lost = ~wanted.isin(found.index).to_numpy()
        if n_lost := int(is_lost.sum()):
            cells = table.obs_names[rows[is_lost]].tolist()
            mine = f"sdata[{key!r}]"
            drop = f"{mine} = {mine}[~{mine}.obs_names.isin({cells})].copy()"
            raise ValueError(
                f"{n_lost} of {len(rows)} instances of {name!r} in the table are not there, for "
                f"example {wanted[is_lost].tolist()[:3]}; its ids are such as "
                f"{found.index[:3].tolist()}. "
                + (f"Drop them: {drop}" if n_lost <= 10 else "Drop them, or correct the ids.")
            )
        centroids[rows] = found.loc[wanted, ["x", "y"]]
    table.obsm[Obsm.SPATIAL] = centroids
    write_record(table, Obsm.SPATIAL, used)
    logger.info(
        "The table has no obsm[%r]: it is set to centroids (region: coordinate system %s).",
        *(Obsm.SPATIAL, used),
    )


def _centroids_of(element: Any, written: str) -> tuple[pd.DataFrame, str]:
    """Centroids of an element by instance, and their coordinate system."""
    from spatialdata import get_centroids
    from spatialdata.transformations import get_transformation

    systems = sorted(get_transformation(element, get_all=True))
    if "global" not in systems and len(systems) > 1:
        raise ValueError(
            f"{written} has the coordinate systems {systems} and none that is 'global'; choose one: "
            "from spatialdata.transformations import get_transformation, set_transformation; "
            f"set_transformation({written}, get_transformation({written}, {systems[0]!r}), 'global')"
        )
    system = "global" if "global" in systems else systems[0]
    with warnings.catch_warnings():
        # Ids need not be in order.
        warnings.filterwarnings("ignore", "The index of the dataframe is not monotonic")
        return get_centroids(element, coordinate_system=system).compute(), system


# What is read


def require_cells_and_genes(adata: AnnData) -> None:
    """Raise an error for an AnnData without rows or columns."""
    if 0 in adata.shape:
        what = "cells" if adata.n_obs == 0 else "genes"
        raise ValueError(
            f"The AnnData has no {what} (shape {adata.shape}). Was it filtered too hard?"
        )


def layer_names(adata: AnnData) -> list[str]:
    """Names of the layers; anndata 0.13 has ``X`` among them, as None."""
    return [name for name in adata.layers if name is not None]


def read_representation(adata: AnnData, rep: str) -> NDArray[np.float32]:
    """Read an entry of ``obsm`` as finite float32 (n_obs, d)."""
    hint = f" Run {_STEPS[rep]}(adata) first." if rep in _STEPS else ""
    require_name(rep, adata.obsm, f"There is no obsm[{rep!r}].{hint}")
    stored: Any = adata.obsm[rep]
    require_sound(stored, f"adata.obsm[{rep!r}]")
    values = np.asarray(stored.toarray() if sparse.issparse(stored) else stored)
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "biuf":
        raise ValueError(
            f"obsm[{rep!r}] has the shape {values.shape} and the type {values.dtype}; expected "
            "numbers, (n_obs, d), of at least one cell."
        )
    values = values.astype(np.float32, copy=False)
    if n_bad := count_not_finite(values):
        raise ValueError(
            f"{n_bad} of {adata.n_obs} cells have NaN or infinite values in obsm[{rep!r}]; make it "
            "again or drop these cells."
        )
    return values


def label_text(column: pd.Series) -> NDArray[np.object_]:
    """Labels of a column as text, (n,), empty where there is none.

    pandas turns integers into 0.0, 1.0 if one is missing; they still become "0", "1".
    """
    import pandas as pd

    codes, labels = pd.factorize(column)
    is_whole = [isinstance(one, float | np.floating) and float(one).is_integer() for one in labels]
    texts = [str(int(one) if whole else one) for one, whole in zip(labels, is_whole, strict=True)]
    found: NDArray[np.object_] = np.array([*texts, ""], dtype=object)[codes]
    return found


# What is written


def write_record(adata: AnnData, key: str, params: Mapping[str, Any], **more: Any) -> None:
    """Record in ``uns["stofm"][key]`` how `key` was made: parameters, fingerprints and the like."""
    params = {name: _writable(value) for name, value in params.items()}
    _put_record(adata, key, {"params": params, "version": __version__, **more})


def read_record(adata: AnnData, key: str) -> dict[str, Any] | None:
    """Return the record of `key`, or None if stofm did not write it."""
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
    # h5ad and Zarr can't store None.
    return "" if value is None else value


def mark_outdated(adata: AnnData, what: str, is_meant: Callable[[Mapping[str, Any]], bool]) -> None:
    """Record in these embeddings' records that they are older than something read now."""
    entries = dict(adata.uns.get(Uns.STOFM, {}))
    for key, record in entries.items():
        if "cell_encoder" in record and key in adata.obsm and is_meant(record):
            entries[key] = {**record, OUTDATED: what}
    adata.uns[Uns.STOFM] = entries


def remove_entry(adata: AnnData, key: str) -> None:
    """Remove ``obsm[key]`` with its record, if they are there."""
    if key in adata.obsm:
        del adata.obsm[key]
    _put_record(adata, key, {})


def storable_names(names: Iterable[str]) -> list[str]:
    """Unique names that columns can have in a file: ``_`` replaces ``/``, which would be a folder.

    Valid names stay. Two that would become the same are numbered.
    """
    found = list(names)
    for place, name in enumerate(found):
        plain = name.replace("/", "_")
        tried = itertools.chain([plain], (f"{plain}_{number}" for number in itertools.count(2)))
        found[place] = next(one for one in tried if one == name or one not in found)
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
    """Restore the tables if the block fails.

    Restored are ``obs``, ``var``, ``obsm`` and ``uns``, also of a backed AnnData: stofm writes
    nothing else. Arrays are not copied, because stofm replaces arrays and never changes them. A
    view becomes an AnnData of its own with the first write, as intended, without a warning.
    """
    before = [_held(one) for one in tables]
    try:
        with _quiet_views(tables):
            yield
    except BaseException:
        for one, (obs, var, former_obsm, former_uns) in zip(tables, before, strict=True):
            if one.is_view:  # nothing was written to it
                continue
            for held, former in ((one.obsm, former_obsm), (one.uns, former_uns)):
                for key in set(held) - set(former):
                    del held[key]
                for key, value in former.items():
                    if key not in held or held[key] is not value:
                        held[key] = value
            one.obs, one.var = obs, var
        raise


@contextmanager
def _quiet_views(tables: Sequence[AnnData]) -> Iterator[None]:
    if not any(one.is_view for one in tables):
        yield
        return
    from anndata import ImplicitModificationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        yield


def _held(adata: AnnData) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any], dict[str, Any]]:
    # Entries of a view are bound to it, and it ends with the first write.
    obsm = adata.obsm.copy() if adata.is_view else adata.obsm
    return adata.obs.copy(deep=False), adata.var.copy(deep=False), dict(obsm), dict(adata.uns)


def refuse_taken(key_added: str, suggestion: str, *taken: str | None) -> None:
    """Raise an error for a name that files can't hold or that is in `taken`; suggest another."""
    if not key_added.strip(".") or set(key_added) & {"/", "\0"}:
        raise ValueError(
            f"key_added={key_added!r} can't be written to a file: a name has to have letters and no "
            f"'/'. Choose one such as {suggestion!r}."
        )
    if key_added in taken:
        raise ValueError(
            f"key_added={key_added!r} would replace something that is used or that means something "
            f"else; choose another name, such as {suggestion!r}."
        )


def refuse_foreign(
    adata: AnnData, key: str, *, obs: Iterable[str] = (), obsm: Iterable[str] = ()
) -> None:
    """Raise an error if entries named after `key` exist that stofm did not write."""
    if key.startswith(Uns.STOFM) or read_record(adata, key) is not None:
        return
    found = [f"obs[{name!r}]" for name in obs if name in adata.obs]
    found += [f"obsm[{name!r}]" for name in obsm if name in adata.obsm]
    if found:
        raise ValueError(
            f"key_added={key!r} would replace {' and '.join(found)}, which stofm did not write. "
            "Choose another name, or delete it first."
        )


def refuse_not_finite(task: str, *predicted: NDArray[Any] | None) -> None:
    """Raise an error for predictions that are NaN or infinite."""
    for values in predicted:
        if values is not None and (n_bad := count_not_finite(values)):
            raise FloatingPointError(
                f"The {task} of {n_bad} of {len(values)} cells is not finite, and nothing is "
                "written: the head's weights are damaged. Fit it again, or load it from where it "
                "was saved."
            )
