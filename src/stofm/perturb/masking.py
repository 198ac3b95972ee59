"""What single cells of a table do to others: to their embeddings, or to their classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._keys import Obsm
from stofm._logging import progress
from stofm.heads.embeddings import describe_origin, origin_by, same_origin
from stofm.heads.network import apply_head
from stofm.heads.trust import calibrated_probabilities, log_scores
from stofm.perturb.influence import PairEffects, pair_effects
from stofm.spatial.plane import canonical_order, spacing

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from stofm.heads.annotation import AnnotationHead
    from stofm.nn import Stofm
    from stofm.perturb.tissue import Tissue

    Change = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.floating]]

#: Reach by default, in median distances to the sixth nearest cell.
_REACH: Final = 3.0


def effects_between(
    tissue: Tissue,
    kinds: NDArray[np.int64],
    head: AnnotationHead | None,
    *,
    reach: float | None,
    n_max: int,
    show_progress_bar: bool,
) -> tuple[PairEffects, float]:
    """Mask some senders of each kind, and see how the cells around them change.

    Parameters
    ----------
    tissue
        The slices.
    kinds
        (n_cells,) codes; cells with -1 are neither senders nor receivers.
    head
        Whose class probabilities change; None for embeddings.
    reach
        In the unit of the coordinates; None: three times the median distance to the sixth nearest
        cell, of the slice with the largest.
    n_max
        Most senders of a kind over all slices, drawn at random.

    Returns
    -------
    The pairs, by rows of the tissue, and the reach.

    Raises
    ------
    ValueError
        The reach is not usable or too short, or the head reads something else than the embedding
        or belongs to another model.
    """
    if reach is not None and not 0 < reach < np.inf:
        raise ValueError(f"reach must be above 0 and finite, found {reach!r}.")
    change = _shift_of(tissue.model) if head is None else _change_of_classes(head, tissue.model)
    slices = tissue.slices
    if reach is None:
        reach = _REACH * max(spacing(tissue.coordinates[rows]) for rows in slices)
    # By place, so that the order of the rows does not matter.
    xy = tissue.coordinates
    placed = [rows[canonical_order(xy[rows], np.empty((len(rows), 0)))] for rows in slices]
    order = np.random.default_rng(tissue.seed).permutation(np.concatenate(placed))
    order = order[kinds[order] >= 0]
    order = order[np.argsort(kinds[order], kind="stable")]
    rank = np.arange(len(order)) - np.searchsorted(kinds[order], kinds[order])
    is_sender = np.zeros(tissue.n_cells, dtype=bool)
    is_sender[order[rank < n_max]] = True
    parts = []
    words = {"description": "mask senders", "unit": "slice"}
    numbered = progress(enumerate(slices), total=len(slices), show=show_progress_bar, **words)
    for number, rows in numbered:
        own = np.flatnonzero(is_sender[rows])
        found = pair_effects(tissue.whole(number), own, reach=reach, change=change)
        is_known = kinds[rows[found.receivers]] >= 0
        parts.append(
            PairEffects(
                senders=rows[found.senders[is_known]],
                receivers=rows[found.receivers[is_known]],
                distances=found.distances[is_known],
                effects=found.effects[is_known],
            )
        )
    pairs = PairEffects.joined(parts)
    if not len(pairs.effects):
        raise ValueError(f"No two cells with a type lie within reach={reach:g}; raise `reach`.")
    return pairs, reach


def _shift_of(model: Stofm) -> Change:
    """Length of the change of the last hidden states."""
    width = model.config.se2_transformer.d_model

    def change(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.floating]:
        # What is passed on is a mean over neighbours, which all senders change alike.
        return np.asarray(np.linalg.norm(after[:, -width:] - before[:, -width:], axis=1))

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
            f"The head was fitted to embeddings from {describe_origin(made)}, and `model` is "
            f"{describe_origin(own)}; pass that model."
        )

    def probabilities(features: NDArray[np.float32]) -> NDArray[np.floating]:
        weighted = zip(head.networks, head.weights, strict=True)
        votes = [weight * apply_head(one, features, "classes") for one, weight in weighted]
        return calibrated_probabilities(log_scores(np.sum(votes, axis=0)), head.temperature)

    def change(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.floating]:
        return np.asarray(np.abs(probabilities(after) - probabilities(before)).sum(axis=1) / 2)

    return change
