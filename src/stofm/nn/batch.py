"""Sub-slices and token lists as padded tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from stofm.spatial import NodeType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.genes import RankedTokens
    from stofm.spatial import SubSlice


class Tensors:
    """A dataclass whose fields are tensors, other such dataclasses, or tuples of these."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on `device`; an object that occurs twice is copied once."""
        moved: dict[int, Any] = {}

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(move, value))
            if hasattr(value, "to") and id(value) not in moved:
                moved[id(value)] = value.to(device)
            return moved.get(id(value), value)

        own = {one.name: move(getattr(self, one.name)) for one in fields(self)}  # type: ignore[arg-type]
        return type(self)(**own)


@dataclass(frozen=True)
class PairIndex(Tensors):
    """Positions of a batch's listed pairs in its dense (nodes, nodes) matrices.

    `distances` are in model units; `forward` and `mirrored` are flat positions of (i, j) and (j, i)
    in the sub-slice's own matrix. For each sub-slice, `ranges` holds its first pair and the one
    after its last, and `n_real` its number of nodes, which are padded to `n_nodes`.
    """

    distances: Float[Tensor, " pairs"]
    forward: Int[Tensor, " pairs"]
    mirrored: Int[Tensor, " pairs"]
    ranges: tuple[tuple[int, int], ...]
    n_real: tuple[int, ...]
    n_nodes: int

    @property
    def n_batch(self) -> int:
        """Number of sub-slices."""
        return len(self.n_real)


@dataclass(frozen=True)
class SubSliceBatch(Tensors):
    """Sub-slices padded on the right to the same number of nodes.

    Attributes
    ----------
    features
        Cell embeddings of the nodes; 0 for the slice token and for padding.
    node_type
        Values of :class:`~stofm.spatial.NodeType`.
    cell_index
        Row of the cell in its slice; -1 for nodes that are not cells.
    pairs
        The distances.
    """

    features: Float[Tensor, "batch nodes d_cell"]
    node_type: Int[Tensor, "batch nodes"]
    cell_index: Int[Tensor, "batch nodes"]
    pairs: PairIndex

    @property
    def is_real(self) -> Bool[Tensor, "batch nodes"]:
        """Which nodes are not padding."""
        return self.node_type != NodeType.PADDING

    @classmethod
    def from_subslices(
        cls, subslices: Sequence[SubSlice], *, node_multiple: int = 1
    ) -> SubSliceBatch:
        """Pad sub-slices into one batch.

        Parameters
        ----------
        subslices
            At least one.
        node_multiple
            The padded number of nodes is a multiple of this (8 suits CUDA's attention kernels).
        """
        n_real = tuple(s.n_nodes for s in subslices)
        n_nodes = -(-max(n_real) // node_multiple) * node_multiple
        shape = (len(subslices), n_nodes)
        features = np.zeros((*shape, subslices[0].features.shape[1]), dtype=np.float32)
        node_type = np.full(shape, NodeType.PADDING, dtype=np.int64)
        cell_index = np.full(shape, -1, dtype=np.int64)
        for b, subslice in enumerate(subslices):
            features[b, : n_real[b]] = subslice.features
            node_type[b, : n_real[b]] = subslice.node_type
            cell_index[b, : n_real[b]] = subslice.cell_index
        pairs = [one.pairs for one in subslices]
        rows = np.concatenate([one.rows for one in pairs]).astype(np.int64)
        columns = np.concatenate([one.columns for one in pairs]).astype(np.int64)
        distances = np.concatenate([one.distances for one in pairs]).astype(np.float32)
        stops = np.cumsum([len(one.rows) for one in pairs]).tolist()
        return cls(
            features=torch.from_numpy(features),
            node_type=torch.from_numpy(node_type),
            cell_index=torch.from_numpy(cell_index),
            pairs=PairIndex(
                distances=torch.from_numpy(distances),
                forward=torch.from_numpy(rows * n_nodes + columns),
                mirrored=torch.from_numpy(columns * n_nodes + rows),
                ranges=tuple(zip([0, *stops[:-1]], stops, strict=True)),
                n_real=n_real,
                n_nodes=n_nodes,
            ),
        )


@dataclass(frozen=True)
class GeneBag(Tensors):
    """All genes of some cells with their values, cell after cell, for sums over them.

    Attributes
    ----------
    tokens
        Token ids in order of rank, including genes beyond the padded length of the batch.
    offsets
        Where each cell starts.
    values
        Value of each gene (:class:`~stofm.genes.RankedTokens`).
    """

    tokens: Int[Tensor, " genes"]
    offsets: Int[Tensor, " cells"]
    values: Float[Tensor, " genes"]

    @classmethod
    def from_ranked(cls, ranked: RankedTokens, cells: NDArray[np.integer]) -> GeneBag:
        """Gather all genes of some cells.

        Raises
        ------
        ValueError
            The tokens have no values.
        """
        if ranked.values is None:
            raise ValueError(
                "The tokens have no values; rank them with rank_genes(..., values=True)."
            )
        starts = ranked.offsets[cells]
        lengths = ranked.offsets[cells + 1] - starts
        offsets = np.cumsum(lengths) - lengths
        places = np.arange(lengths.sum()) + np.repeat(starts - offsets, lengths)
        return cls(
            tokens=torch.from_numpy(ranked.tokens[places].astype(np.int64)),
            offsets=torch.from_numpy(offsets.astype(np.int64)),
            values=torch.from_numpy(ranked.values[places].astype(np.float32)),
        )


@dataclass(frozen=True)
class TokenBatch(Tensors):
    """Token lists of cells, ``<cls>`` in front, padded on the right.

    Attributes
    ----------
    tokens
        Token ids.
    is_real
        Which positions are not padding.
    values
        Value of the gene at each position, 0 at ``<cls>`` and padding; None if not known.
    """

    tokens: Int[Tensor, "cells length"]
    is_real: Bool[Tensor, "cells length"]
    values: Float[Tensor, "cells length"] | None = None

    @classmethod
    def from_ranked(
        cls,
        ranked: RankedTokens,
        cells: NDArray[np.integer],
        *,
        cls_token: int,
        pad_token: int,
        length: int,
    ) -> TokenBatch:
        """Gather the ranked tokens of some cells, with their values if there are any.

        Parameters
        ----------
        ranked
            Tokens of all cells.
        cells
            Rows to take.
        cls_token, pad_token
            Special tokens.
        length
            Padded length; longer lists are cut to it once ``<cls>`` is in front.
        """
        starts = ranked.offsets[cells]
        n_genes = np.minimum(ranked.offsets[cells + 1] - starts, length - 1)
        position = np.arange(-1, length - 1)
        is_gene = (position >= 0) & (position < n_genes[:, None])
        places = (starts[:, None] + position)[is_gene]
        tokens = np.full(is_gene.shape, pad_token, dtype=np.int64)
        tokens[:, 0] = cls_token
        tokens[is_gene] = ranked.tokens[places]
        is_real = is_gene | (position < 0)
        batch = cls(torch.from_numpy(tokens), torch.from_numpy(is_real))
        if ranked.values is None:
            return batch
        values = np.zeros(tokens.shape, dtype=np.float32)
        values[is_gene] = ranked.values[places]
        return replace(batch, values=torch.from_numpy(values))
