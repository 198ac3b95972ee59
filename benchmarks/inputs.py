"""Seeded inputs of full size, the same for both sides of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

N_TOKENS = 25_427
CLS = N_TOKENS - 1
N_VIRTUAL = 39
N_SUBSLICE_CELLS = 1_000
D_CELL = 256
#: Published names of the full-size SE(2) Transformer's sizes.
SE2_SIZES = {
    "input_dim": D_CELL,
    "embedding_dim": 256,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "ffn_embedding_dim": 256,
    "gaussian_hidden_dim": 128,
}


@dataclass(frozen=True)
class Nodes:
    """One sub-slice: slice token, virtual cells, cells."""

    coordinates: NDArray[np.float64]
    features: NDArray[np.float32]
    node_type: NDArray[np.int64]
    cell_index: NDArray[np.int64]


def make_nodes() -> Nodes:
    """1,040 nodes of a slice of 10,000 cells."""
    rng = np.random.default_rng(0)
    n_nodes = 1 + N_VIRTUAL + N_SUBSLICE_CELLS
    side = 100 / np.sqrt(2)
    coordinates = rng.uniform(-side / 2, side / 2, size=(n_nodes, 2))
    # The cells fill a tenth of the slice, the virtual cells all of it.
    coordinates[1 + N_VIRTUAL :] *= np.sqrt(0.1)
    coordinates[0] = 0
    features = _unit(rng.normal(size=(n_nodes, D_CELL)))
    features[0] = 0
    node_type = np.zeros(n_nodes, dtype=np.int64)
    node_type[0] = 1
    node_type[1 : 1 + N_VIRTUAL] = 2
    cell_index = np.arange(n_nodes) - 1 - N_VIRTUAL
    cell_index[: 1 + N_VIRTUAL] = -1
    return Nodes(coordinates, features.astype(np.float32), node_type, cell_index)


@dataclass(frozen=True)
class Targets:
    """What a training step predicts: features of masked cells, distances of chosen pairs."""

    cells: NDArray[np.int64]
    features: NDArray[np.float32]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    distances: NDArray[np.float32]


def make_targets(nodes: Nodes, distances: NDArray[np.float32]) -> Targets:
    """15 % of the cells, and the listed pairs of another 15 %."""
    rng = np.random.default_rng(1)
    cells = np.flatnonzero(nodes.node_type == 0)
    masked = np.sort(rng.permutation(cells)[: int(0.15 * len(cells))])
    moved = np.zeros(len(nodes.node_type), dtype=bool)
    moved[rng.permutation(cells)[: int(0.15 * len(cells))]] = True
    is_cell = nodes.node_type == 0
    chosen = (moved[:, None] | moved) & is_cell[:, None] & is_cell
    chosen &= (distances > 0) & (distances < 100)
    rows, columns = np.nonzero(chosen)
    return Targets(masked, nodes.features[masked], rows, columns, distances[rows, columns])


def make_token_lists() -> list[NDArray[np.int64]]:
    """32 cells of 100 to 2,048 gene tokens, in no order."""
    rng = np.random.default_rng(2)
    lengths = rng.permutation(np.linspace(100, 2048, 32).astype(int))
    return [rng.choice(np.arange(2, CLS), size=length, replace=False) for length in lengths]


def make_cell_encoder() -> tuple[Any, Any]:
    """BERT of full size with random weights, and the projection behind it."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=N_TOKENS,
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        intermediate_size=1024,
        hidden_act="relu",
        max_position_embeddings=2048,
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    return bert, torch.nn.Linear(512, D_CELL)


def make_slice(n_cells: int = 10_000) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Coordinates in no order, and 256 features of 12 types that live in overlapping regions."""
    rng = np.random.default_rng(4)
    xy = rng.uniform(0, [5_000, 4_000], size=(n_cells, 2))
    centres = rng.uniform(0, [5_000, 4_000], size=(12, 2))
    offset = xy[:, None] - centres
    affinity = -((offset / 700) ** 2).sum(axis=2) + rng.gumbel(size=(n_cells, 12))
    profiles = rng.normal(size=(12, D_CELL))
    features = profiles[affinity.argmax(axis=1)] + 0.8 * rng.normal(size=(n_cells, D_CELL))
    return xy, _unit(features).astype(np.float32)


@dataclass(frozen=True)
class Counts:
    """Raw counts, and token and median of each column (-1 and NaN outside the vocabulary)."""

    matrix: sparse.csr_matrix
    token_ids: NDArray[np.int64]
    medians: NDArray[np.float64]


def make_counts(n_cells: int = 3_000, n_genes: int = 20_000, density: float = 0.07) -> Counts:
    """Counts as a whole-transcriptome platform gives them; nine columns of ten are known."""
    rng = np.random.default_rng(5)
    n_entries = int(n_cells * n_genes * density)
    rows = rng.integers(0, n_cells, size=n_entries)
    columns = (n_genes * rng.beta(0.6, 1.6, size=n_entries)).astype(np.int64)
    matrix = sparse.coo_matrix(
        (np.ones(n_entries, np.float32), (rows, columns)), (n_cells, n_genes)
    )
    token_ids = np.full(n_genes, -1)
    medians = np.full(n_genes, np.nan)
    known = rng.permutation(n_genes)[: int(0.9 * n_genes)]
    token_ids[known] = 2 + rng.permutation(len(known))
    medians[known] = rng.lognormal(0.5, 0.8, size=len(known))
    return Counts(matrix.tocsr(), token_ids, medians)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
