"""stofm's side of each comparison: prepares, and returns the work to be timed.

The work returns its result, or a function that brings it into a form to compare, outside the timing.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import inputs
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stofm.spatial import SubSliceConfig

    Work = Callable[[], Any]


def _batch(nodes: inputs.Nodes) -> Any:
    from stofm.nn import SubSliceBatch
    from stofm.spatial import SubSlice, pair_distances

    pairs = pair_distances(nodes.coordinates, nodes.node_type, neighbors_among="all_nodes")
    subslice = SubSlice(nodes.coordinates, nodes.features, nodes.node_type, nodes.cell_index, pairs)
    return SubSliceBatch.from_subslices([subslice])


def _se2_transformer() -> Any:
    import baseline

    from stofm.nn.reference import se2_from_reference

    return se2_from_reference(inputs.SE2_SIZES, baseline.make_se2_transformer().state_dict())


def se2_forward() -> Work:
    import torch

    batch = _batch(inputs.make_nodes())
    model = _se2_transformer().eval()

    def work() -> Any:
        with torch.inference_mode():
            return model(batch).last_hidden_state.numpy()

    return work


def se2_train_step() -> Work:
    import plain
    import torch

    nodes = inputs.make_nodes()
    batch = _batch(nodes)
    distances = plain.plain_distances(nodes.coordinates, nodes.node_type)
    targets = inputs.make_targets(nodes, distances)
    model = _se2_transformer().train()
    heads = plain.PlainHeads()
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-4)
    rows, columns = torch.from_numpy(targets.rows), torch.from_numpy(targets.columns)

    def work() -> Any:
        optimizer.zero_grad()
        output = model(batch)
        losses = heads(
            output.last_hidden_state[0, targets.cells],
            output.pairs.at(torch.zeros_like(rows), rows, columns),
            torch.from_numpy(targets.features),
            torch.from_numpy(targets.distances),
        )
        sum(losses).backward()
        optimizer.step()

    return work


def _cell_encoder(dtype: str) -> Work:
    import torch

    from stofm.genes import RankedTokens
    from stofm.nn import CellEncoder, CellEncoderConfig, encode_cells

    bert, projection = inputs.make_cell_encoder()
    encoder = CellEncoder(CellEncoderConfig(n_tokens=inputs.N_TOKENS, d_cell=inputs.D_CELL))
    encoder.bert.load_state_dict(bert.state_dict())
    encoder.projection.load_state_dict(projection.state_dict())
    encoded = inputs.make_token_lists()
    offsets = np.cumsum([0, *(len(cell) for cell in encoded)])
    ranked = RankedTokens(np.concatenate(encoded).astype(np.int32), offsets)
    vocabulary: Any = SimpleNamespace(cls=inputs.CLS, pad=0)
    device = torch.device("cpu")
    return lambda: encode_cells(
        encoder, ranked, vocabulary, device=device, dtype=getattr(torch, dtype)
    )


def cell_encoder() -> Work:
    return _cell_encoder("float32")


def cell_encoder_bf16() -> Work:
    return _cell_encoder("bfloat16")


def _extraction(config: SubSliceConfig) -> Work:
    from stofm.spatial import lay_out_slice

    xy, features = inputs.make_slice()
    return lambda: lay_out_slice(xy, features, config).virtual_cell


def extraction() -> Work:
    from stofm.spatial import SubSliceConfig

    return _extraction(SubSliceConfig.reference())


def extraction_own_rules() -> Work:
    from stofm.spatial import SubSliceConfig

    return _extraction(SubSliceConfig())


def tokenize() -> Work:
    from stofm.genes import rank_genes

    counts = inputs.make_counts()

    def work() -> Any:
        ranked = rank_genes(counts.matrix, counts.token_ids, counts.medians)
        return lambda: _sorted_by_cell(np.split(ranked.tokens, ranked.offsets[1:-1]))

    return work


def _sorted_by_cell(cells: list[Any]) -> Any:
    # Equal values have no defined order in the plain implementation.
    return np.concatenate([np.sort(cell) for cell in cells])


def embed_mini(n_cells: int = 20_000) -> Work:
    import stofm as st
    from stofm.nn import UntrainedModelWarning

    warnings.filterwarnings("ignore", category=UntrainedModelWarning)
    adata = st.datasets.simulate_slice(n_cells, 300, seed=0)

    def work() -> Any:
        st.tl.embed(adata.copy(), device="cpu", show_progress_bar=False)

    return work


def embed_mini_backed(path: Path) -> Work:
    import anndata

    import stofm as st
    from stofm.nn import UntrainedModelWarning

    warnings.filterwarnings("ignore", category=UntrainedModelWarning)
    adata = anndata.read_h5ad(path, backed="r")
    return lambda: st.tl.embed(adata, device="cpu", show_progress_bar=False)


def write_large_slice(path: Path, n_cells: int) -> None:
    """Write one slice of `n_cells` cells, put together from simulated tiles side by side."""
    import anndata

    import stofm as st

    n_tile = min(n_cells, 50_000)
    n_tiles = -(-n_cells // n_tile)
    n_columns = int(np.ceil(np.sqrt(n_tiles)))
    tiles = []
    for number in range(n_tiles):
        tile = st.datasets.simulate_slice(n_tile, 300, seed=number)
        width = np.ptp(tile.obsm["spatial"], axis=0)
        tile.obsm["spatial"] = tile.obsm["spatial"] + width * divmod(number, n_columns)
        tile.obs_names = [f"{number}-{name}" for name in tile.obs_names]
        tiles.append(tile)
    anndata.concat(tiles)[:n_cells].write_h5ad(path)
