"""What the objectives of pretraining take: cells and sub-slices as tensors, with their targets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from stofm.nn import SubSliceBatch, TokenBatch
from stofm.train.masking import drop_genes, mask_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from numpy.random import Generator
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.genes import GeneVocabulary
    from stofm.train.config import TokenMasking
    from stofm.train.masking import MaskedSubSlice, VisibleCells


class _Batch:
    """A dataclass of tensors, of other batches, and of tuples of these."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on `device`."""
        own: Any = self
        return type(self)(**{f.name: _moved(getattr(self, f.name), device) for f in fields(own)})


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, tuple):
        # What stands in it twice is moved once.
        moved = {id(one): one for one in value}
        moved = {key: one.to(device) for key, one in moved.items()}
        return tuple(moved[id(one)] for one in value)
    return None if value is None else value.to(device)


@dataclass(frozen=True)
class MaskedGenes(_Batch):
    """Cells with hidden genes, and which genes these are.

    Attributes
    ----------
    tokens
        What the cell encoder sees.
    places
        (n_targets,) positions to recover, counted through the lists, padding included.
    labels
        (n_targets,) their genes' tokens.
    measured
        (n_genes,) tokens of all genes that occur in these cells, each once.
    """

    tokens: TokenBatch
    places: Int[Tensor, " targets"]
    labels: Int[Tensor, " targets"]
    measured: Int[Tensor, " genes"]

    @classmethod
    def build(
        cls,
        cells: TokenBatch,
        rngs: Sequence[Generator],
        *,
        masking: TokenMasking,
        vocabulary: GeneVocabulary,
    ) -> MaskedGenes:
        """Hide genes of cells.

        Parameters
        ----------
        cells
            Their token lists, on the CPU.
        rngs
            One generator per cell.
        masking
            How much to hide.
        vocabulary
            Gives ``<mask>`` and the genes.
        """
        masked, is_target = mask_tokens(
            cells, masking, mask_token=vocabulary.mask, gene_tokens=vocabulary.tokens, rngs=rngs
        )
        return cls(
            tokens=masked,
            places=is_target.flatten().nonzero()[:, 0],
            labels=cells.tokens[is_target],
            measured=torch.unique(cells.tokens[:, 1:][cells.is_real[:, 1:]]),
        )


@dataclass(frozen=True)
class CellBatch(_Batch):
    """Input of :class:`~stofm.train.CellEncoderObjective`.

    Attributes
    ----------
    genes
        The cells with hidden genes.
    views
        The cells as contrastive learning sees them, twice; one object if they are the same.
    """

    genes: MaskedGenes
    views: tuple[TokenBatch, TokenBatch]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.views[0].tokens)

    @classmethod
    def build(
        cls,
        cells: TokenBatch,
        rngs: Sequence[Generator],
        *,
        masking: TokenMasking,
        gene_dropout: float,
        vocabulary: GeneVocabulary,
    ) -> CellBatch:
        """Hide genes of cells, and make the two views of them.

        Parameters
        ----------
        cells
            Their token lists, on the CPU.
        rngs
            One generator per cell.
        masking
            How much to hide of what is to be recovered.
        gene_dropout
            Share of a cell's genes that each view leaves out; drawn for each view.
        vocabulary
            Gives the special tokens and the genes.
        """
        genes = MaskedGenes.build(cells, rngs, masking=masking, vocabulary=vocabulary)
        if not gene_dropout:
            return cls(genes=genes, views=(cells, cells))
        pad = vocabulary.pad
        first = drop_genes(cells, gene_dropout, pad_token=pad, rngs=rngs)
        second = drop_genes(cells, gene_dropout, pad_token=pad, rngs=rngs)
        return cls(genes=genes, views=(first, second))


@dataclass(frozen=True)
class VisibleCellBatch(_Batch):
    """Cells of a batch that are not hidden, and what is to be told from them."""

    places: Int[Tensor, " visible"]
    features: Float[Tensor, "visible d_cell"]
    surroundings: Float[Tensor, "visible d_cell"]

    @classmethod
    def from_parts(cls, parts: Sequence[VisibleCells], n_nodes: int) -> VisibleCellBatch:
        """Join the cells of sub-slices that were padded to `n_nodes` nodes."""
        nodes, features, surroundings = zip(*parts, strict=True)
        return cls(_places(nodes, n_nodes), _joined(features), _joined(surroundings))


@dataclass(frozen=True)
class MaskedSubSliceBatch(_Batch):
    """Input of :class:`~stofm.train.SpatialObjective`.

    A node's place is its number counted through the padded sub-slices.

    Attributes
    ----------
    subslices
        What the SE(2) Transformer sees, but for the learned vector in place of hidden features.
    hidden_places
        (n_hidden,) nodes whose features are hidden.
    target_places, target_features
        (n_targets,) nodes whose features are to be recovered, and (n_targets, d_cell) these.
    pair_batch, pair_rows, pair_columns
        (n_pairs,) the sub-slice and the two nodes in it of pairs whose distance is to be recovered.
    pair_distances
        (n_pairs,) these distances, model units.
    visible
        What is asked of the cells that are not hidden; None for nothing.
    """

    subslices: SubSliceBatch
    hidden_places: Int[Tensor, " hidden"]
    target_places: Int[Tensor, " targets"]
    target_features: Float[Tensor, "targets d_cell"]
    pair_batch: Int[Tensor, " pairs"]
    pair_rows: Int[Tensor, " pairs"]
    pair_columns: Int[Tensor, " pairs"]
    pair_distances: Float[Tensor, " pairs"]
    visible: VisibleCellBatch | None = None

    @classmethod
    def from_masked(
        cls, masked: Sequence[MaskedSubSlice], *, node_multiple: int = 1
    ) -> MaskedSubSliceBatch:
        """Pad masked sub-slices into one batch.

        Parameters
        ----------
        masked
            At least one.
        node_multiple
            As in :meth:`stofm.nn.SubSliceBatch.from_subslices`.
        """
        subslices = SubSliceBatch.from_subslices(
            [part.subslice for part in masked], node_multiple=node_multiple
        )
        n_nodes = subslices.pairs.n_nodes
        n_pairs = [len(part.pair_rows) for part in masked]
        visible = [part.visible for part in masked if part.visible is not None]
        return cls(
            subslices=subslices,
            hidden_places=_places([part.hidden_nodes for part in masked], n_nodes),
            target_places=_places([part.target_nodes for part in masked], n_nodes),
            target_features=_joined([part.target_features for part in masked]),
            pair_batch=torch.from_numpy(np.repeat(np.arange(len(masked)), n_pairs)),
            pair_rows=_joined([part.pair_rows for part in masked]),
            pair_columns=_joined([part.pair_columns for part in masked]),
            pair_distances=_joined([part.pair_distances for part in masked]),
            visible=VisibleCellBatch.from_parts(visible, n_nodes) if visible else None,
        )


@dataclass(frozen=True)
class JointBatch(_Batch):
    """Input of :class:`~stofm.train.JointObjective`.

    Attributes
    ----------
    masked
        The sub-slices, with kept embeddings at all cells.
    cells
        Token lists of the sampled cells, in groups of like length.
    places
        (sampled,) where these cells' fresh embeddings go, group after group; places as in
        :class:`MaskedSubSliceBatch`.
    genes
        The groups with hidden genes; empty if masked genes are not trained along.
    """

    masked: MaskedSubSliceBatch
    cells: tuple[TokenBatch, ...]
    places: Int[Tensor, " sampled"]
    genes: tuple[MaskedGenes, ...] = ()


def _places(nodes: Sequence[NDArray[np.int64]], n_nodes: int) -> Tensor:
    """Nodes of each sub-slice, counted through the padded sub-slices."""
    return _joined([b * n_nodes + own for b, own in enumerate(nodes)])


def _joined(parts: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
