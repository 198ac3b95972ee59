"""Losses of pretraining, and the heads that predict what was hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from stofm.nn import CellEncoder
    from stofm.nn.config import Activation
    from stofm.train.config import CellLoss
    from stofm.train.masked_genes import MaskedGenes

#: Puts the (n, d) rows of all processes together, where n may differ between these, and says where
#: one's own begin; gradients find their way back.
Gather = Callable[[Tensor], tuple[Tensor, int]]


@dataclass(frozen=True, eq=False)
class LossPart:
    """One loss over what a process holds of a batch; the loss is `total` / `count`."""

    #: Scalar with gradient, 0 where there is nothing to recover.
    total: Tensor
    #: Number of genes, cells or pairs in the sum, or their weight.
    count: float


class MaskedGeneHead(nn.Module):
    """Hidden states to a score for each candidate gene, as in BERT.

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


class MaskedCellHead(nn.Module):
    """Hidden states of nodes to the cell embeddings that were hidden: linear, ReLU, linear.

    With `learned_mask`, `mask` is a learned vector that stands in place of hidden embeddings.
    """

    def __init__(self, *, d_model: int, d_cell: int, learned_mask: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_cell)
        )
        #: (d_cell,) of about the length 1 of embeddings.
        self.mask: Tensor | None = None
        if learned_mask:
            self.mask = nn.Parameter(torch.randn(d_cell) * d_cell**-0.5)

    def forward(self, hidden: Float[Tensor, "targets d_model"]) -> Float[Tensor, "targets d_cell"]:
        """Predict cell embeddings."""
        predicted: Tensor = self.layers(hidden)
        return predicted


class PairDistanceHead(nn.Module):
    """Pair representation, `n_heads` wide, to the nodes' distance: linear, ReLU, linear."""

    def __init__(self, *, n_heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_heads, n_heads), nn.ReLU(), nn.Linear(n_heads, 1))

    def forward(self, pairs: Float[Tensor, "pairs heads"]) -> Float[Tensor, " pairs"]:
        """Predict distances, model units."""
        predicted: Tensor = self.layers(pairs)
        return predicted[:, 0]


def contrastive_loss(
    first: Float[Tensor, "cells d_cell"],
    second: Float[Tensor, "cells d_cell"],
    *,
    temperature: float,
    gather: Gather | None = None,
) -> LossPart:
    """Tell each cell's second view from those of all other cells, given its first.

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
    candidates: Int[Tensor, " candidates"] | None = None,
) -> LossPart:
    """Cross-entropy of the hidden genes, summed over them.

    `candidates` are the tokens among which they are to be found, ascending; None for the whole
    vocabulary.
    """
    hidden = encoder.hidden_states(genes.tokens).flatten(0, 1)[genes.places]
    scores = head(hidden, encoder.words(candidates), candidates)
    answers = genes.labels
    if candidates is not None:
        answers = torch.searchsorted(candidates, answers)
    total = F.cross_entropy(scores.float(), answers, reduction="sum")
    return LossPart(total, len(genes.labels))


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
