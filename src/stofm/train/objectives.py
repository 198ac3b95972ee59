"""What the stages that train the cell encoder minimise, as modules of the networks and their heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stofm.train.heads import MaskedGeneHead
from stofm.train.losses import (
    ContrastiveConfig,
    LossPart,
    LossWeights,
    MaskedGeneConfig,
    candidate_genes,
    contrastive_loss,
    masked_gene_loss,
    positive,
)
from stofm.train.operations import PER_PRODUCT, products_of_embeddings, products_of_masked_genes
from stofm.train.spatial_objective import replace_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float

    from stofm.nn import CellEncoder, TokenBatch
    from stofm.train.inputs import CellBatch, JointBatch
    from stofm.train.losses import Gather
    from stofm.train.spatial_objective import SpatialObjective


class CellEncoderObjective(nn.Module):
    """Domain adaptation of the cell encoder: masked genes and contrastive learning.

    Without dropout, as in validation, the two views of a cell differ by `gene_dropout` alone; the
    contrastive loss then says how far other cells lie away.

    Parameters
    ----------
    encoder
        The cell encoder; trained in place.
    masked_genes, contrastive
        Options of the two losses.
    weights
        Their weights.

    References
    ----------
    SToFM (arXiv 2507.11588), section A.1: L_DA = L_MGM + L_CL.
    """

    def __init__(
        self,
        encoder: CellEncoder,
        *,
        masked_genes: MaskedGeneConfig | None = None,
        contrastive: ContrastiveConfig | None = None,
        weights: LossWeights | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.gene_head = _gene_head(encoder)
        self.masked_genes = masked_genes or MaskedGeneConfig()
        self.contrastive = contrastive or ContrastiveConfig()
        weights = weights or LossWeights()
        #: Weight of each loss part that :meth:`forward` returns.
        self.weights = positive(
            {"masked_genes": weights.masked_genes, "contrastive": weights.contrastive}
        )

    def forward(self, inputs: CellBatch, gather: Gather | None = None) -> dict[str, LossPart]:
        """Compute the losses of a batch, or of this process's part of one.

        Parameters
        ----------
        inputs
            Cells with hidden genes, and two views of them.
        gather
            Collects rows from all processes; None for one process.
        """
        parts = {}
        if "masked_genes" in self.weights:
            parts["masked_genes"] = masked_gene_loss(
                self.encoder,
                self.gene_head,
                inputs.genes,
                candidates=candidate_genes(
                    self.masked_genes.candidates, inputs.genes.measured, gather
                ),
            )
        if "contrastive" in self.weights:
            d_learned = self.encoder.config.d_learned
            first, second = (self.encoder(view)[:, -d_learned:] for view in inputs.views)
            parts["contrastive"] = contrastive_loss(
                first, second, temperature=self.contrastive.temperature, gather=gather
            )
        return parts

    def count_operations(self, inputs: CellBatch) -> int:
        """Estimate the floating-point operations of a step (:mod:`stofm.train.operations`)."""
        products = 0
        if "masked_genes" in self.weights:
            products += products_of_masked_genes(
                self.encoder, self.gene_head, [inputs.genes], self.masked_genes.candidates
            )
        if "contrastive" in self.weights:
            products += sum(products_of_embeddings(self.encoder, view) for view in inputs.views)
        return PER_PRODUCT * products


class JointObjective(nn.Module):
    """The spatial objective with fresh embeddings of sampled cells, so that it trains both scales.

    The other cells, the virtual cells and the targets keep the embeddings that were computed
    before; a sampled cell that is hidden stays hidden.

    Parameters
    ----------
    encoder
        The cell encoder; trained in place.
    spatial
        The spatial objective.
    masked_genes
        Train masked genes of the sampled cells along, with these options; None: do not.
    weights
        Weight of the masked genes.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4.
    """

    def __init__(
        self,
        encoder: CellEncoder,
        spatial: SpatialObjective,
        *,
        masked_genes: MaskedGeneConfig | None = None,
        weights: LossWeights | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.spatial = spatial
        self.masked_genes = masked_genes
        self.gene_head = None if masked_genes is None else _gene_head(encoder)
        weights = weights or LossWeights()
        of_genes = {} if masked_genes is None else {"masked_genes": weights.masked_genes}
        #: Weight of each loss part that :meth:`forward` returns.
        self.weights = spatial.weights | positive(of_genes)

    def forward(self, inputs: JointBatch, gather: Gather | None = None) -> dict[str, LossPart]:
        """Compute the losses of a batch, or of this process's part of one.

        Parameters
        ----------
        inputs
            Masked sub-slices and the tokens of sampled cells.
        gather
            Collects rows from all processes; None for one process.

        Raises
        ------
        ValueError
            Masked genes are trained along and the batch has none.
        """
        features = inputs.masked.subslices.features
        if inputs.cells:
            features = replace_rows(features, inputs.places, embed_sampled(self.encoder, inputs))
        parts = self.spatial.losses(inputs.masked, features)
        if "masked_genes" in self.weights:
            parts["masked_genes"] = self._recover_genes(inputs, gather)
        return parts

    def count_operations(self, inputs: JointBatch) -> int:
        """Estimate the floating-point operations of a step (:mod:`stofm.train.operations`)."""
        products = sum(products_of_embeddings(self.encoder, group) for group in inputs.cells)
        if "masked_genes" in self.weights:
            assert self.masked_genes is not None
            assert self.gene_head is not None
            products += products_of_masked_genes(
                self.encoder, self.gene_head, inputs.genes, self.masked_genes.candidates
            )
        return self.spatial.count_operations(inputs.masked) + PER_PRODUCT * products

    def _recover_genes(self, inputs: JointBatch, gather: Gather | None) -> LossPart:
        """Masked genes of the sampled cells, all groups together."""
        assert self.masked_genes is not None
        assert self.gene_head is not None
        if len(inputs.genes) != len(inputs.cells):
            msg = (
                f"The batch has {len(inputs.cells)} groups of cells and {len(inputs.genes)} with "
                "masked genes; expected as many. Make them with MaskedGenes.build, or leave "
                "masked_genes of the objective at None."
            )
            raise ValueError(msg)
        # All groups at once: processes may have different numbers of them, and gather together.
        measured = [inputs.places.new_empty(0), *(group.measured for group in inputs.genes)]
        candidates = candidate_genes(self.masked_genes.candidates, torch.cat(measured), gather)
        whole = LossPart(inputs.masked.target_features.new_zeros(()), 0)
        for group in inputs.genes:
            part = masked_gene_loss(self.encoder, self.gene_head, group, candidates=candidates)
            whole = LossPart(whole.total + part.total, whole.count + part.count)
        return whole


def _gene_head(encoder: CellEncoder) -> MaskedGeneHead:
    config = encoder.config
    return MaskedGeneHead(
        n_tokens=config.n_tokens,
        d_hidden=config.d_hidden,
        activation=config.activation,
        layer_norm_eps=config.layer_norm_eps,
    )


def embed_sampled(
    encoder: Callable[[TokenBatch], Tensor], inputs: JointBatch
) -> Float[Tensor, "sampled d_cell"]:
    """Embed a batch's sampled cells anew, group by group."""
    return torch.cat([encoder(group) for group in inputs.cells])
