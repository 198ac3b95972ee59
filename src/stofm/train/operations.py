"""How many floating-point operations a batch takes, estimated from the matrices it goes through.

A trained matrix takes 6 operations for each of its weights and each vector that is multiplied with
it: 2 forward, 4 backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Not counted are
padding, what attention does with lengths squared, and whatever is no matrix. The functions here
count products, of which each stands for :data:`PER_PRODUCT` operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from stofm.nn import CellEncoder, SE2Transformer, TokenBatch
    from stofm.train.heads import MaskedGeneHead
    from stofm.train.inputs import MaskedGenes, MaskedSubSliceBatch
    from stofm.train.losses import Candidates

#: Operations, forward and backward, of one weight times one number.
PER_PRODUCT = 6


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
    projected = _of_gene_projection(encoder)
    per_token = matrix_weights(encoder.bert.encoder) + _of_inputs(encoder)
    per_target = matrix_weights(head.dense) + n_candidates * head.dense.out_features
    return n_tokens * per_token + n_targets * per_target + n_candidates * projected


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
