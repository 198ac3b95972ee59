"""Cell encoder: BERT over ranked gene tokens, without computing what is not used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from stofm.nn.batch import GeneBag, TokenBatch
    from stofm.nn.config import CellEncoderConfig

_Linear = tuple[Tensor, Tensor]
#: Entries of BERT's config, and ours for them.
BERT_NAMES = {
    "vocab_size": "n_tokens",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_hidden",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_inner",
    "max_position_embeddings": "max_positions",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "layer_norm_eps": "layer_norm_eps",
}
# From these many rows and queries on, the kernels' results for one don't depend on the others.
_MIN_ROWS = 16
_MIN_QUERIES = 4
# Pooled sums then have variances of about 1 a number over many slices.
_POOLED_SCALE = 4.0
# Of BERT's part beside pooled sums, which must not drown them in a panel of few genes.
_LEARNED_LENGTH = 2.0
# What is added to the eigenvalues of a panel's weights, as a share of the largest.
_RIDGE = 1e-3
# Width of the hidden layer that bends log(1 + value) before it becomes an embedding.
_D_VALUE = 32

NO_VALUES = (
    "The model uses expression values, but the tokens have none: make them with "
    "st.pp.tokenize(adata, model), or rank_genes(..., values=True)."
)


class _LayerWeights(NamedTuple):
    """Weights of one BERT layer, with queries, keys and values in one matrix."""

    qkv: _Linear
    out: _Linear
    attention_norm: _Linear
    inner: _Linear
    outer: _Linear
    norm: _Linear


class EncoderWeights(NamedTuple):
    """A cell encoder's weights arranged for running it, in one precision.

    Made once for a run by :meth:`CellEncoder.lay_out`; gradients flow through it.
    """

    words: Tensor
    gene_projection: Tensor | None
    positions: Tensor
    values: _Linear | None
    pooled: tuple[Tensor, ...]
    embedding_norm: _Linear
    layers: tuple[_LayerWeights, ...]


class CellEncoder(nn.Module):
    """BERT (transformers' ``BertModel``) and a linear map of position 0, scaled to unit length.

    transformers holds the weights, so that published ``cell_bert`` folders load as they are; the
    computation is ours: of the last layer only position 0 is computed, and attention is fused. With
    ``d_gene`` in the config, gene embeddings have a width of their own, and BERT gets a linear map
    of them.

    With ``values="log"`` in the config, an embedding of log(1 + value) is added to each token;
    it starts at 0, so that it changes nothing until it is trained. With ``pooled=True``, sums over
    all genes of a cell stand in front of BERT's part; they are computed in float32 in any
    precision, and their weights are not trained. The weights of a slice's genes are made
    orthonormal first (:meth:`lay_out`).

    Parameters
    ----------
    config
        Sizes and inputs.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.1; Geneformer (Theodoris et al. 2023, Nature 618:616).
    """

    gene_offset: Tensor
    medians: Tensor

    def __init__(self, config: CellEncoderConfig) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        self.config = config
        sizes = {theirs: getattr(config, ours) for theirs, ours in BERT_NAMES.items()}
        sizes |= {"attention_probs_dropout_prob": config.dropout, "pad_token_id": 0}
        self.bert = BertModel(BertConfig(**sizes), add_pooling_layer=False)
        if config.projects_genes:
            embeddings = nn.Embedding(config.n_tokens, config.gene_width, padding_idx=0)
            # As spread as BERT's own.
            nn.init.normal_(embeddings.weight, std=self.bert.config.initializer_range)
            nn.init.zeros_(embeddings.weight[0])
            self.bert.embeddings.word_embeddings = embeddings
            self.gene_projection = nn.Linear(config.gene_width, config.d_hidden, bias=False)
        self.projection = nn.Linear(config.d_hidden, config.d_learned)
        if config.values == "log":
            self.value_hidden = nn.Linear(1, _D_VALUE)
            self.value_embedding = nn.Linear(_D_VALUE, config.d_hidden)
            nn.init.zeros_(self.value_embedding.weight)
            nn.init.zeros_(self.value_embedding.bias)
        if config.pooled:
            self.gene_embeddings.weight.requires_grad = False
            self.register_buffer("gene_offset", torch.zeros(config.gene_width))
            # The vocabulary's, which Stofm sets.
            self.register_buffer("medians", torch.ones(config.n_tokens), persistent=False)

    def forward(self, batch: TokenBatch) -> Float[Tensor, "cells d_learned"]:
        """Compute BERT's part of the embeddings, the trained part.

        Parameters
        ----------
        batch
            Padded token lists, ``<cls>`` in front.

        Returns
        -------
        BERT's part, of unit length, or of length 2 if the model pools. Without pooling it is the
        whole embedding.

        Raises
        ------
        ValueError
            The model reads values and the batch has none.
        """
        return self._learned(batch, self.lay_out(self.projection.weight.dtype))

    def embed(
        self, batch: TokenBatch, weights: EncoderWeights, bag: GeneBag | None = None
    ) -> Float[Tensor, "cells d_cell"]:
        """Embed cells with weights from :meth:`lay_out`.

        A model that pools needs all genes of the cells, too.
        """
        learned = self._learned(batch, weights)
        if not self.config.pooled:
            return learned
        if bag is None:
            raise ValueError(NO_VALUES)
        return torch.cat([self.pool(bag, weights), learned], dim=-1)

    def _learned(self, batch: TokenBatch, weights: EncoderWeights) -> Tensor:
        hidden, mask = self._run(batch, weights, weights.layers[:-1])
        first = self._layer(hidden[:, :1], hidden, mask, weights.layers[-1])[:, 0]
        projection = (self.projection.weight, self.projection.bias)
        learned = F.normalize(_linear(first.to(projection[0].dtype), projection), dim=-1)
        return learned * _LEARNED_LENGTH if self.config.pooled else learned

    def hidden_states(self, batch: TokenBatch) -> Float[Tensor, "cells length d_hidden"]:
        """Output of the last layer at every position; arbitrary at padding."""
        weights = self.lay_out(self.projection.weight.dtype)
        return self._run(batch, weights, weights.layers)[0]

    def _run(
        self, batch: TokenBatch, weights: EncoderWeights, layers: tuple[_LayerWeights, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Output of some layers; `mask` has the keys to attend to, None (faster) all of them."""
        hidden = self._embeddings(batch, weights)
        is_full = bool(batch.is_real.all())
        mask = None if is_full else batch.is_real[:, None, None, :]
        for layer in layers:
            hidden = self._layer(hidden, hidden, mask, layer)
        return hidden, mask

    @property
    def gene_embeddings(self) -> nn.Embedding:
        """Embeddings of all tokens, (n_tokens, d_gene)."""
        embeddings: nn.Embedding = self.bert.embeddings.word_embeddings
        return embeddings

    def words(
        self, tokens: Int[Tensor, " tokens"] | None = None
    ) -> Float[Tensor, "tokens d_hidden"]:
        """Compute the gene embeddings that go into BERT, of some tokens or of all."""
        words = self.gene_embeddings.weight
        if tokens is not None:
            words = words[tokens]
        return words if self._gene_projection is None else F.linear(words, self._gene_projection)

    @property
    def _gene_projection(self) -> Tensor | None:
        """Linear map from gene embeddings to BERT's input, if there is one."""
        if not self.config.projects_genes:
            return None
        weight: Tensor = self.gene_projection.weight
        return weight

    def lay_out(
        self, dtype: torch.dtype, panel: Int[Tensor, " genes"] | None = None
    ) -> EncoderWeights:
        """Lay the weights out for running, in `dtype`.

        `panel` are tokens of the genes that the cells express, each once; with them the weights of
        pooled sums are laid out, too.
        """
        embeddings = self.bert.embeddings
        words, projection = self.gene_embeddings.weight, self._gene_projection
        if projection is not None and not torch.is_grad_enabled():
            # Once for a run. A step of training sees fewer tokens than there are.
            words, projection = F.linear(words, projection), None
        # Token type 0 everywhere: its embedding joins those of the positions.
        positions = (
            embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        )
        pooled: tuple[Tensor, ...] = ()
        if self.config.pooled and panel is not None:
            halves = self.gene_embeddings.weight.detach().float().chunk(2, dim=-1)
            pooled = tuple(orthonormal(half, panel) for half in halves)
        return EncoderWeights(
            words=words.to(dtype),
            gene_projection=None if projection is None else projection.to(dtype),
            positions=positions.to(dtype),
            values=_pair(self.value_embedding, dtype) if self.config.values == "log" else None,
            pooled=pooled,
            embedding_norm=_pair(embeddings.LayerNorm, dtype),
            layers=tuple(_layer_weights(layer, dtype) for layer in self.bert.encoder.layer),
        )

    def _embeddings(self, batch: TokenBatch, weights: EncoderWeights) -> Tensor:
        length = batch.tokens.shape[1]
        words = F.embedding(batch.tokens, weights.words)
        if weights.gene_projection is not None:
            words = _linear(words, (weights.gene_projection, None))
        hidden = words + weights.positions[:length]
        if weights.values is not None:
            hidden = hidden + self._value_embeddings(batch, weights.values)
        hidden = self._norm(hidden, weights.embedding_norm)
        return F.dropout(hidden, self.config.dropout, self.training)

    def _value_embeddings(self, batch: TokenBatch, output: _Linear) -> Tensor:
        if batch.values is None:
            raise ValueError(NO_VALUES)
        bend, shift = self.value_hidden.weight[:, 0], self.value_hidden.bias
        bent = F.relu(torch.log1p(batch.values)[..., None] * bend + shift)
        return _linear(bent.to(output[0].dtype), output)

    def pool(self, bag: GeneBag, weights: EncoderWeights) -> Float[Tensor, "cells d_gene"]:
        """Sum gene embeddings over all genes of each cell.

        The sums are divided by the root of the length of the cell's logarithms of counts: half-way
        between sums, which depend much on how deeply a cell was sequenced, and their direction.
        """
        with torch.autocast(bag.values.device.type, enabled=False):
            medians = self.medians.index_select(0, bag.tokens)
            counts, values = torch.log1p(bag.values * medians), torch.log1p(bag.values)
            pairs = zip(weights.pooled, (counts, values), strict=True)
            sums = torch.cat([_weighted_sums(*one, bag) for one in pairs], dim=-1)
            ones = counts.new_ones(len(self.medians), 1)
            lengths = _weighted_sums(ones, counts.square(), bag).sqrt().clamp_min(1.0)
            return sums * _POOLED_SCALE / lengths.sqrt() - self.gene_offset

    def _layer(
        self, queried: Tensor, hidden: Tensor, mask: Tensor | None, weights: _LayerWeights
    ) -> Tensor:
        """Compute a layer's output at the positions `queried`, which attend to all of `hidden`."""
        dropout = self.config.dropout if self.training else 0.0
        # A narrower product for the queries of a single position.
        weight, bias = weights.qkv
        d = self.config.d_hidden
        if queried is hidden:
            parts = _linear(hidden, weights.qkv).split(d, dim=-1)
        else:
            query = _linear(queried, (weight[:d], bias[:d]))
            parts = (query, *_linear(hidden, (weight[d:], bias[d:])).split(d, dim=-1))
        queries, keys, values = (
            part.unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2) for part in parts
        )
        n_queries = queries.shape[2]
        if n_queries < _MIN_QUERIES:
            queries = queries.repeat(1, 1, -(-_MIN_QUERIES // n_queries), 1)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=dropout
        )[:, :, :n_queries]
        mixed = _linear(attended.transpose(1, 2).flatten(2), weights.out)
        out = self._norm(queried + F.dropout(mixed, dropout), weights.attention_norm)
        activation = F.relu if self.config.activation == "relu" else F.gelu
        inner = _linear(activation(_linear(out, weights.inner)), weights.outer)
        return self._norm(out + F.dropout(inner, dropout), weights.norm)

    def _norm(self, hidden: Tensor, weights: _Linear) -> Tensor:
        return F.layer_norm(
            hidden, (self.config.d_hidden,), *weights, eps=self.config.layer_norm_eps
        )


def put_learned(
    features: Float[Tensor, "batch nodes d_cell"],
    places: Int[Tensor, " cells"],
    learned: Float[Tensor, "cells d_learned"],
) -> Float[Tensor, "batch nodes d_cell"]:
    """Return embeddings with BERT's part replaced at `places`, counted over the whole batch."""
    flat = features.flatten(0, 1)
    fixed = flat[places, : flat.shape[1] - learned.shape[1]]
    rows = torch.cat([fixed, learned.to(flat.dtype)], dim=1)
    return flat.index_put((places,), rows).view_as(features)


def orthonormal(
    weights: Float[Tensor, "tokens factors"], panel: Int[Tensor, " genes"]
) -> Float[Tensor, "tokens factors"]:
    """Make the factors of a panel's genes orthonormal, rotating them as little as possible.

    With W the rows of the panel, these are W (W'W + r)^(-1/2), so that a cell's sums are coordinates
    of its values along the factors, whatever genes are measured: a small panel keeps what it
    measures, and factors that it can't tell apart don't drown the others. r is a thousandth of the
    largest eigenvalue of W'W. Rows of other genes are 0.
    """
    rows = weights[panel].cpu().double()
    variances, axes = torch.linalg.eigh(rows.T @ rows)
    largest = variances[-1].clamp_min(torch.finfo(torch.float32).tiny)
    scales = (variances.clamp_min(0.0) + _RIDGE * largest).rsqrt()
    result = torch.zeros_like(weights)
    result[panel] = (rows @ (axes * scales) @ axes.T).to(result)
    return result


def _weighted_sums(
    words: Float[Tensor, "tokens width"], weights: Float[Tensor, " genes"], bag: GeneBag
) -> Float[Tensor, "cells width"]:
    """Sum each cell's word embeddings with their weights."""
    if words.device.type != "mps":
        return F.embedding_bag(
            bag.tokens, words, bag.offsets, mode="sum", per_sample_weights=weights
        )
    return _gathered_sums(words, weights, bag)


def _gathered_sums(words: Tensor, weights: Tensor, bag: GeneBag) -> Tensor:
    """Compute what embedding_bag does, which torch before 2.10 lacks on MPS."""
    lengths = torch.diff(bag.offsets, append=bag.offsets.new_tensor([len(bag.tokens)]))
    cells = torch.arange(len(lengths), device=words.device).repeat_interleave(lengths)
    found = words.new_zeros(len(lengths), words.shape[1])
    return found.index_add(0, cells, words.index_select(0, bag.tokens) * weights[:, None])


def _pair(module: Any, dtype: torch.dtype) -> _Linear:
    return module.weight.to(dtype), module.bias.to(dtype)


def _layer_weights(layer: Any, dtype: torch.dtype) -> _LayerWeights:
    # transformers' modules are untyped below BertModel.
    attention, output = layer.attention.self, layer.attention.output
    joined = (attention.query, attention.key, attention.value)
    weight, bias = (torch.cat([getattr(one, n) for one in joined]) for n in ("weight", "bias"))
    others = (
        *(output.dense, output.LayerNorm, layer.intermediate.dense),
        *(layer.output.dense, layer.output.LayerNorm),
    )
    return _LayerWeights((weight.to(dtype), bias.to(dtype)), *(_pair(one, dtype) for one in others))


def _linear(x: Tensor, weights: tuple[Tensor, Tensor | None]) -> Tensor:
    """Linear map whose rows don't depend, to the last bit, on what other rows there are.

    Kernels for few rows, and those for very narrow layers, add in another order. Clusters are found
    on the results, where the last bit can decide a tie, so a cell's embedding must not depend on
    its batch.
    """
    rows = x.reshape(-1, x.shape[-1])
    n_rows = len(rows)
    if n_rows < _MIN_ROWS:
        rows = F.pad(rows, (0, 0, 0, _MIN_ROWS - n_rows))
    return F.linear(rows, *weights)[:n_rows].view(*x.shape[:-1], -1)
