"""Embeddings that heads read: which model made them, and made where there are none that fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._edge.places import read_coordinates
from stofm._edge.tables import read_record
from stofm._edge.tokens import stale_reason
from stofm._keys import Obsm, Uns, Var
from stofm._logging import logger
from stofm.nn.model import load_model
from stofm.pp import tokenize
from stofm.tl._embed import embed
from stofm.tl._encode_cells import encode_cells

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.corpus.sources import FileConfig
    from stofm.heads.request import Request, SliceTables
    from stofm.nn import Stofm

#: Representations that :func:`stofm.tl.embed` makes, which are computed where they are missing.
MADE_BY_EMBED = (Obsm.X_CELL, Obsm.X)
_FINGERPRINTS = ("model", "model_fingerprint", "cell_encoder", "vocabulary")
_NO_RECORD: Final = (
    " Records are in uns['stofm'], which ad.concat drops unless it is called with uns_merge='same'."
)

#: Where a representation comes from: name and fingerprints of its model; none if not recorded.
Origin = dict[str, dict[str, str]]


def origin_of(adata: AnnData, rep: str) -> dict[str, str]:
    """Name and fingerprints of the model that made an entry of ``obsm``, as far as recorded."""
    record = read_record(adata, rep) or {}
    return {name: str(record[name]) for name in _FINGERPRINTS if record.get(name)}


def origin_by(model: Stofm) -> Origin:
    """Origin of what :func:`stofm.tl.embed` makes with a model."""
    cell = {
        "model": model.name,
        "cell_encoder": model.cell_encoder_fingerprint,
        "vocabulary": model.vocabulary.fingerprint,
    }
    return {Obsm.X_CELL: cell, Obsm.X: {**cell, "model_fingerprint": model.fingerprint}}


def same_origin(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Whether two origins are the same model; its name does not change its numbers."""
    return {**first, "model": ""} == {**second, "model": ""}


def describe_origin(origin: Mapping[str, str]) -> str:
    """A model by name and fingerprint, for messages."""
    if not origin:
        return "an unrecorded model"
    fingerprint = origin.get("model_fingerprint") or origin.get("cell_encoder") or "none"
    return f"{origin.get('model', 'a model')} ({fingerprint})"


def gene_records(adata: AnnData) -> dict[str, Any]:
    """What ``uns`` must hold for an AnnData with the same ``var`` to have the same genes."""
    found = {key: read_record(adata, key) for key in (Var.GENE, Var.TOKEN_ID)}
    return {Uns.STOFM: {key: record for key, record in found.items() if record is not None}}


def counts_layer(adata: AnnData, layer: str | None) -> str | None:
    """Layer to read counts from: as asked for, or what was embedded; None for ``X``."""
    made_with = (read_record(adata, Obsm.TOKENS) or {}).get("params", {}).get("layer")
    return layer or (str(made_with) if made_with else None)


def recorded_options(adata: AnnData, request: Request | FileConfig) -> dict[str, Any]:
    """Options to read a table with: as asked for, or those that it was embedded with."""
    return {
        "library_key": slices_column(adata, request.library_key),
        "layer": counts_layer(adata, request.layer),
        "spatial_key": places_entry(adata, request.spatial_key),
    }


def with_embeddings(
    slices: SliceTables, reps: Sequence[str], request: Request, expected: Origin
) -> SliceTables:
    """The tables, with what was missing, or others aside that have the wanted embeddings.

    Keys and layer that a table was embedded with take the place of the defaults. `expected` is the
    origin of what a head was fitted to, if there is one.
    """
    is_missing = any(set(reps) & set(MADE_BY_EMBED) - set(table.obsm) for table in slices.tables)
    is_named = request.model is not None
    model = load_model(request.model) if is_named or is_missing else None
    made = {} if model is None else origin_by(model)
    for rep, origin in expected.items():
        if rep in made and not same_origin(made[rep], origin):
            raise ValueError(
                f"The head was fitted to embeddings from {describe_origin(origin)}, and the model to "
                f"embed with is {describe_origin(made[rep])}. Pass the head's model as `model`, or "
                "fit a new head."
            )

    def embedded(table: AnnData) -> AnnData:
        there = [rep for rep in reps if rep in table.obsm]
        found = {rep: _objection(table, rep, request, model, expected, made) for rep in there}
        objections = {rep: objection for rep, objection in found.items() if objection}
        if objections and not (is_named and set(objections) <= set(MADE_BY_EMBED)):
            raise ValueError(next(iter(objections.values())))
        if model is None or not (objections or set(reps) & set(MADE_BY_EMBED) - set(there)):
            return table
        options = request.reading | recorded_options(table, request)
        if objections:
            logger.info(
                "obsm[%r] is from another model, or from other counts, coordinates or slices, and is "
                "kept; cells are embedded separately.",
                next(iter(objections)),
            )
            table = bare_table(table, options)
        if Obsm.X in reps:
            read_places(table, options["spatial_key"])
            embed(table, model, **options)
        else:
            show = options["show_progress_bar"]
            tokenize(table, model, layer=options["layer"], show_progress_bar=show)
            encode_cells(table, model, device=options["device"], show_progress_bar=show)
        return table

    return replace(slices, tables=tuple(slices.each(embedded)))


def _objection(
    adata: AnnData, rep: str, request: Request, model: Stofm | None, expected: Origin, made: Origin
) -> str:
    """Why an entry can't be read; empty if it can."""
    found, wanted = origin_of(adata, rep), {**made, **expected}
    lacking = "" if found else _NO_RECORD
    if rep in wanted and not same_origin(found, wanted[rep]):
        this, other = describe_origin(found), describe_origin(wanted[rep])
        if expected:
            return (
                f"obsm[{rep!r}] is from {this}, and the head was fitted to embeddings from {other}. "
                f"Embed with that model: st.tl.embed(adata, model), or pass it as `model`.{lacking}"
            )
        return (
            f"obsm[{rep!r}] is by {this}, and what is missing beside it would be made with {other}. "
            f"Pass the model that made it as `model`.{lacking}"
        )
    if rep in MADE_BY_EMBED and not found:
        return (
            f"obsm[{rep!r}] has no record of the model that made it, so that a head fitted to it "
            "could not tell which cells it can be used on. Embed the cells again with st.tl.embed, "
            f"or pass `model` to embed them separately.{_NO_RECORD}"
        )
    if changed := _changed_option(adata, rep, request.reading):
        return changed
    reason = stale_reason(adata, rep, None if model is None else model.vocabulary)
    return reason and (
        f"{reason} Embed the cells again: st.tl.embed(adata); or pass `model` to embed them separately."
    )


def read_places(adata: AnnData, spatial_key: str) -> NDArray[np.float64]:
    """Read coordinates to embed with."""
    try:
        return read_coordinates(adata, spatial_key)
    except KeyError as error:
        raise KeyError(
            f"{error.args[0]} Dissociated cells have none: for them pass "
            f"use_rep={Obsm.X_CELL!r}, which st.pp.tokenize and st.tl.encode_cells make of counts "
            "alone."
        ) from error


def _changed_option(adata: AnnData, rep: str, options: Mapping[str, Any]) -> str:
    """Say which option is given and not the one that an embedding was made with."""
    made = _options_of(adata, rep)
    for name, value in made.items():
        asked = options[name]
        # Nobody need repeat the options of `embed` to read what it made.
        if asked is None or asked == value or (name, asked) == ("spatial_key", Obsm.SPATIAL):
            continue
        if name == "library_key" and _same_slices(adata, value, asked):
            continue
        return (
            f"obsm[{rep!r}] was made with {name}={value or None!r}, and {name}={asked!r} is asked "
            f"for. Embed the cells again: st.tl.embed(adata, {name}={asked!r}); or pass `model` to "
            f"embed them separately, or leave {name} out if it does not matter."
        )
    return ""


def _options_of(adata: AnnData, rep: str) -> dict[str, str]:
    """Options that an embedding was made with, as far as recorded; empty text for none."""
    record = read_record(adata, rep) or {}
    if not origin_of(adata, rep):
        return {}
    sources: dict[str, Mapping[str, Any]] = {"layer": read_record(adata, Obsm.TOKENS) or {}}
    # Without their digest, records are of several AnnData that were joined: slices of their own.
    if "subslice" in record:
        sources |= {"library_key": record, "spatial_key": record}
    params = {name: source.get("params", {}) for name, source in sources.items()}
    return {name: str(own[name] or "") for name, own in params.items() if name in own}


def slices_column(adata: AnnData, library_key: str | None) -> str | None:
    """Column that tells slices apart: as asked for, or the one that embeddings were made with."""
    found = _recorded(adata, "library_key") if library_key is None else ""
    return found if found in adata.obs else library_key


def places_entry(adata: AnnData, spatial_key: str) -> str:
    """Entry with coordinates: as asked for, or in place of the default what embeddings were made with."""
    found = _recorded(adata, "spatial_key") if spatial_key == Obsm.SPATIAL else ""
    return found if found in adata.obsm else spatial_key


def _recorded(adata: AnnData, option: str) -> str:
    return _options_of(adata, Obsm.X).get(option, "") if Obsm.X in adata.obsm else ""


def _same_slices(adata: AnnData, *columns: str) -> bool:
    """Whether two columns of ``obs`` (no name: one slice) put the same cells together."""
    import pandas as pd

    if not set(columns) - {""} <= set(adata.obs):
        return False
    first, second = (
        pd.factorize(adata.obs[name].astype(str))[0] if name else np.zeros(adata.n_obs)
        for name in columns
    )
    return bool(np.array_equal(first, second))


def bare_table(adata: AnnData, options: Mapping[str, Any]) -> AnnData:
    """The table's counts, genes, cells and places, without anything that a model made."""
    import anndata

    layer, spatial_key = options["layer"], options["spatial_key"]
    return anndata.AnnData(
        X=None if layer is not None else adata.to_memory().X if adata.isbacked else adata.X,
        obs=adata.obs.copy(),
        var=adata.var.copy(),
        obsm={key: adata.obsm[key] for key in (spatial_key,) if key in adata.obsm},
        layers=None if layer is None else {layer: adata.layers[layer]},
        uns=gene_records(adata),
    )
