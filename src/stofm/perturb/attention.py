"""Which cells attend to which in the last layer of the SE(2) Transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import sparse

from stofm.nn import SubSliceBatch
from stofm.nn.inference import evaluating
from stofm.spatial import NodeType, build_subslice
from stofm.train.samples import cut_slice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.perturb.engine import UneditedSlice


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
    `n_shifted` further partitions, cut after the plane is turned by equal angles up to a half turn, a
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
