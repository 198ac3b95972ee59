"""What the stages of pretraining minimise: losses, the heads that they need, and modules of both.

Each loss is a sum and a count. Several processes that each hold a part of a batch can so divide by
the count of all: the loss and its gradient are then those of one process.

References
----------
SToFM (arXiv 2507.11588), sections 3.4 and A.1, and its published code; BERT (Devlin et al. 2019),
section 3.1; SimCSE (Gao et al. 2021), equation 4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stofm.train.config import ContrastiveConfig, LossWeights, MaskedGeneConfig
from stofm.train.losses import (
    Gather,
    LossPart,
    MaskedCellHead,
    MaskedGeneHead,
    PairDistanceHead,
    contrastive_loss,
    masked_cell_loss,
    masked_gene_loss,
    pair_distance_loss,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int

    from stofm.nn import CellEncoder, SE2Output, SE2Transformer, TokenBatch
    from stofm.train.config import Candidates, CellLoss
    from stofm.train.masked_cells import MaskedSubSliceBatch
    from stofm.train.masked_genes import CellBatch


class CellEncoderObjective(nn.Module):
    """Domain adaptation of the cell encoder, in place: masked genes and contrastive learning.

    L_DA = L_MGM + L_CL. Without dropout, as in validation, the two views of a cell differ by
    `gene_dropout` alone; the contrastive loss then says how far other cells lie away.
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
        #: Weight of each loss part that :meth:`forward` returns.
        self.weights = _positive(weights, "masked_genes", "contrastive")

    def forward(self, inputs: CellBatch, gather: Gather | None = None) -> dict[str, LossPart]:
        """Compute the losses of a batch, or of this process's part of one.

        `gather` collects rows from all processes; None for one process.
        """
        parts = {}
        if "masked_genes" in self.weights:
            genes, kind = inputs.genes, self.masked_genes.candidates
            among = _candidate_genes(kind, genes.measured, gather)
            parts["masked_genes"] = masked_gene_loss(
                self.encoder, self.gene_head, genes, candidates=among
            )
        if "contrastive" in self.weights:
            d_learned = self.encoder.config.d_learned
            first, second = (self.encoder(view)[:, -d_learned:] for view in inputs.views)
            parts["contrastive"] = contrastive_loss(
                first, second, temperature=self.contrastive.temperature, gather=gather
            )
        return parts


class SpatialObjective(nn.Module):
    """Masked cell modelling and pairwise distance recovery with the SE(2) Transformer, in place.

    L = lambda L_MCM + (1 - lambda) L_PDR; the losses at cells that are not hidden are ours.
    Without `learned_mask`, the number that the batch holds stands in place of hidden features.
    Distances are compared in the model unit `distance_unit`, 1 in the paper; their squared error is
    then hundreds, and that of unit-length cell embeddings a hundredth.
    """

    def __init__(
        self,
        transformer: SE2Transformer,
        *,
        learned_mask: bool = True,
        cell_loss: CellLoss = "mse",
        distance_unit: float = 1.0,
        weights: LossWeights | None = None,
    ) -> None:
        super().__init__()
        config = transformer.config
        self.transformer = transformer
        self.cell_loss: CellLoss = cell_loss
        self.distance_unit = distance_unit

        def head(*, learned_mask: bool) -> MaskedCellHead:
            return MaskedCellHead(
                d_model=config.d_model, d_cell=config.d_cell, learned_mask=learned_mask
            )

        self.cell_head = head(learned_mask=learned_mask)
        self.pair_head = PairDistanceHead(n_heads=config.n_heads)
        at_visible = ("visible_cells", "surroundings")
        #: Weight of each loss part that :meth:`forward` returns.
        self.weights = _positive(weights, "masked_cells", "pair_distances", *at_visible)
        # What is told from cells that are not hidden has heads of its own, so that hidden states
        # have room for both a cell and what lies around it.
        self.visible_head, self.surroundings_head = (
            head(learned_mask=False) if name in self.weights else None for name in at_visible
        )

    def forward(
        self, inputs: MaskedSubSliceBatch, gather: Gather | None = None
    ) -> dict[str, LossPart]:
        """Compute the losses of a batch; `gather` is not used."""
        return self.losses(inputs, inputs.subslices.features)

    def losses(
        self, inputs: MaskedSubSliceBatch, features: Float[Tensor, "batch nodes d_cell"]
    ) -> dict[str, LossPart]:
        """Compute the losses with `features` in place of those in `inputs`.

        Hidden nodes stay hidden, whatever `features` holds there.
        """
        batch = replace(inputs.subslices, features=self._hidden(inputs, features))
        out: SE2Output = self.transformer(batch)
        parts = {}
        if "masked_cells" in self.weights:
            predicted = self.predict_cells(out, inputs)
            parts["masked_cells"] = self._cell_loss(predicted, inputs.target_features)
        if "pair_distances" in self.weights:
            parts["pair_distances"] = pair_distance_loss(
                self.predict_distances(out, inputs) / self.distance_unit,
                inputs.pair_distances / self.distance_unit,
            )
        own = inputs.subslices.features.flatten(0, 1)[inputs.visible_places]
        for name, head, target in (
            ("visible_cells", self.visible_head, own),
            ("surroundings", self.surroundings_head, inputs.surroundings),
        ):
            if head is not None:
                predicted = _predicted(head, _at(out, inputs.visible_places))
                parts[name] = self._cell_loss(predicted, target)
        return parts

    def _cell_loss(self, predicted: Tensor, target: Tensor) -> LossPart:
        scaled = target * self.transformer.config.feature_scale
        return masked_cell_loss(predicted, scaled, kind=self.cell_loss)

    def predict_cells(
        self, out: SE2Output, inputs: MaskedSubSliceBatch
    ) -> Float[Tensor, "targets d_cell"]:
        """Cell embeddings predicted for the target nodes, times the model's `feature_scale`."""
        return _predicted(self.cell_head, _at(out, inputs.target_places))

    def predict_distances(
        self, out: SE2Output, inputs: MaskedSubSliceBatch
    ) -> Float[Tensor, " pairs"]:
        """Distances predicted for the target pairs, model units."""
        # They reach 100, where bfloat16 is only good to 0.5.
        pairs = out.pairs.at(inputs.pair_batch, inputs.pair_rows, inputs.pair_columns)
        return _predicted(self.pair_head, pairs)

    def _hidden(self, inputs: MaskedSubSliceBatch, features: Tensor) -> Tensor:
        """Put at hidden nodes what stands in place of their features."""
        places = inputs.hidden_places
        if self.cell_head.mask is None:
            filling = inputs.subslices.features.flatten(0, 1)[places]
        else:
            filling = self.cell_head.mask.expand(len(places), -1)
        return _replace_rows(features, places, filling)


class JointObjective(nn.Module):
    """The spatial objective with fresh embeddings of sampled cells, so that it trains both scales.

    The other cells, the virtual cells and the targets keep the embeddings that were computed
    before; a sampled cell that is hidden stays hidden. With `masked_genes`, genes of the sampled
    cells are hidden and recovered along.
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
        #: Weight of each loss part that :meth:`forward` returns.
        self.weights = dict(spatial.weights)
        if masked_genes is not None:
            self.weights |= _positive(weights, "masked_genes")

    def forward(
        self, inputs: MaskedSubSliceBatch, gather: Gather | None = None
    ) -> dict[str, LossPart]:
        """Compute the losses of a batch, or of this process's part of one.

        `gather` collects rows from all processes; None for one process.
        """
        features = with_fresh(self.encoder, inputs)
        parts = self.spatial.losses(inputs, features)
        if "masked_genes" in self.weights:
            assert self.masked_genes is not None
            assert self.gene_head is not None
            # All groups at once: processes may have different numbers of them, and gather together.
            measured = [
                inputs.hidden_places.new_empty(0),
                *(group.measured for group in inputs.genes),
            ]
            among = _candidate_genes(self.masked_genes.candidates, torch.cat(measured), gather)
            total, count = inputs.target_features.new_zeros(()), 0.0
            for group in inputs.genes:
                part = masked_gene_loss(self.encoder, self.gene_head, group, candidates=among)
                total, count = total + part.total, count + part.count
            parts["masked_genes"] = LossPart(total, count)
        return parts


def _positive(weights: LossWeights | None, *names: str) -> dict[str, float]:
    """Weights of the losses that are computed: those above 0."""
    weights = weights or LossWeights()
    return {name: getattr(weights, name) for name in names if getattr(weights, name) > 0}


def _gene_head(encoder: CellEncoder) -> MaskedGeneHead:
    config = encoder.config
    return MaskedGeneHead(
        n_tokens=config.n_tokens,
        d_hidden=config.d_hidden,
        activation=config.activation,
        layer_norm_eps=config.layer_norm_eps,
    )


def _candidate_genes(
    candidates: Candidates, measured: Int[Tensor, " genes"], gather: Gather | None
) -> Int[Tensor, " candidates"] | None:
    """Tokens among which hidden genes are to be found, ascending; None for the whole vocabulary.

    `measured` are those that occur in what this process holds of the batch.
    """
    if candidates == "vocabulary":
        return None
    if gather is not None:
        measured = gather(measured[:, None])[0]
    distinct: Tensor = torch.unique(measured)
    return distinct


def _at(out: SE2Output, places: Tensor) -> Tensor:
    return out.last_hidden_state.flatten(0, 1)[places]


def _predicted(head: nn.Module, hidden: Tensor) -> Tensor:
    """What a head predicts, in float32 whatever the precision of training."""
    with torch.autocast(hidden.device.type, enabled=False):
        predicted: Tensor = head(hidden.float())
    return predicted


def with_fresh(
    encoder: Callable[[TokenBatch], Tensor], inputs: MaskedSubSliceBatch
) -> Float[Tensor, "batch nodes d_cell"]:
    """Features of a batch with the sampled cells embedded anew."""
    features: Tensor = inputs.subslices.features
    if inputs.sampled_places is None:
        return features
    fresh = torch.cat([encoder(group) for group in inputs.sampled])
    return _replace_rows(features, inputs.sampled_places, fresh)


def _replace_rows(
    features: Float[Tensor, "batch nodes d_cell"],
    places: Int[Tensor, " rows"],
    rows: Float[Tensor, "rows d_cell"],
) -> Float[Tensor, "batch nodes d_cell"]:
    """Return features with `rows` at `places`, counted through the batch."""
    flat = features.flatten(0, 1)
    return flat.index_put((places,), rows.to(flat.dtype)).view_as(features)
