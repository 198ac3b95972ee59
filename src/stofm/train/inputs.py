"""What the objectives of pretraining take: cells and sub-slices as tensors, with their targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from stofm.nn import SubSliceBatch
from stofm.train.gene_masking import drop_genes, mask_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from numpy.random import Generator
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.genes import GeneVocabulary
    from stofm.nn import TokenBatch
    from stofm.train.cell_masking import MaskedSubSlice, VisibleCells
    from stofm.train.gene_masking import TokenMasking


@dataclass(frozen=True)
class MaskedGenes:
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

    def to(self, device: torch.device | str) -> MaskedGenes:
        """Return a copy on `device`."""
        return MaskedGenes(
            tokens=self.tokens.to(device),
            places=self.places.to(device),
            labels=self.labels.to(device),
            measured=self.measured.to(device),
        )

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
class CellBatch:
    """Input of :class:`~stofm.train.objectives.CellEncoderObjective`.

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

    def to(self, device: torch.device | str) -> CellBatch:
        """Return a copy on `device`."""
        first = self.views[0].to(device)
        second = first if self.views[1] is self.views[0] else self.views[1].to(device)
        return CellBatch(genes=self.genes.to(device), views=(first, second))

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
        views = (cells, cells)
        if gene_dropout > 0:
            views = (
                drop_genes(cells, gene_dropout, pad_token=vocabulary.pad, rngs=rngs),
                drop_genes(cells, gene_dropout, pad_token=vocabulary.pad, rngs=rngs),
            )
        return cls(genes=genes, views=views)


@dataclass(frozen=True)
class VisibleCellBatch:
    """Cells of a batch that are not hidden, and what is to be told from them.

    Attributes
    ----------
    places
        (n_visible,) nodes, counted through the padded sub-slices.
    features
        (n_visible, d_cell) their own.
    surroundings
        (n_visible, d_cell) mean features of the cells around them.
    """

    places: Int[Tensor, " visible"]
    features: Float[Tensor, "visible d_cell"]
    surroundings: Float[Tensor, "visible d_cell"]

    def to(self, device: torch.device | str) -> VisibleCellBatch:
        """Return a copy on `device`."""
        return VisibleCellBatch(
            places=self.places.to(device),
            features=self.features.to(device),
            surroundings=self.surroundings.to(device),
        )

    @classmethod
    def from_parts(cls, parts: Sequence[VisibleCells], n_nodes: int) -> VisibleCellBatch:
        """Join the cells of sub-slices that were padded to `n_nodes` nodes."""
        return cls(
            places=_places([part.nodes for part in parts], n_nodes),
            features=_joined([part.features for part in parts]),
            surroundings=_joined([part.surroundings for part in parts]),
        )


@dataclass(frozen=True)
class MaskedSubSliceBatch:
    """Input of :class:`~stofm.train.spatial_objective.SpatialObjective`.

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

    def to(self, device: torch.device | str) -> MaskedSubSliceBatch:
        """Return a copy on `device`."""
        return MaskedSubSliceBatch(
            subslices=self.subslices.to(device),
            hidden_places=self.hidden_places.to(device),
            target_places=self.target_places.to(device),
            target_features=self.target_features.to(device),
            pair_batch=self.pair_batch.to(device),
            pair_rows=self.pair_rows.to(device),
            pair_columns=self.pair_columns.to(device),
            pair_distances=self.pair_distances.to(device),
            visible=None if self.visible is None else self.visible.to(device),
        )

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
class JointBatch:
    """Input of :class:`~stofm.train.objectives.JointObjective`.

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

    def to(self, device: torch.device | str) -> JointBatch:
        """Return a copy on `device`."""
        return JointBatch(
            masked=self.masked.to(device),
            cells=tuple(group.to(device) for group in self.cells),
            places=self.places.to(device),
            genes=tuple(group.to(device) for group in self.genes),
        )


def _places(nodes: Sequence[NDArray[np.int64]], n_nodes: int) -> Tensor:
    """Nodes of each sub-slice, counted through the padded sub-slices."""
    return _joined([b * n_nodes + own for b, own in enumerate(nodes)])


def _joined(parts: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
