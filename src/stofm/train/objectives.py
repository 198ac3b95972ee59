"""Objectives of pretraining: losses, prediction heads, and modules that join them.

Each loss is a sum and a count. So several processes that each hold a part of a batch can divide by
the count of all: loss and gradient are then those of a single process.

References
----------
SToFM (arXiv 2507.11588), sections 3.4 and A.1, and its published code; BERT (Devlin et al. 2019),
section 3.1; SimCSE (Gao et al. 2021), equation 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stofm.nn.cell_encoder import put_learned
from stofm.nn.device import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

    from stofm.nn import CellEncoder, SE2Output, SE2Transformer, Stofm, TokenBatch
    from stofm.nn.config import Activation
    from stofm.train.config import CellLoss, MaskedGeneConfig, StageConfig
    from stofm.train.masking import CellBatch, MaskedGenes, MaskedSubSliceBatch

#: Collects the (n, d) rows of all processes, where n may differ between them, and says where this
#: process's own begin; gradients flow back.
Gather = Callable[[Tensor], tuple[Tensor, int]]


@dataclass(frozen=True, eq=False)
class LossPart:
    """One loss over a process's part of a batch; the loss is `total` / `count`."""

    #: Scalar with gradient, 0 where there is nothing to recover.
    total: Tensor
    #: Number of genes, cells or pairs in the sum, or their weight.
    count: float


class MaskedGeneHead(nn.Module):
    """From hidden states to a score for each candidate gene, as in BERT.

    ``score = layer_norm(f(W h + b)) . word_embedding + bias``, with the activation f (``"relu"`` or
    ``"gelu"``) of the cell encoder, as in transformers' ``BertForMaskedLM``. The word embeddings,
    `n_tokens` of the width `d_hidden`, are the cell encoder's.
    """

    def __init__(
        self, *, n_tokens: int, d_hidden: int, activation: Activation, layer_norm_eps: float
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dense = nn.Linear(d_hidden, d_hidden)
        self.norm = nn.LayerNorm(d_hidden, eps=layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(n_tokens))

    def forward(
        self,
        hidden: Float[Tensor, "targets d_hidden"],
        words: Float[Tensor, "candidates d_hidden"],
        candidates: Int[Tensor, " candidates"] | None = None,
    ) -> Float[Tensor, "targets candidates"]:
        """Score candidate tokens (None for the whole vocabulary) by their word embeddings."""
        inner = self.dense(hidden)
        inner = F.relu(inner) if self.activation == "relu" else F.gelu(inner)
        bias = self.bias if candidates is None else self.bias[candidates]
        return F.linear(self.norm(inner), words, bias)


class TwoLayerHead(nn.Module):
    """Linear, ReLU, linear, in float32 whatever the precision of training.

    With `learned_mask`, `mask` is a learned vector in place of what is predicted.
    """

    def __init__(self, d_input: int, d_output: int, *, learned_mask: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(d_input, d_input), nn.ReLU(), nn.Linear(d_input, d_output)
        )
        #: (d_output,), of length about 1, as embeddings have.
        self.mask: Tensor | None = None
        if learned_mask:
            self.mask = nn.Parameter(torch.randn(d_output) * d_output**-0.5)

    def forward(
        self, hidden: Float[Tensor, "targets d_input"]
    ) -> Float[Tensor, "targets d_output"]:
        """Predict cell embeddings from hidden states, or distances from the pair representation."""
        with torch.autocast(hidden.device.type, enabled=False):
            predicted: Tensor = self.layers(hidden.float())
        return predicted


def contrastive_loss(
    first: Float[Tensor, "cells d_cell"],
    second: Float[Tensor, "cells d_cell"],
    *,
    temperature: float,
    gather: Gather | None = None,
) -> LossPart:
    """Identify each cell's second view among those of all cells by its first.

    ``-log(exp(cos(a_i, b_i) / t) / sum_j exp(cos(a_i, b_j) / t))``, summed over i; j runs over the
    cells of all processes, whose b `gather` collects (None for one process). In float32 whatever
    the precision of training.
    """
    with torch.autocast(first.device.type, enabled=False):
        queries = F.normalize(first.float(), dim=-1) / temperature
        own_keys = F.normalize(second.float(), dim=-1)
        keys, start = (own_keys, 0) if gather is None else gather(own_keys)
        answers = start + torch.arange(len(queries), device=queries.device)
        total = F.cross_entropy(queries @ keys.T, answers, reduction="sum")
    return LossPart(total, len(first))


def masked_gene_loss(
    encoder: CellEncoder,
    head: MaskedGeneHead,
    genes: MaskedGenes,
    *,
    how: MaskedGeneConfig,
    gather: Gather | None = None,
) -> LossPart:
    """Cross-entropy of the hidden genes of cells, summed over them.

    Each must be identified among the whole vocabulary, or among the genes of the batch, whose parts
    `gather` collects from all processes (None for one process).
    """
    among, answers = None, genes.labels
    if how.candidates == "batch":
        measured = genes.measured if gather is None else gather(genes.measured[:, None])[0]
        among = torch.unique(measured)
        answers = torch.searchsorted(among, answers)
    hidden = encoder.hidden_states(genes.tokens).flatten(0, 1)[genes.places]
    scores = head(hidden, encoder.words(among), among)
    total = F.cross_entropy(scores.float(), answers, reduction="sum")
    return LossPart(total, len(answers))


def masked_cell_loss(
    predicted: Float[Tensor, "cells d_cell"],
    target: Float[Tensor, "cells d_cell"],
    *,
    kind: CellLoss = "mse",
) -> LossPart:
    """Distance of predicted cell embeddings from the hidden ones, summed over the cells.

    ``"mse"``: mean over the width of the squared difference, as in the paper. ``"cosine"``:
    1 - cosine, as in the published code, which scales predictions to unit length before.
    """
    predicted, target = predicted.float(), target.float()
    if kind == "mse":
        total = (predicted - target).square().mean(dim=-1).sum()
    else:
        total = (1 - F.cosine_similarity(predicted, target, dim=-1)).sum()
    return LossPart(total, len(target))


def pair_distance_loss(
    predicted: Float[Tensor, " pairs"], target: Float[Tensor, " pairs"]
) -> LossPart:
    """Squared difference of predicted and true distances, model units squared, summed over pairs."""
    return LossPart((predicted.float() - target.float()).square().sum(), len(target))


class CellEncoderObjective(nn.Module):
    """Domain adaptation of the cell encoder, in place: masked genes and contrastive learning.

    L_DA = L_MGM + L_CL. Without dropout, as in validation, the two views of a cell differ by
    `gene_dropout` alone; the contrastive loss then says how far away other cells are.
    """

    def __init__(self, encoder: CellEncoder, config: StageConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        names = ("n_tokens", "d_hidden", "activation", "layer_norm_eps")
        self.gene_head = MaskedGeneHead(**{name: getattr(encoder.config, name) for name in names})
        #: Weight of each loss part that :meth:`forward` returns.
        self.weights = config.weights.above_zero("masked_genes", "contrastive")

    def forward(self, inputs: CellBatch, gather: Gather | None = None) -> dict[str, LossPart]:
        """Compute the losses of a batch, or of this process's part of one.

        `gather` collects rows from all processes; None for one process.
        """
        parts = {}
        if "masked_genes" in self.weights:
            parts["masked_genes"] = masked_gene_loss(
                self.encoder,
                self.gene_head,
                inputs.genes,
                how=self.config.masked_genes,
                gather=gather,
            )
        if "contrastive" in self.weights:
            first, second = (self.encoder(view) for view in inputs.views)
            parts["contrastive"] = contrastive_loss(
                first, second, temperature=self.config.contrastive.temperature, gather=gather
            )
        return parts


class SpatialObjective(nn.Module):
    """Masked cell modelling and pairwise distance recovery with the SE(2) Transformer, in place.

    L = lambda L_MCM + (1 - lambda) L_PDR; the losses at visible cells are stofm's own. Distances
    are compared in the model unit `distance_unit`, 1 in the paper; their squared error is then in
    the hundreds, that of unit-length cell embeddings around a hundredth.
    """

    def __init__(self, transformer: SE2Transformer, config: StageConfig) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = config

        sizes, is_learned = transformer.config, config.spatial_masking.mask_value == "learned"
        shape = sizes.d_model, sizes.d_cell
        self.cell_head = TwoLayerHead(*shape, learned_mask=is_learned)
        self.pair_head = TwoLayerHead(sizes.n_heads, 1)
        at_visible = ("visible_cells", "surroundings")
        #: Weight of each loss part that :meth:`forward` returns.
        self.weights = config.weights.above_zero("masked_cells", "pair_distances", *at_visible)
        # Predictions at visible cells have heads of their own, so that hidden states have room for
        # both a cell and its surroundings.
        self.visible_head, self.surroundings_head = (
            TwoLayerHead(*shape) if name in self.weights else None for name in at_visible
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
        original = inputs.subslices.features.flatten(0, 1)
        if self.cell_head.mask is None:
            filling = original[inputs.hidden_places]
        else:
            filling = self.cell_head.mask.expand(len(inputs.hidden_places), -1)
        rows = features.flatten(0, 1)
        hidden = rows.index_put((inputs.hidden_places,), filling.to(rows.dtype)).view_as(features)
        out: SE2Output = self.transformer(replace(inputs.subslices, features=hidden))
        told, parts = out.last_hidden_state.flatten(0, 1), {}

        def at_cells(head: nn.Module, places: Tensor, target: Tensor) -> LossPart:
            scaled = target * self.transformer.config.feature_scale
            return masked_cell_loss(head(told[places]), scaled, kind=self.config.cell_loss)

        if "masked_cells" in self.weights:
            cells = inputs.target_places, inputs.target_features
            parts["masked_cells"] = at_cells(self.cell_head, *cells)
        if "pair_distances" in self.weights:
            # They reach 100, where bfloat16 is only accurate to 0.5.
            pairs = out.pairs.at(inputs.pair_batch, inputs.pair_rows, inputs.pair_columns)
            found, unit = self.pair_head(pairs)[:, 0], self.config.distance_unit
            parts["pair_distances"] = pair_distance_loss(found / unit, inputs.pair_distances / unit)
        visible = inputs.visible_places
        for name, head, target in (
            ("visible_cells", self.visible_head, original[visible]),
            ("surroundings", self.surroundings_head, inputs.surroundings),
        ):
            if head is not None:
                parts[name] = at_cells(head, visible, target)
        return parts


class JointObjective(nn.Module):
    """The spatial objective with fresh embeddings of sampled cells, so that it trains both scales.

    The other cells, the virtual cells and the targets keep the embeddings that were computed
    before; a sampled cell that is hidden stays hidden.
    """

    def __init__(self, encoder: CellEncoder, spatial: SpatialObjective) -> None:
        super().__init__()
        self.encoder = encoder
        self.spatial = spatial
        #: Weight of each loss part that :meth:`forward` returns.
        self.weights = spatial.weights

    def forward(
        self, inputs: MaskedSubSliceBatch, gather: Gather | None = None
    ) -> dict[str, LossPart]:
        """Compute the losses of a batch, or of this process's part of one; `gather` is not used."""
        return self.spatial.losses(inputs, with_fresh(self.encoder, inputs))


def make_objectives(model: Stofm, stages: Sequence[StageConfig], *, seed: int) -> nn.ModuleList:
    """Make the objectives of all stages, which share heads."""
    heads: dict[str, nn.Module] = {}
    made = nn.ModuleList()
    with seeded(seed):
        for config in stages:
            if config.name == "cell_encoder":
                made.append(CellEncoderObjective(model.cell_encoder, config))
            else:
                spatial = SpatialObjective(model.se2_transformer, config)
                _share_heads(spatial, heads)
                is_joint = config.name == "joint"
                made.append(JointObjective(model.cell_encoder, spatial) if is_joint else spatial)
            _share_heads(made[-1], heads)
    return made


def _share_heads(objective: nn.Module, heads: dict[str, nn.Module]) -> None:
    """Replace an objective's heads by those of earlier stages."""
    for name, own in list(objective.named_children()):
        if name.endswith("_head"):
            learns_mask = getattr(own, "mask", None) is not None
            setattr(objective, name, heads.setdefault(f"{name}, {learns_mask}", own))


def with_fresh(
    encoder: Callable[[TokenBatch], Tensor], inputs: MaskedSubSliceBatch
) -> Float[Tensor, "batch nodes d_cell"]:
    """Features of a batch with BERT's part of the sampled cells computed again."""
    features: Tensor = inputs.subslices.features
    if inputs.sampled_places is None:
        return features
    fresh = torch.cat([encoder(group) for group in inputs.sampled])
    return put_learned(features, inputs.sampled_places, fresh)
