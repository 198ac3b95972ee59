"""Effect of single cells on cells near them, and which cells attend to which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.spatial import cKDTree

from stofm._logging import progress
from stofm.nn import SubSliceBatch
from stofm.nn.inference import evaluating
from stofm.perturb.edit import Detached, Edit
from stofm.perturb.reading import class_probabilities
from stofm.spatial import NodeType, build_subslice
from stofm.spatial.plane import canonical_order, spacing
from stofm.train.samples import cut_slice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from stofm.heads.annotation import AnnotationHead
    from stofm.nn import Stofm
    from stofm.perturb.engine import UneditedSlice
    from stofm.perturb.tissue import Tissue

    Change = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.floating]]

#: Reach by default, in median distances to the sixth nearest cell.
_REACH: Final = 3.0


class PairEffects(NamedTuple):
    """Effects of single senders on the receivers near them; arrays (n_pairs,).

    `distances` are in the unit of the coordinates.
    """

    senders: NDArray[np.int64]
    receivers: NDArray[np.int64]
    distances: NDArray[np.float64]
    effects: NDArray[np.float32]

    @classmethod
    def joined(cls, parts: list[PairEffects]) -> PairEffects:
        """Pairs of several slices, one after another."""
        return cls(*(np.concatenate(one) for one in zip(*parts, strict=True)))


def effects_between(
    tissue: Tissue,
    kinds: NDArray[np.int64],
    head: AnnotationHead | None,
    *,
    reach: float | None,
    n_max: int,
) -> tuple[PairEffects, float]:
    """Mask some senders of each kind, and see how the cells around them change.

    `kinds` (n_cells,) are codes; cells with -1 are neither senders nor receivers. The other
    arguments and errors are those of :func:`stofm.tl.influence`; without a `reach`, the largest of
    all slices is used. Returns pairs, by rows of the tissue, and the reach.
    """
    if reach is not None and not 0 < reach < np.inf:
        raise ValueError(f"reach must be above 0 and finite, found {reach!r}.")
    change, slices = _change(head, tissue.model), tissue.slices
    if reach is None:
        reach = _REACH * max(spacing(tissue.coordinates[rows]) for rows in slices)
    # By position, so that the order of the rows does not matter.
    xy = tissue.coordinates
    placed = [rows[canonical_order(xy[rows], np.empty((len(rows), 0)))] for rows in slices]
    order = np.random.default_rng(tissue.seed).permutation(np.concatenate(placed))
    order = order[kinds[order] >= 0]
    order = order[np.argsort(kinds[order], kind="stable")]
    rank = np.arange(len(order)) - np.searchsorted(kinds[order], kinds[order])
    is_sender = np.zeros(tissue.n_cells, dtype=bool)
    is_sender[order[rank < n_max]] = True
    parts = []
    shown = progress(slices, "mask senders", "slice", show=tissue.show_progress_bar)
    for number, rows in enumerate(shown):
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


def _change(head: AnnotationHead | None, model: Stofm) -> Change:
    """Change of each receiver, (n,), from embeddings (n, d_embedding) before and after."""
    if head is not None:
        probabilities = class_probabilities(head, model)
        # Total variation.
        return lambda before, after: (
            np.abs(probabilities(after) - probabilities(before)).sum(axis=1) / 2
        )
    # Features passed on are a mean over neighbours, which all senders change alike.
    width = model.config.se2_transformer.d_model
    return lambda before, after: np.asarray(
        np.linalg.norm(after[:, -width:] - before[:, -width:], axis=1)
    )


def pair_effects(
    whole: UneditedSlice,
    senders: NDArray[np.int64],
    *,
    reach: float,
    change: Change,
) -> PairEffects:
    """Mask senders one at a time for the cells around them, and see how much these change.

    Senders that lie more than twice the reach apart are masked in one run, since no cell is within
    reach of two of them; the effect of the others through cells in between is small. `senders` are
    rows of the slice. Returns all pairs of a sender and another cell of its sub-slice within reach.
    """
    groups = _apart(whole.coordinates[senders], 2 * reach)
    is_sender = np.zeros((groups.max(initial=-1) + 1, whole.n_cells), dtype=bool)
    is_sender[groups, senders] = True
    edits = [Edit(detached=Detached(senders=one, reach=reach)) for one in is_sender]
    nobody = np.empty(0, dtype=np.int64)
    parts = [PairEffects(nobody, nobody, np.empty(0), np.empty(0, dtype=np.float32))]
    for found in whole.embed(edits):
        xy = whole.coordinates[found.rows]
        masked = np.flatnonzero(is_sender[found.edit, found.rows])
        distances, nearest = cKDTree(xy[masked]).query(xy, distance_upper_bound=reach * (1 + 1e-9))
        is_near = np.isfinite(distances)
        is_near[masked] = False
        values = change(found.before[is_near], found.after[is_near]).astype(np.float32)
        rows = found.rows[masked][nearest[is_near]]
        parts.append(PairEffects(rows, found.rows[is_near], distances[is_near], values))
    return PairEffects.joined(parts)


def _apart(xy: NDArray[np.float64], distance: float) -> NDArray[np.int64]:
    """Number groups of points so that those of a group lie at least so far apart, (n,).

    A group has one point in every second tile along both axes.
    """
    tile = np.floor(xy / distance).astype(np.int64)
    which = np.unique(tile, axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], which[order])
    rank = np.empty(len(xy), dtype=np.int64)
    rank[order] = np.arange(len(xy)) - starts
    parity = tile[:, 0] % 2 * 2 + tile[:, 1] % 2
    groups: NDArray[np.int64] = np.unique(rank * 4 + parity, return_inverse=True)[1].ravel()
    return groups


class SliceAttention(NamedTuple):
    """Attention of the cells of one slice.

    `weights` (n, n), float32, are from receiver (row) to sender (column); `to_virtual` (n,) is
    each receiver's share on virtual cells.
    """

    weights: sparse.csr_array
    to_virtual: NDArray[np.float32]


def attend(whole: UneditedSlice, *, top: int, n_shifted: int = 0) -> SliceAttention:
    """Attention of the last layer, averaged over heads, in shares without the slice token.

    Kept are the `top` senders of a receiver with most attention; no cell is its own sender. With
    `n_shifted` further partitions, cut after the plane is rotated by equal angles up to half a turn, a
    weight is the mean over the partitions in which both cells share a sub-slice; a sender beyond the
    `top` of one of them counts as 0 there. The matrix of one sub-slice is in memory at a time.
    """
    angles = np.pi * np.arange(1, n_shifted + 1) / (n_shifted + 1)
    xy, rules = whole.layout.coordinates, whole.rules
    turned = [cut_slice(xy, rules, angle=angle) for angle in angles.tolist()]
    partitions = [whole.parts, *turned]
    found = [_attend_within(whole, parts, top) for parts in partitions]
    if not n_shifted:
        return found[0]
    total = found[0].weights
    for one in found[1:]:
        total = total + one.weights
    total = total.tocoo()
    together = np.zeros(total.nnz, dtype=np.float32)
    for parts in partitions:
        number = np.empty(whole.n_cells, dtype=np.int64)
        for k, cells in enumerate(parts):
            number[cells] = k
        together += number[total.row] == number[total.col]
    order = np.lexsort((total.col, -total.data / together, total.row))
    starts = np.searchsorted(total.row[order], np.arange(whole.n_cells))
    kept = order[np.arange(total.nnz) - starts[total.row[order]] < top]
    where = (total.row[kept], total.col[kept])
    weights = sparse.csr_array((total.data[kept] / together[kept], where), shape=total.shape)
    return SliceAttention(weights, np.mean([one.to_virtual for one in found], axis=0))


def _attend_within(
    whole: UneditedSlice, parts: Sequence[NDArray[np.int64]], top: int
) -> SliceAttention:
    """Attention within the sub-slices of one partition."""
    transformer, found = whole.transformer, []
    to_virtual = np.empty(whole.n_cells, dtype=np.float32)
    with torch.inference_mode(), evaluating(transformer):
        for cells in parts:
            nodes = build_subslice(whole.layout, whole.features, cells, whole.rules)
            batch = SubSliceBatch.from_subslices([nodes]).to(whole.device)
            shares = transformer(batch).pairs.attention()[0].cpu().numpy()[-len(cells) :]
            shares = shares / (1.0 - shares[:, nodes.node_type == NodeType.SLICE])
            to_virtual[cells] = shares[:, nodes.node_type == NodeType.VIRTUAL].sum(axis=1)
            own = shares[:, -len(cells) :]
            np.fill_diagonal(own, -1.0)
            n_kept = min(top, len(cells) - 1)
            columns = np.argsort(-own, axis=1, kind="stable")[:, :n_kept]
            rows = np.repeat(np.arange(len(cells)), n_kept)
            values = own[rows, columns.ravel()]
            found.append((values, cells[rows], cells[columns.ravel()]))
    values, rows, columns = (np.concatenate(one) for one in zip(*found, strict=True))
    shape = (whole.n_cells, whole.n_cells)
    return SliceAttention(sparse.csr_array((values, (rows, columns)), shape=shape), to_virtual)
