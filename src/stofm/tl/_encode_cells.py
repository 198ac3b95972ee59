"""``stofm.tl.encode_cells``: the gene scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stofm._edge.records import all_or_nothing, read_record, write_record
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm.nn import Stofm, choose_device, choose_dtype
from stofm.nn import encode_cells as encode_ranked
from stofm.pp._staleness import changed_counts, is_outdated
from stofm.pp._token_entries import read_ranked, values_are_stored

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes import RankedTokens


def encode_cells(
    adata: Any,
    model: Stofm | str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    token_budget: int | Literal["auto"] = "auto",
    table_key: str | None = None,
    show_progress_bar: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Embed each cell from its ranked genes, without regard to place (gene scale).

    Parameters
    ----------
    adata
        Annotated data with tokens (:func:`stofm.pp.tokenize`), or a SpatialData with such a
        table.
    model
        A model, a checkpoint folder or a hub id; the embedded ``"stofm-mini"`` by default.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    dtype
        ``"auto"`` (bfloat16 on CUDA, float32 elsewhere), ``"float32"`` or ``"bfloat16"``.
    token_budget
        Tokens computed at a time; fitted to the device by default. Does not change the result;
        halved when the device runs out of memory.
    table_key
        Table of a SpatialData.
    show_progress_bar
        Show a bar.
    copy
        Return a changed copy and leave `adata` as it is.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData. Sets:

    ``adata.obsm['X_stofm_cell']`` : float32 (n_obs, d_cell)
        Cell embeddings, of unit length unless the model pools.
    ``adata.uns['stofm']['X_stofm_cell']`` : dict
        Parameters and fingerprints of model and vocabulary.

    Raises
    ------
    KeyError
        There are no tokens, or no values of tokens for a model that reads them.
    ValueError
        The tokens belong to another vocabulary or are of other counts.
    MemoryError
        The device has no room for a single cell.
    FloatingPointError
        The device gave NaN.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.1.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(500, 100, seed=0)
    >>> st.pp.tokenize(adata)
    >>> st.tl.encode_cells(adata)
    >>> adata.obsm["X_stofm_cell"].shape
    (500, 128)
    """
    table = resolve_table(adata, table_key, copy=copy)
    model = load_model(model)
    model.warn_if_untrained()
    ranked = read_tokens(table, model)
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    features = encode_ranked(
        model.cell_encoder,
        ranked,
        model.vocabulary,
        device=place,
        dtype=precision,
        token_budget=checked_budget("token_budget", token_budget),
        show_progress_bar=show_progress_bar,
    )
    result = CellEmbedding(features, cell_record(model, ranked, precision))
    target = table.copy() if copy else table
    with all_or_nothing(target):
        write_cell_embedding(target, result)
    return target if copy else None


def load_model(model: Any) -> Stofm:
    """Take a model as it is, or load it by name."""
    if model is None or isinstance(model, str | Path):
        return Stofm.from_pretrained("stofm-mini" if model is None else model)
    if not isinstance(model, Stofm):
        msg = f"model must be a Stofm, a folder or a hub id, found {type(model).__name__}."
        raise TypeError(msg)
    return model


def read_tokens(adata: AnnData, model: Stofm) -> RankedTokens:
    """Read the tokens that :func:`stofm.pp.tokenize` wrote, checked against the model.

    As many as the model keeps of a cell, with values if it reads them.

    Raises
    ------
    KeyError
        There are no tokens, or no values although the model reads them.
    ValueError
        The tokens belong to another vocabulary, are of other counts, or were changed.
    """
    if Obsm.TOKENS not in adata.obsm:
        msg = f"There is no obsm[{Obsm.TOKENS!r}]: run st.pp.tokenize(adata, model) first."
        raise KeyError(msg)
    record = read_record(adata, Obsm.TOKENS) or {}
    if record.get("vocabulary") != model.vocabulary.fingerprint:
        msg = (
            f"The tokens were made with the vocabulary {record.get('vocabulary', '(unknown)')}, "
            f"and model {model.name!r} has {model.vocabulary.fingerprint}: run "
            "st.pp.tokenize(adata, model) again."
        )
        raise ValueError(msg)
    if found := changed_counts(adata, model.vocabulary):
        msg = f"The tokens are of other counts: {found} Run st.pp.tokenize(adata, model) again."
        raise ValueError(msg)
    values = model.config.cell_encoder.reads_values
    if values and not values_are_stored(adata):
        msg = (
            f"Model {model.name!r} reads the values of tokens, and there is no "
            f"obsm[{Obsm.TOKEN_VALUES!r}] that was written with obsm[{Obsm.TOKENS!r}]: run "
            "st.pp.tokenize(adata, model) again."
        )
        raise KeyError(msg)
    ranked = read_ranked(adata, model.vocabulary.n_tokens, values=values)
    return ranked.head(model.config.max_tokens)


def checked_budget(name: str, value: int | Literal["auto"]) -> int | None:
    """Return a batch's size, None for ``"auto"``.

    Raises
    ------
    ValueError
        The value is neither ``"auto"`` nor at least 1.
    """
    if value == "auto":
        return None
    if value < 1:
        msg = f"`{name}` must be at least 1, or left out, found {value}."
        raise ValueError(msg)
    return value


@dataclass(frozen=True)
class CellEmbedding:
    """Cell embeddings, with their record if they are to be written."""

    features: NDArray[np.float32]
    record: dict[str, str] | None


def cell_record(model: Stofm, ranked: RankedTokens, dtype: torch.dtype) -> dict[str, str]:
    """Return all that cell embeddings depend on."""
    return {
        "model": model.name,
        "cell_encoder": model.cell_encoder_fingerprint,
        "vocabulary": model.vocabulary.fingerprint,
        "tokens": ranked.digest,
        "dtype": str(dtype).removeprefix("torch."),
        "n_cells": str(ranked.n_cells),
    }


def write_cell_embedding(adata: AnnData, result: CellEmbedding) -> None:
    """Write cell embeddings and their record, if they are new."""
    if result.record is not None:
        adata.obsm[Obsm.X_CELL] = result.features
        dtype = result.record["dtype"]
        rest = {name: v for name, v in result.record.items() if v and name != "dtype"}
        write_record(adata, Obsm.X_CELL, {"dtype": dtype}, **rest)


def stored_cell_embedding(
    adata: AnnData, expected: dict[str, str], d_cell: int
) -> NDArray[np.float32] | None:
    """Return the stored cell embeddings if their record is the expected one, else None."""
    record = read_record(adata, Obsm.X_CELL)
    if record is None or Obsm.X_CELL not in adata.obsm or is_outdated(record):
        return None
    found = {
        "n_cells": expected["n_cells"],
        **record,
        "dtype": record.get("params", {}).get("dtype"),
    }
    stored = np.asarray(adata.obsm[Obsm.X_CELL])
    # A model's name does not change its numbers.
    fits = all(found.get(name) == value for name, value in expected.items() if name != "model")
    if not fits or stored.shape != (adata.n_obs, d_cell):
        return None
    return stored.astype(np.float32, copy=False)
