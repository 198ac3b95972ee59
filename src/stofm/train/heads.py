"""What pretraining puts on top of the networks to ask for what was hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from stofm.nn.config import Activation


class MaskedGeneHead(nn.Module):
    """Hidden states to a score for each candidate gene, as in BERT.

    ``score = layer_norm(f(W h + b)) . word_embedding + bias``, with the activation f of the cell
    encoder, as in transformers' ``BertForMaskedLM``. The word embeddings are the cell encoder's.

    Parameters
    ----------
    n_tokens
        Rows of the word embedding.
    d_hidden
        Width of the hidden states, and of the word embeddings as BERT reads them.
    activation
        ``"relu"`` or ``"gelu"``.
    layer_norm_eps
        Epsilon of the layer norm.

    References
    ----------
    BERT (Devlin et al. 2019), section 3.1; SToFM (arXiv 2507.11588), section A.1.
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
        """Score candidates.

        Parameters
        ----------
        hidden
            Hidden states of the positions to recover.
        words
            Word embeddings of the candidates.
        candidates
            Tokens to score; None for the whole vocabulary.
        """
        inner = self.dense(hidden)
        inner = F.relu(inner) if self.activation == "relu" else F.gelu(inner)
        bias = self.bias if candidates is None else self.bias[candidates]
        return F.linear(self.norm(inner), words, bias)


class MaskedCellHead(nn.Module):
    """Hidden states of nodes to the cell embeddings that were hidden: linear, ReLU, linear.

    Parameters
    ----------
    d_model
        Width of the hidden states.
    d_cell
        Width of the cell embeddings.
    learned_mask
        Whether a learned vector stands in place of hidden embeddings.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4; ``lm_head`` of the published code.
    """

    def __init__(self, *, d_model: int, d_cell: int, learned_mask: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_cell)
        )
        #: (d_cell,) what stands in place of hidden embeddings, of about their length 1.
        self.mask: Tensor | None = None
        if learned_mask:
            self.mask = nn.Parameter(torch.randn(d_cell) * d_cell**-0.5)

    def forward(self, hidden: Float[Tensor, "targets d_model"]) -> Float[Tensor, "targets d_cell"]:
        """Predict cell embeddings."""
        predicted: Tensor = self.layers(hidden)
        return predicted


class PairDistanceHead(nn.Module):
    """Pair representation to the distance of the two nodes: linear, ReLU, linear.

    Parameters
    ----------
    n_heads
        Attention heads, the width of the pair representation.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4; ``pair_head`` of the published code.
    """

    def __init__(self, *, n_heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_heads, n_heads), nn.ReLU(), nn.Linear(n_heads, 1))

    def forward(self, pairs: Float[Tensor, "pairs heads"]) -> Float[Tensor, " pairs"]:
        """Predict distances, model units."""
        predicted: Tensor = self.layers(pairs)
        return predicted[:, 0]
