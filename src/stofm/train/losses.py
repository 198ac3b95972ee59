"""The losses of pretraining, each as a sum and a count; and the operations that they take.

Several processes that each hold a part of a batch can so divide by the count of all: the loss and
its gradient are then those of one process.

Floating-point operations are estimated from the matrices that a batch goes through. A trained
matrix takes 6 for each of its weights and each vector that is multiplied with it: 2 forward, 4
backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Not counted are padding, what
attention does with lengths squared, and whatever is no matrix. The functions count products, of
which each stands for :data:`PER_PRODUCT` operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import nn

    from stofm.nn import CellEncoder, SE2Transformer, TokenBatch
    from stofm.train.batches import MaskedGenes, MaskedSubSliceBatch
    from stofm.train.config import Candidates, CellLoss
    from stofm.train.heads import MaskedGeneHead

#: Operations, forward and backward, of one weight times one number.
PER_PRODUCT = 6


class Gather(Protocol):
    """Puts the rows of all processes together; gradients find their way back."""

    def __call__(self, rows: Tensor) -> tuple[Tensor, int]:
        """Gather (n, d) rows, where n may differ between processes, and say where one's own begin."""
        ...


@dataclass(frozen=True, eq=False)
class LossPart:
    """One loss over what a process holds of a batch; the loss is `total` / `count`.

    Attributes
    ----------
    total
        Scalar with gradient, 0 where there is nothing to recover.
    count
        Number of genes, cells or pairs in the sum, or their weight.
    """

    total: Tensor
    count: float


def contrastive_loss(
    first: Float[Tensor, "cells d_cell"],
    second: Float[Tensor, "cells d_cell"],
    *,
    temperature: float,
    gather: Gather | None = None,
) -> LossPart:
    """Tell each cell's second view from those of all other cells, given its first.

    ``-log(exp(cos(a_i, b_i) / t) / sum_j exp(cos(a_i, b_j) / t))``, summed over i; j runs over the
    cells of all processes. In float32 whatever the precision of training.

    Parameters
    ----------
    first, second
        Embeddings a and b of the same cells.
    temperature
        t.
    gather
        Collects b from all processes; None for one process.

    References
    ----------
    SimCSE (Gao et al. 2021), equation 4; SToFM (arXiv 2507.11588), section A.1.
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

    Parameters
    ----------
    encoder, head
        The cell encoder, and what scores genes from its hidden states.
    genes
        Cells with hidden genes.
    candidates
        Tokens among which the hidden ones are to be found, ascending; None for the whole
        vocabulary.

    References
    ----------
    SToFM (arXiv 2507.11588), section A.1; BERT (Devlin et al. 2019), section 3.1.
    """
    hidden = encoder.hidden_states(genes.tokens).flatten(0, 1)[genes.places]
    scores = head(hidden, encoder.words(candidates), candidates)
    answers = genes.labels
    if candidates is not None:
        answers = torch.searchsorted(candidates, answers)
    total = F.cross_entropy(scores.float(), answers, reduction="sum")
    return LossPart(total, len(genes.labels))


def candidate_genes(
    candidates: Candidates, measured: Int[Tensor, " genes"], gather: Gather | None = None
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


def masked_cell_loss(
    predicted: Float[Tensor, "cells d_cell"],
    target: Float[Tensor, "cells d_cell"],
    *,
    kind: CellLoss = "mse",
) -> LossPart:
    """Distance of predicted cell embeddings from the hidden ones, summed over the cells.

    Parameters
    ----------
    predicted, target
        Predicted and hidden embeddings.
    kind
        ``"mse"``: mean over the width of the squared difference, as in the paper. ``"cosine"``:
        1 - cosine, as in the published code, which scales predictions to unit length before.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4.
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
    """Squared difference of predicted and true distances, model units squared, summed over pairs.

    Parameters
    ----------
    predicted, target
        Predicted and true distances.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4.
    """
    return LossPart((predicted.float() - target.float()).square().sum(), len(target))


def matrix_weights(*modules: nn.Module) -> int:
    """Number of trained weights of modules that stand in matrices."""
    weights = (weight for module in modules for weight in module.parameters())
    return sum(w.numel() for w in weights if w.requires_grad and w.ndim > 1)


def products_of_embeddings(encoder: CellEncoder, batch: TokenBatch) -> int:
    """Products of the cell encoder, for cell embeddings.

    Of the last layer, only keys and values are computed at all tokens.
    """
    # transformers' modules are untyped below BertModel.
    stack: Any = encoder.bert.encoder.layer
    *layers, last = stack
    attention = last.attention.self
    keys_and_values = matrix_weights(attention.key, attention.value)
    per_token = matrix_weights(*layers) + keys_and_values + _of_inputs(encoder)
    per_cell = matrix_weights(last, encoder.projection) - keys_and_values
    return int(batch.is_real.sum()) * per_token + len(batch.tokens) * per_cell


def products_of_masked_genes(
    encoder: CellEncoder,
    head: MaskedGeneHead,
    groups: Sequence[MaskedGenes],
    candidates: Candidates,
) -> int:
    """Products of the cell encoder for hidden states at all tokens, and of the head on hidden genes.

    The candidates' word embeddings are a matrix of the head; they are counted in this process.
    """
    n_tokens = sum(int(group.tokens.is_real.sum()) for group in groups)
    n_targets = sum(len(group.labels) for group in groups)
    n_candidates = encoder.config.n_tokens
    if candidates == "batch":
        n_candidates = len({token for group in groups for token in group.measured.tolist()})
    per_token = matrix_weights(encoder.bert.encoder) + _of_inputs(encoder)
    per_target = matrix_weights(head.dense) + n_candidates * head.dense.out_features
    projected = n_candidates * _of_gene_projection(encoder)
    return n_tokens * per_token + n_targets * per_target + projected


def products_of_transformer(transformer: SE2Transformer, inputs: MaskedSubSliceBatch) -> int:
    """Products of the SE(2) Transformer over nodes, and over the pairs that have a distance."""
    pairs = inputs.subslices.pairs
    per_node = matrix_weights(transformer.input_projection, transformer.layers)
    products = sum(pairs.n_real) * per_node
    if transformer.config.pair_bias:
        products += len(pairs.distances) * matrix_weights(transformer.distance_bias)
    return products


def _of_inputs(encoder: CellEncoder) -> int:
    of_values = 0 if encoder.config.values == "none" else matrix_weights(encoder.value_embedding)
    return of_values + _of_gene_projection(encoder)


def _of_gene_projection(encoder: CellEncoder) -> int:
    return matrix_weights(encoder.gene_projection) if encoder.config.projects_genes else 0
