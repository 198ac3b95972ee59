"""SE(2) Transformer: cells and their distances to spatial cell embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stofm.nn.attention import GaussianDistanceBias, biased_attention, scatter_pairs
from stofm.spatial import NO_NEIGHBOR, NodeType

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from stofm.nn.batch import SubSliceBatch
    from stofm.nn.config import SE2TransformerConfig

#: Of the transformer's part, beside features that are passed on.
_TOLD_LENGTH = 10.0


@dataclass(frozen=True)
class PairState:
    """The pair representation, kept as its factors.

    `bias` is what every layer adds; `queries` and `keys` are those of all layers, concatenated.
    """

    bias: Float[Tensor, "batch heads nodes nodes"]
    queries: Float[Tensor, "batch heads nodes qk"]
    keys: Float[Tensor, "batch heads nodes qk"]

    def at(
        self, batch: Int[Tensor, " n"], rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]
    ) -> Float[Tensor, "n heads"]:
        """Pair representation at chosen pairs of real nodes: the sub-slice, and two nodes of it."""
        products = (self.queries[batch, :, rows] * self.keys[batch, :, columns]).sum(-1)
        return products + self.bias[batch, :, rows, columns]

    def attention(self) -> Float[Tensor, "batch nodes nodes"]:
        """Attention weights of the last layer, mean over heads, of sub-slices without padding."""
        weights = torch.zeros_like(self.bias[:, 0])
        for head in range(self.bias.shape[1]):
            logits = self.queries[:, head] @ self.keys[:, head].mT + self.bias[:, head]
            weights += torch.softmax(logits, dim=-1)
        return weights / self.bias.shape[1]


@dataclass(frozen=True)
class SE2Output:
    """Output of the SE(2) Transformer.

    Attributes
    ----------
    last_hidden_state
        (batch, nodes, d_model) hidden states of the nodes; arbitrary at padding.
    hidden_states
        Input of the first layer and output of every layer.
    pairs
        Pair representation after the last layer.
    """

    last_hidden_state: Float[Tensor, "batch nodes d_model"]
    hidden_states: tuple[Float[Tensor, "batch nodes d_model"], ...]
    pairs: PairState


class SE2Layer(nn.Module):
    """One layer: attention over the nodes and a feed-forward part, each added to its input.

    With `norm_first` a layer norm comes before each part instead of after the sum. Dropout applies
    to attention weights, to the feed-forward part and to what is added.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        d_inner: int,
        norm_first: bool,
        dropout: float,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_first = norm_first
        self.dropout = dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.attention_norm = nn.LayerNorm(d_model, eps=layer_norm_eps)
        self.fc1 = nn.Linear(d_model, d_inner)
        self.fc2 = nn.Linear(d_inner, d_model)
        self.norm = nn.LayerNorm(d_model, eps=layer_norm_eps)

    def project(
        self, hidden: Float[Tensor, "batch nodes d_model"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (divided by the square root of the head's width), keys and values by head."""
        if self.norm_first:
            hidden = self.attention_norm(hidden)
        n_batch, n_nodes, d_model = hidden.shape
        heads = self.qkv(hidden).view(n_batch, n_nodes, 3, self.n_heads, d_model // self.n_heads)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return queries * (d_model // self.n_heads) ** -0.5, keys, values

    def update(
        self,
        hidden: Float[Tensor, "batch nodes d_model"],
        attended: Float[Tensor, "batch heads nodes d_head"],
    ) -> Float[Tensor, "batch nodes d_model"]:
        """Add the attended values, then the feed-forward part."""
        mixed = self.out(attended.transpose(1, 2).flatten(2))
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        if not self.norm_first:
            hidden = self.attention_norm(hidden)
        inner = self.norm(hidden) if self.norm_first else hidden
        inner = F.dropout(F.gelu(self.fc1(inner)), self.dropout, self.training)
        hidden = hidden + F.dropout(self.fc2(inner), self.dropout, self.training)
        return hidden if self.norm_first else self.norm(hidden)


class SE2Transformer(nn.Module):
    """Transformer over the nodes of sub-slices, with distances as attention bias.

    Only distances between nodes are used, so rotating, shifting or mirroring a sub-slice changes
    nothing.

    Parameters
    ----------
    config
        Sizes.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.3.
    """

    def __init__(self, config: SE2TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.input_projection = nn.Linear(config.d_cell, config.d_model)
        self.node_type_embedding = nn.Embedding(len(NodeType), config.d_model)
        self.distance_bias = GaussianDistanceBias(
            n_kernels=config.n_kernels, n_heads=config.n_heads
        )
        if config.distance_start == "near":
            self.distance_bias.favor_near()
        names = ("d_model", "n_heads", "d_inner", "norm_first", "dropout", "layer_norm_eps")
        sizes = {name: getattr(config, name) for name in names}
        self.layers = nn.ModuleList(SE2Layer(**sizes) for _ in range(config.n_layers))

    def forward(
        self, batch: SubSliceBatch, bias: Float[Tensor, "batch heads nodes nodes"] | None = None
    ) -> SE2Output:
        """Embed the nodes of sub-slices.

        Parameters
        ----------
        batch
            Padded sub-slices.
        bias
            What takes the place of :meth:`attention_bias`.

        Returns
        -------
        Node embeddings and the pair representation.
        """
        features = batch.features.to(self.input_projection.weight.dtype)
        hidden = self.input_projection(features * self.config.feature_scale)
        hidden = hidden + self.node_type_embedding(batch.node_type)
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        bias = (self.attention_bias(batch) if bias is None else bias).to(hidden.dtype)
        masked = bias
        if bias.device.type != "cpu" and not bool(batch.is_real.all()):
            # On the CPU, attention leaves padding out anyway.
            masked = bias.masked_fill(~batch.is_real[:, None, None, :], -torch.inf)
        n_real, dropout = batch.pairs.n_real, self.config.dropout if self.training else 0.0

        all_hidden = [hidden]
        queries, keys = [], []
        for module in self.layers:
            layer = cast("SE2Layer", module)
            query, key, value = layer.project(hidden)
            queries.append(query)
            keys.append(key)
            if not self.config.pair_bias:
                # Nothing is carried: each layer's logits are its own.
                queries, keys = queries[-1:], keys[-1:]
            joined = torch.cat(queries, dim=-1), torch.cat(keys, dim=-1)
            attended = biased_attention(*joined, value, masked, n_real, dropout=dropout)
            hidden = layer.update(hidden, attended)
            all_hidden.append(hidden)
        return SE2Output(hidden, tuple(all_hidden), PairState(bias, *joined))

    def embed(
        self, batch: SubSliceBatch, *, bias: Float[Tensor, "batch heads nodes nodes"] | None = None
    ) -> Float[Tensor, "batch nodes d_embedding"]:
        """Embed the nodes: what is passed on, in front of the last hidden states.

        Parameters
        ----------
        batch
            Padded sub-slices.
        bias
            What takes the place of :meth:`attention_bias`; where it is -inf, the row's node does
            not see the column's node.

        Returns
        -------
        Embeddings, arbitrary at padding: the first features, their mean over the node and the cells
        around it, and the last hidden states, then scaled to a fixed length; only these, unscaled,
        in a model that passes nothing on.
        """
        hidden: Tensor = self(batch, bias).last_hidden_state
        if not self.config.n_passed:
            return hidden
        own = batch.features[..., : self.config.n_passed].to(hidden.dtype)
        told = F.normalize(hidden, dim=-1) * _TOLD_LENGTH
        return torch.cat([own, self._around(batch, own, bias), told], dim=-1)

    def _around(self, batch: SubSliceBatch, features: Tensor, bias: Tensor | None) -> Tensor:
        """Mean of features over each node and the cells near it."""
        pairs = batch.pairs
        near = torch.exp(pairs.distances.square() / (-2 * self.config.reach**2))
        weights = scatter_pairs(near[:, None], near.new_zeros(1), pairs)[:, 0]
        weights = weights * (batch.node_type == NodeType.CELL)[:, None, :]
        if bias is not None:
            weights = weights.masked_fill(bias[:, 0].isneginf(), 0.0)
        weights.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(features.dtype) @ features

    def attention_bias(self, batch: SubSliceBatch) -> Float[Tensor, "batch heads nodes nodes"]:
        """Distance encoder's output for every pair of nodes.

        The encoder is evaluated once for each listed pair and once for the constant that all
        others share. It is 0 where there is no distance: on the diagonal, for the slice token
        and for padding.
        """
        pairs = batch.pairs
        if not self.config.pair_bias:
            shape = (pairs.n_batch, self.config.n_heads, pairs.n_nodes, pairs.n_nodes)
            return batch.features.new_zeros(shape)
        constant = pairs.distances.new_tensor([NO_NEIGHBOR])
        values = self.distance_bias(torch.cat([constant, pairs.distances]))
        return scatter_pairs(values[1:], values[0], pairs)
