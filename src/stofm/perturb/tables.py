"""The slices of a table as a model sees them, and what single cells do to others there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._edge.gene_mapping import find_columns
from stofm._edge.slices import read_places
from stofm._edge.tokens import compute_tokens, token_params
from stofm._keys import Obsm
from stofm._logging import progress
from stofm.heads.annotation import AnnotationHead, calibrated_probabilities, log_scores
from stofm.heads.embeddings import describe_origin, origin_by, same_origin
from stofm.heads.head import require_head
from stofm.heads.network import apply_head
from stofm.nn import choose_device
from stofm.nn.model import load_model
from stofm.perturb.engine import UneditedSlice
from stofm.perturb.influence import PairEffects, pair_effects
from stofm.perturb.token_lists import take
from stofm.spatial.plane import spacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.nn import Stofm

    Change = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.floating]]

#: Reach by default, in median distances to the sixth nearest cell.
_REACH = 3.0


def unedited_slices(
    adata: AnnData,
    model: Stofm,
    *,
    layer: str | None,
    spatial_key: str,
    library_key: str | None,
    seed: int,
    device: str | torch.device,
    show_progress_bar: bool,
) -> Iterator[tuple[NDArray[np.int64], UneditedSlice]]:
    """Give the rows of each slice, and the slice; options are those of :func:`stofm.tl.embed`."""
    model.warn_if_untrained()
    places = read_places(adata, spatial_key=spatial_key, library_key=library_key)
    columns = find_columns(adata, model.vocabulary)
    params = token_params(model, layer=layer)
    ranked = compute_tokens(adata, columns, params, show_progress_bar=show_progress_bar)
    options: dict[str, Any] = {"seed": seed, "device": choose_device(device)}
    slices = places.slices.rows
    words = {"description": "slices", "unit": "slice"}
    for rows in progress(slices, total=len(slices), **words, show=show_progress_bar):
        xy = places.coordinates[rows]
        yield rows, UneditedSlice.of(model, take(ranked, rows), xy, **options)


def effects_in_table(
    adata: AnnData,
    kinds: NDArray[np.int64],
    model: Stofm | str | Path | None,
    head: AnnotationHead | None,
    *,
    reach: float | None,
    n_max: int,
    seed: int,
    **options: Any,
) -> tuple[PairEffects, Stofm, float]:
    """Mask some senders of each kind, and see what the cells around them do.

    Parameters
    ----------
    adata
        The table.
    kinds
        (n_obs,) codes; cells with -1 are neither senders nor receivers.
    model, head
        Whose embeddings change, or whose class probabilities.
    reach
        In the unit of the coordinates; None: three times the median distance to the sixth nearest
        cell.
    n_max
        Most senders of a kind over all slices, drawn at random.
    seed, **options
        Of :func:`unedited_slices`.

    Returns
    -------
    The pairs, by rows of the table; the model, and the reach.
    """
    if reach is not None and not 0 < reach < np.inf:
        raise ValueError(f"reach must be above 0 and finite, found {reach!r}.")
    require_head(head, AnnotationHead)
    loaded = load_model(head.model if model is None and head is not None else model)
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(kinds >= 0))
    order = order[np.argsort(kinds[order], kind="stable")]
    rank = np.arange(len(order)) - np.searchsorted(kinds[order], kinds[order])
    is_sender = np.zeros(adata.n_obs, dtype=bool)
    is_sender[order[rank < n_max]] = True
    parts = []
    for rows, whole in unedited_slices(adata, loaded, seed=seed, **options):
        if reach is None:
            reach = _REACH * spacing(whole.coordinates)
        change = _shift_of(loaded) if head is None else _change_of_classes(head, loaded)
        own = np.flatnonzero(is_sender[rows])
        found = pair_effects(whole, own, reach=reach, change=change)
        is_known = kinds[rows[found.receivers]] >= 0
        found = PairEffects(*(one[is_known] for one in found))
        parts.append(found._replace(senders=rows[found.senders], receivers=rows[found.receivers]))
    assert reach is not None
    return PairEffects.joined(parts), loaded, reach


def _shift_of(model: Stofm) -> Change:
    """Length of the change of the last hidden states."""
    width = model.config.se2_transformer.d_model

    def change(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.floating]:
        # What is passed on is a mean over neighbours, which all senders change alike.
        return np.linalg.norm(after[:, -width:] - before[:, -width:], axis=1)

    return change


def _change_of_classes(head: AnnotationHead, model: Stofm) -> Change:
    """Total variation between class probabilities."""
    if head.use_rep != (Obsm.X,) or set(head.reads) != {"embedding"}:
        raise ValueError(
            f"The head reads obsm{list(head.use_rep)} and {sorted(set(head.reads))}; of masked "
            f"neighbours the embedding alone tells. Fit one with use_rep={Obsm.X!r} and "
            "options=st.tl.HeadOptions(n_neighbors=0, n_components=0)."
        )
    made, own = head.origin[Obsm.X], origin_by(model)[Obsm.X]
    if not same_origin(made, own):
        raise ValueError(
            f"The head was fitted to embeddings by {describe_origin(made)}, and `model` is "
            f"{describe_origin(own)}; pass that model."
        )

    def probabilities(features: NDArray[np.float32]) -> NDArray[np.floating]:
        weighted = zip(head.networks, head.weights, strict=True)
        mean = sum(weight * apply_head(one, features, "classes") for one, weight in weighted)
        return calibrated_probabilities(log_scores(mean), head.temperature)

    def change(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.floating]:
        return np.abs(probabilities(after) - probabilities(before)).sum(axis=1) / 2

    return change
