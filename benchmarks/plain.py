"""The method written down plainly, as the measure that stofm's speed is compared with.

Each function computes one step of SToFM (arXiv 2507.11588) the way its published code describes it:
dense matrices, loops over cells, padded batches, one matrix of pairs carried from layer to layer.
Nothing is shared with the package, so agreement of the two is a check of both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix
    from transformers import BertModel

NO_NEIGHBOR = 100.0
TARGET_SUM = np.float32(10_000)
CELL, SLICE, VIRTUAL, PADDING = range(4)


def plain_tokens(
    counts: csr_matrix,
    gene_ids: Sequence[str],
    tokens: Mapping[str, int],
    medians: Mapping[str, float],
    *,
    max_tokens: int = 2048,
) -> list[NDArray[np.int64]]:
    """Rank-value encoding: the tokens of each cell's genes by decreasing scaled expression."""
    known = np.array([gene in medians for gene in gene_ids])
    median = np.array([medians[gene] for gene in gene_ids if gene in medians])
    token = np.array([tokens[gene] for gene in gene_ids if gene in medians])
    dense = counts.toarray()
    totals = dense.sum(axis=1, keepdims=True)
    values = dense[:, known] / np.maximum(totals, 1) * TARGET_SUM / median
    encoded = []
    for row in values:
        (expressed,) = np.nonzero(row)
        order = np.argsort(-row[expressed])
        encoded.append(token[expressed[order]][:max_tokens])
    return encoded


def plain_encode_cells(
    bert: BertModel,
    projection: nn.Linear,
    encoded: Sequence[NDArray[np.int64]],
    *,
    cls: int,
    pad: int = 0,
    max_positions: int = 2048,
) -> Tensor:
    """One batch of cells, padded to the longest: unit-length (cells, d_cell)."""
    sequences = [np.concatenate([[cls], tokens])[:max_positions] for tokens in encoded]
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
    with torch.no_grad():
        hidden = bert(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize(projection(hidden[:, 0]), dim=-1)


def plain_normalize(coordinates: NDArray[np.floating]) -> NDArray[np.floating]:
    """Centre on the bounding box's middle, scale its diagonal to 100."""
    xy = coordinates[:, :2]
    low, high = xy.min(axis=0), xy.max(axis=0)
    return (xy - (low + high) / 2) / np.linalg.norm(high - low) * 100


def plain_split(xy: NDArray[np.floating], n_cells: int) -> list[NDArray[np.int64]]:
    """Cut a slice into square tiles of about `n_cells`; cells on the far edge can be lost."""
    n = len(xy)
    if n <= n_cells:
        return [np.arange(n)]
    (left, bottom), (right, top) = xy.min(axis=0), xy.max(axis=0)
    n_tiles = n // n_cells + 1
    side = math.sqrt((right - left) * (top - bottom) / n_tiles)
    parts = []
    for column in range(int((right - left) / side) + 1):
        for row in range(int((top - bottom) // side) + 1):
            x, y = left + column * side, bottom + row * side
            inside = (xy[:, 0] >= x) & (xy[:, 0] < x + side)
            inside &= (xy[:, 1] >= y) & (xy[:, 1] < y + side)
            (tile,) = np.nonzero(inside)
            if len(tile):
                parts.extend(np.array_split(tile, max(len(tile) // n_cells, 1)))
    return parts


class PlainVirtualCells(NamedTuple):
    """Virtual cells of a slice, and the steps on the way to them."""

    components: NDArray[np.floating]
    points: NDArray[np.floating]
    labels: NDArray[np.int64]
    coordinates: NDArray[np.floating]
    features: NDArray[np.floating]


def plain_virtual_cells(
    xy: NDArray[np.floating],
    features: NDArray[np.floating],
    *,
    alpha: float = 0.2,
    resolution: float = 1.0,
    seed: int = 0,
) -> PlainVirtualCells:
    """Cluster the cells of a whole slice by expression and place, and average each cluster."""
    components = PCA(n_components=2, random_state=seed).fit_transform(features)
    points = alpha * _by_largest_norm(xy) + (1 - alpha) * _by_largest_norm(components)
    labels = plain_leiden(points, resolution=resolution, seed=seed)
    groups = [labels == label for label in range(labels.max() + 1)]
    return PlainVirtualCells(
        components,
        points,
        labels,
        np.stack([xy[group].mean(axis=0) for group in groups]),
        np.stack([features[group].mean(axis=0) for group in groups]),
    )


def _by_largest_norm(rows: NDArray[np.floating]) -> NDArray[np.floating]:
    return rows / np.linalg.norm(rows, axis=1).max()


def plain_leiden(
    points: NDArray[np.floating], *, resolution: float, seed: int
) -> NDArray[np.int64]:
    """Cluster with scanpy: 10 neighbours, UMAP weights, Leiden through igraph."""
    import anndata as ad
    import scanpy as sc

    table = ad.AnnData(obsm={"points": points}, shape=(len(points), 0))
    sc.pp.neighbors(table, n_neighbors=10, use_rep="points", random_state=seed)
    sc.tl.leiden(
        table,
        resolution=resolution,
        flavor="igraph",
        n_iterations=-1,
        directed=False,
        random_state=seed,
    )
    return table.obs["leiden"].to_numpy().astype(np.int64)


def plain_distances(
    nodes: NDArray[np.floating], node_type: NDArray[np.integer], *, n_neighbors: int = 50
) -> NDArray[np.float32]:
    """Dense (nodes, nodes) distances; 100 where two cells are no neighbours, 0 for the slice token."""
    n_nodes = len(nodes)
    search = NearestNeighbors(n_neighbors=min(n_neighbors, n_nodes - 1), algorithm="brute")
    # Each node is the first of its own neighbours.
    found, neighbors = search.fit(nodes).kneighbors(nodes)
    distances = np.full((n_nodes, n_nodes), NO_NEIGHBOR)
    rows = np.arange(n_nodes)[:, None]
    distances[rows, neighbors] = found
    distances[neighbors, rows] = found
    for virtual in np.flatnonzero(node_type == VIRTUAL):
        exact = np.linalg.norm(nodes - nodes[virtual], axis=1)
        distances[virtual] = exact
        distances[:, virtual] = exact
    # Distance 0 means "no entry" there, so coincident nodes are no neighbours.
    distances[distances == 0] = NO_NEIGHBOR
    np.fill_diagonal(distances, 0)
    distances[0] = 0
    distances[:, 0] = 0
    return distances.astype(np.float32)


class PlainBatch(NamedTuple):
    """Sub-slices padded to the longest."""

    features: Tensor
    distances: Tensor
    node_type: Tensor
    cell_index: Tensor


def plain_subslice(
    cells: NDArray[np.integer],
    xy: NDArray[np.floating],
    features: NDArray[np.floating],
    virtual: PlainVirtualCells,
) -> PlainBatch:
    """Nodes of one sub-slice: slice token, virtual cells, cells; a batch of one."""
    n_virtual = len(virtual.coordinates)
    nodes = np.concatenate([np.zeros((1, 2)), virtual.coordinates, xy[cells]])
    rows = np.concatenate(
        [np.zeros((1, features.shape[1])), virtual.features, features[cells]], dtype=np.float32
    )
    node_type = np.array([SLICE] + [VIRTUAL] * n_virtual + [CELL] * len(cells))
    index = np.concatenate([np.full(1 + n_virtual, -1), cells])
    distances = plain_distances(nodes, node_type)
    arrays = (rows, distances, node_type, index)
    return PlainBatch(*(torch.from_numpy(array)[None] for array in arrays))


def plain_collate(subslices: Sequence[PlainBatch]) -> PlainBatch:
    """Pad sub-slices on the right to the longest and stack them."""
    longest = max(part.node_type.shape[1] for part in subslices)
    padded = []
    for part in subslices:
        missing = longest - part.node_type.shape[1]
        padded.append(
            PlainBatch(
                F.pad(part.features, (0, 0, 0, missing)),
                F.pad(part.distances, (0, missing, 0, missing)),
                F.pad(part.node_type, (0, missing), value=PADDING),
                F.pad(part.cell_index, (0, missing), value=-1),
            )
        )
    return PlainBatch(*(torch.cat(tensors) for tensors in zip(*padded, strict=True)))


class PlainGaussian(nn.Module):
    """Distance encoder evaluated at every pair of nodes."""

    def __init__(self, *, n_kernels: int, n_heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.means = nn.Embedding(1, n_kernels)
        self.stds = nn.Embedding(1, n_kernels)
        nn.init.uniform_(self.means.weight, 0, 3)
        nn.init.uniform_(self.stds.weight, 0, 3)
        self.proj = nn.Sequential(
            nn.Linear(n_kernels, n_kernels), nn.ReLU(), nn.Linear(n_kernels, n_heads)
        )

    def forward(self, distances: Tensor) -> Tensor:
        """Map (B, N, N) distances to (B, heads, N, N) biases."""
        x = self.linear(distances[..., None])
        std = self.stds.weight[0].abs() + 1e-5
        z = (x - self.means.weight[0]) / std
        density = torch.exp(-0.5 * z**2) / (math.sqrt(2 * math.pi) * std)
        bias = self.proj(density)
        bias = bias.masked_fill((distances == 0)[..., None], 0.0)
        return bias.permute(0, 3, 1, 2)


class PlainAttention(nn.Module):
    """Self-attention that returns its logits as the next layer's bias."""

    def __init__(self, *, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = nn.Dropout(dropout)
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self, hidden: Tensor, bias: Tensor, is_padding: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the update, the logits (0 at padded keys) and the attention weights."""
        heads = (self.n_heads, hidden.shape[-1] // self.n_heads)
        query = self.q_proj(hidden).unflatten(-1, heads).transpose(1, 2) / math.sqrt(heads[1])
        key = self.k_proj(hidden).unflatten(-1, heads).transpose(1, 2)
        value = self.v_proj(hidden).unflatten(-1, heads).transpose(1, 2)
        padded_key = is_padding[:, None, None, :]
        logits = query @ key.transpose(-1, -2) + bias
        weights = logits.masked_fill(padded_key, -torch.inf).softmax(dim=-1)
        mixed = (self.dropout(weights) @ value).transpose(1, 2).flatten(2)
        return self.out_proj(mixed), logits.masked_fill(padded_key, 0.0), weights


class PlainLayer(nn.Module):
    """Attention and feed-forward part, each with its layer norm."""

    def __init__(
        self, *, d_model: int, n_heads: int, d_inner: int, pre_layernorm: bool, dropout: float
    ) -> None:
        super().__init__()
        self.pre_layernorm = pre_layernorm
        self.dropout = nn.Dropout(dropout)
        self.self_attn = PlainAttention(d_model=d_model, n_heads=n_heads, dropout=dropout)
        self.self_attn_layer_norm = nn.LayerNorm(d_model)
        self.fc1 = nn.Linear(d_model, d_inner)
        self.fc2 = nn.Linear(d_inner, d_model)
        self.final_layer_norm = nn.LayerNorm(d_model)

    def forward(
        self, hidden: Tensor, bias: Tensor, is_padding: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new hidden states, the logits and the attention weights."""
        inner = self.self_attn_layer_norm(hidden) if self.pre_layernorm else hidden
        update, logits, weights = self.self_attn(inner, bias, is_padding)
        hidden = hidden + self.dropout(update)
        if not self.pre_layernorm:
            hidden = self.self_attn_layer_norm(hidden)
        inner = self.final_layer_norm(hidden) if self.pre_layernorm else hidden
        inner = self.fc2(self.dropout(F.gelu(self.fc1(inner))))
        hidden = hidden + self.dropout(inner)
        if not self.pre_layernorm:
            hidden = self.final_layer_norm(hidden)
        return hidden, logits, weights


class PlainOutput(NamedTuple):
    """What :class:`PlainSE2Transformer` computes."""

    last_hidden_state: Tensor
    hidden_states: list[Tensor]
    pair_rep: Tensor
    gaussian: Tensor
    attention: Tensor


class PlainEncoder(nn.Module):
    """The stack of layers; with `pre_layernorm` it has a last norm that is never applied."""

    def __init__(self, *, n_layers: int, **sizes: int | float | bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainLayer(**sizes) for _ in range(n_layers))
        if sizes["pre_layernorm"]:
            self.final_layer_norm = nn.LayerNorm(sizes["d_model"])


class PlainSE2Transformer(nn.Module):
    """SE(2) Transformer over dense distances, with the published parameter names."""

    def __init__(
        self,
        *,
        input_dim: int = 256,
        embedding_dim: int = 256,
        num_attention_heads: int = 8,
        num_hidden_layers: int = 4,
        ffn_embedding_dim: int = 256,
        gaussian_hidden_dim: int = 128,
        pre_layernorm: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding_layer = nn.Linear(input_dim, embedding_dim)
        self.token_type_embeddings = nn.Embedding(4, embedding_dim)
        self.gaussian = PlainGaussian(n_kernels=gaussian_hidden_dim, n_heads=num_attention_heads)
        self.dropout = nn.Dropout(dropout)
        self.encoder = PlainEncoder(
            n_layers=num_hidden_layers,
            d_model=embedding_dim,
            n_heads=num_attention_heads,
            d_inner=ffn_embedding_dim,
            pre_layernorm=pre_layernorm,
            dropout=dropout,
        )

    def forward(
        self, features: Tensor, distances: Tensor, node_type: Tensor, *, use_bias: bool = True
    ) -> PlainOutput:
        """Embed (B, N, input_dim) nodes."""
        is_padding = node_type == PADDING
        hidden = self.embedding_layer(features) + self.token_type_embeddings(node_type)
        hidden = self.dropout(hidden)
        gaussian = bias = self.gaussian(distances)
        hidden_states = [hidden]
        for layer in self.encoder.layers:
            layer_bias = bias if use_bias else torch.zeros_like(bias)
            hidden, bias, weights = layer(hidden, layer_bias, is_padding)
            hidden_states.append(hidden)
        return PlainOutput(
            hidden, hidden_states, bias.permute(0, 2, 3, 1), gaussian, weights.mean(dim=1)
        )


class PlainHeads(nn.Module):
    """Pre-training heads: features of masked cells, distances of moved ones."""

    def __init__(self, *, embedding_dim: int = 256, num_attention_heads: int = 8) -> None:
        super().__init__()
        self.lm_head = _head(embedding_dim, embedding_dim)
        self.pair_head = _head(num_attention_heads, 1)

    def forward(
        self, hidden: Tensor, pair_rep: Tensor, features: Tensor, distances: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return both losses for the rows of selected cells and of selected pairs."""
        predicted = F.normalize(self.lm_head(hidden), dim=-1)
        loss = (1 - F.cosine_similarity(predicted, features, dim=-1)).mean()
        return loss, F.mse_loss(self.pair_head(pair_rep)[:, 0], distances)


def _head(d_in: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_in), nn.ReLU(), nn.Linear(d_in, d_out))


def plain_embed_subslices(
    model: PlainSE2Transformer,
    subslices: Sequence[PlainBatch],
    n_cells: int,
    *,
    batch_size: int = 4,
) -> NDArray[np.float32]:
    """Embed sub-slices batch by batch and write each cell's row."""
    width = model.embedding_layer.out_features
    embeddings = np.zeros((n_cells, width), dtype=np.float32)
    for start in range(0, len(subslices), batch_size):
        batch = plain_collate(subslices[start : start + batch_size])
        with torch.no_grad():
            output = model(batch.features, batch.distances, batch.node_type)
        is_cell = batch.cell_index >= 0
        embeddings[batch.cell_index[is_cell]] = output.last_hidden_state[is_cell].numpy()
    return embeddings
