"""What heads read: tables of cells, the slices in them, and representations by a known model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._anndata import (
    Slices,
    read_coordinates,
    read_record,
    read_slices,
    resolve_table,
)
from stofm._keys import Obsm
from stofm._logging import logger
from stofm.tl._embed import embed
from stofm.tl._encode_cells import load_model
from stofm.tl._representations import read_representation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.nn import Stofm

#: Representations that :func:`stofm.tl.embed` makes, which are computed where they are missing.
MADE_BY_EMBED = (Obsm.X_CELL, Obsm.X)
DEFAULT_REP = (Obsm.X_CELL, Obsm.X)
_FINGERPRINTS = ("model", "model_fingerprint", "cell_encoder", "vocabulary")

#: Where a representation comes from: name and fingerprints of its model; none if not recorded.
Origin = dict[str, dict[str, str]]


@dataclass(frozen=True, eq=False)
class Sections:
    """Tables whose cells are taken one after another, and the slices in them.

    Attributes
    ----------
    tables
        The AnnData objects.
    keys
        Of the tables in the dict that was given; None for a list, or for a single one.
    is_single
        Whether a single one was given.
    slices
        Names and rows of the slices; rows count through all tables.
    """

    tables: tuple[AnnData, ...]
    keys: tuple[str, ...] | None
    is_single: bool
    slices: Slices

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return sum(table.n_obs for table in self.tables)

    @property
    def places(self) -> list[slice]:
        """Rows of each table."""
        ends = np.cumsum([table.n_obs for table in self.tables]).tolist()
        return [slice(end - t.n_obs, end) for t, end in zip(self.tables, ends, strict=True)]

    def copied(self) -> Sections:
        """The same with copies of the tables."""
        tables = tuple(table.copy() for table in self.tables)
        return Sections(tables, self.keys, self.is_single, self.slices)

    def as_given(self) -> Any:
        """The tables in the form in which they were given: one, a list or a dict."""
        if self.is_single:
            return self.tables[0]
        if self.keys is None:
            return list(self.tables)
        return dict(zip(self.keys, self.tables, strict=True))

    def coordinates(self, spatial_key: str) -> NDArray[np.float64]:
        """Places of all cells, (n_obs, 2)."""
        return np.concatenate([read_coordinates(table, spatial_key) for table in self.tables])


def resolve_slices(
    data: Any,
    library_key: str | None = None,
    *,
    spatial_key: str = Obsm.SPATIAL,
    table_key: str | None = None,
    copy: bool = False,
) -> Sections:
    """Take an AnnData, a SpatialData, or a list or dict of them, and tell slices apart.

    Parameters
    ----------
    data
        The data. Those of a list or dict are different slices.
    library_key
        Column of ``obs`` that names each cell's slice.
    spatial_key
        Entry of ``obsm`` with coordinates; they tell overlapping slices without `library_key`.
    table_key
        Table of SpatialData.
    copy
        Whether copies of the tables will be made later on.

    Raises
    ------
    KeyError
        There is no such table or column.
    TypeError
        `data` is something else.
    ValueError
        There are no cells, an AnnData occurs twice, or slices can't be told apart.
    """
    is_dict, is_list = isinstance(data, dict), isinstance(data, list | tuple)
    given = list(data.values()) if is_dict else list(data) if is_list else [data]
    tables = tuple(resolve_table(one, table_key, copy=copy) for one in given)
    if not tables or len({id(table) for table in tables}) < len(tables):
        msg = f"Expected different AnnData, found {len(tables)} of which some are the same."
        raise ValueError(msg if tables else "The list of AnnData is empty.")
    names = [str(k) for k in (data if is_dict else range(len(tables)))]
    slices = Slices(names=[], rows=[])
    start = 0
    for name, table in zip(names, tables, strict=True):
        own = _read_slices(table, library_key, spatial_key)
        prefix = name if is_dict or is_list else ""
        slices.names.extend(":".join(filter(None, (prefix, part))) for part in own.names)
        slices.rows.extend(rows + start for rows in own.rows)
        start += table.n_obs
    keys = tuple(names) if is_dict else None
    return Sections(tables, keys, not (is_dict or is_list), slices)


def _read_slices(adata: AnnData, library_key: str | None, spatial_key: str) -> Slices:
    if adata.n_obs == 0:
        msg = "An AnnData has no cells; nothing to do. Was it filtered too hard?"
        raise ValueError(msg)
    # Coordinates tell whether there are several slices where no column is given.
    if library_key is None and spatial_key in adata.obsm:
        return read_slices(adata, None, read_coordinates(adata, spatial_key))
    if library_key is None:
        return Slices(names=[""], rows=[np.arange(adata.n_obs)])
    return read_slices(adata, library_key, np.empty((0, 2)))


@dataclass(frozen=True, eq=False)
class Inputs:
    """Representations of cells.

    Attributes
    ----------
    features
        float32 (n, d), the representations side by side.
    use_rep
        Their names.
    widths
        Columns of each.
    origin
        By name, which model they are by.
    """

    features: NDArray[np.float32]
    use_rep: tuple[str, ...]
    widths: tuple[int, ...]
    origin: Origin

    def take(self, rows: NDArray[np.int64]) -> Inputs:
        """The same of some cells."""
        return replace(self, features=self.features[rows])


def read_inputs(
    sections: Sections,
    *,
    use_rep: str | Sequence[str] = DEFAULT_REP,
    model: Stofm | str | Path | None = None,
    expected: Origin | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    device: str | torch.device = "auto",
    show_progress_bar: bool = True,
) -> Inputs:
    """Read representations, and embed cells where those of :func:`stofm.tl.embed` are missing.

    Embeddings that are missing are written to the tables, as `embed` does. Those by another model
    than the given one are left as they are: the cells are embedded aside.

    Parameters
    ----------
    sections
        The cells.
    use_rep
        Names of entries of ``obsm``.
    model
        Whose embeddings to read; None for whatever is there, or stofm-mini if nothing is.
    expected
        Origin of what a head was fitted to; other models' embeddings are refused.
    library_key, layer, spatial_key, device, show_progress_bar
        As in :func:`stofm.tl.embed`.

    Raises
    ------
    KeyError
        A representation is missing that `embed` does not make.
    ValueError
        Embeddings are by another model, by several, are not finite, or differ in width.
    """
    reps = checked_reps(use_rep)
    chosen = _Model(None if model is None else load_model(model), expected)
    options = {
        "library_key": library_key,
        "layer": layer,
        "spatial_key": spatial_key,
        "device": device,
        "show_progress_bar": show_progress_bar,
    }
    tables = [chosen.with_embeddings(table, reps, options) for table in sections.tables]
    features, widths = [], []
    for rep in reps:
        parts = [read_representation(table, rep) for table in tables]
        found = {part.shape[1] for part in parts}
        if len(found) > 1:
            msg = f"obsm[{rep!r}] has {sorted(found)} columns in different AnnData; make it anew."
            raise ValueError(msg)
        features.append(np.concatenate(parts))
        widths.append(found.pop())
    origin = {rep: _common_origin(tables, rep) for rep in reps}
    return Inputs(np.concatenate(features, axis=1), reps, tuple(widths), origin)


def checked_reps(use_rep: str | Sequence[str]) -> tuple[str, ...]:
    """Names of representations as a tuple.

    Raises
    ------
    ValueError
        There are none, or one occurs twice.
    """
    reps = (use_rep,) if isinstance(use_rep, str) else tuple(use_rep)
    if not reps or len(set(reps)) < len(reps):
        msg = f"use_rep must name one or several entries of obsm, each once; found {use_rep!r}."
        raise ValueError(msg)
    return reps


def origin_of(adata: AnnData, rep: str) -> dict[str, str]:
    """Name and fingerprints of the model that made an entry of ``obsm``, as far as recorded."""
    record = read_record(adata, rep) or {}
    return {name: str(record[name]) for name in _FINGERPRINTS if record.get(name)}


def same_origin(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Whether two origins are the same model; its name does not change its numbers."""
    return {**first, "model": ""} == {**second, "model": ""}


def describe_origin(origin: Mapping[str, str]) -> str:
    """A model by name and fingerprint, for messages."""
    if not origin:
        return "an unrecorded model"
    fingerprint = origin.get("model_fingerprint") or origin.get("cell_encoder") or "none"
    return f"{origin.get('model', 'a model')} ({fingerprint})"


class _Model:
    """The model whose embeddings are wanted, loaded when it is needed.

    Parameters
    ----------
    model
        None for whichever made what is there.
    expected
        What a head was fitted to.
    """

    def __init__(self, model: Stofm | None, expected: Origin | None) -> None:
        self._given = model
        self._model = model
        self._expected = expected
        self._made: Origin | None = None

    def with_embeddings(
        self, adata: AnnData, reps: Sequence[str], options: Mapping[str, Any]
    ) -> AnnData:
        """Return the table, with what was missing, or one aside that has the wanted ones."""
        own = [rep for rep in reps if rep in MADE_BY_EMBED]
        missing = [rep for rep in own if rep not in adata.obsm]
        there = [rep for rep in reps if rep in adata.obsm]
        wanted = self._wanted(is_needed=bool(missing))
        wrong = [
            r for r in there if r in wanted and not same_origin(origin_of(adata, r), wanted[r])
        ]
        if not missing and not wrong:
            return adata
        if wrong and (self._given is None or not set(wrong) <= set(own)):
            raise ValueError(_refusal(adata, wrong[0], wanted[wrong[0]], is_fitted=self._is_fitted))
        if wrong:
            logger.info("obsm[%r] is by another model and stays; embedding aside.", wrong[0])
            adata = _bare(adata, [r for r in reps if r not in own], options)
        embed(adata, load_model(self._model), **options)
        return adata

    @property
    def _is_fitted(self) -> bool:
        return self._expected is not None

    def _wanted(self, *, is_needed: bool) -> Origin:
        """Origins that embeddings must have, by name."""
        if self._model is None and is_needed:
            self._model = load_model(None)
        if self._model is not None and self._made is None:
            self._made = origin_by(self._model)
            self._check_against_head()
        return {**(self._made or {}), **(self._expected or {})}

    def _check_against_head(self) -> None:
        for rep, origin in (self._expected or {}).items():
            if rep in MADE_BY_EMBED and not same_origin((self._made or {})[rep], origin):
                msg = (
                    f"The head was fitted to embeddings by {describe_origin(origin)}, and the model "
                    f"to embed with is {describe_origin((self._made or {})[rep])}. Pass the head's "
                    "model as `model`, or fit a new head."
                )
                raise ValueError(msg)


def origin_by(model: Stofm) -> Origin:
    """Origin of what :func:`stofm.tl.embed` makes with a model."""
    common = {"model": model.name, "vocabulary": model.vocabulary.fingerprint}
    return {
        Obsm.X_CELL: {**common, "cell_encoder": model.cell_encoder_fingerprint},
        Obsm.X: {**common, "model_fingerprint": model.fingerprint},
    }


def _refusal(adata: AnnData, rep: str, wanted: Mapping[str, str], *, is_fitted: bool) -> str:
    found = describe_origin(origin_of(adata, rep))
    if is_fitted:
        return (
            f"obsm[{rep!r}] is by {found}, and the head was fitted to embeddings by "
            f"{describe_origin(wanted)}. Embed with that model: st.tl.embed(adata, model), or pass "
            "it as `model`."
        )
    return (
        f"obsm[{rep!r}] is by {found}, and what is missing beside it would be made with "
        f"{describe_origin(wanted)}. Pass the model that made it as `model`."
    )


def _bare(adata: AnnData, kept: Sequence[str], options: Mapping[str, Any]) -> AnnData:
    """The table's counts, genes, cells and places, without anything that a model made."""
    import anndata

    layer = options["layer"]
    keys = [key for key in (options["spatial_key"], *kept) if key in adata.obsm]
    return anndata.AnnData(
        X=None if layer is not None else adata.to_memory().X if adata.isbacked else adata.X,
        obs=adata.obs.copy(),
        var=adata.var.copy(),
        obsm={key: adata.obsm[key] for key in keys},
        layers=None if layer is None else {layer: adata.layers[layer]},
    )


def _common_origin(tables: Sequence[AnnData], rep: str) -> dict[str, str]:
    found = [origin_of(table, rep) for table in tables]
    for k, other in enumerate(found):
        if not same_origin(other, found[0]):
            msg = (
                f"obsm[{rep!r}] is by {describe_origin(found[0])} in the first AnnData and by "
                f"{describe_origin(other)} in number {k + 1}. Embed all with one model, or pass it "
                "as `model`."
            )
            raise ValueError(msg)
    return found[0]
