"""The plain side of each comparison: prepares, and returns the work to be timed (see ours.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import inputs
import numpy as np
import plain
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Work = Callable[[], Any]


def _batch(nodes: inputs.Nodes) -> plain.PlainBatch:
    distances = plain.plain_distances(nodes.coordinates, nodes.node_type)
    arrays = (nodes.features, distances, nodes.node_type, nodes.cell_index)
    return plain.PlainBatch(*(torch.from_numpy(array)[None] for array in arrays))


def make_se2_transformer() -> plain.PlainSE2Transformer:
    """SE(2) Transformer of full size with seeded weights."""
    torch.manual_seed(0)
    return plain.PlainSE2Transformer(**inputs.SE2_SIZES)


def se2_forward() -> Work:
    batch = _batch(inputs.make_nodes())
    model = make_se2_transformer().eval()

    def work() -> Any:
        with torch.no_grad():
            output = model(batch.features, batch.distances, batch.node_type)
        return output.last_hidden_state.numpy()

    return work


def se2_train_step() -> Work:
    nodes = inputs.make_nodes()
    batch = _batch(nodes)
    targets = inputs.make_targets(nodes, batch.distances[0].numpy())
    model = make_se2_transformer().train()
    heads = plain.PlainHeads()
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-4)

    def work() -> Any:
        optimizer.zero_grad()
        output = model(batch.features, batch.distances, batch.node_type)
        losses = heads(
            output.last_hidden_state[0, targets.cells],
            output.pair_rep[0, targets.rows, targets.columns],
            torch.from_numpy(targets.features),
            torch.from_numpy(targets.distances),
        )
        sum(losses).backward()
        optimizer.step()

    return work


def cell_encoder() -> Work:
    bert, projection = inputs.make_cell_encoder()
    encoded = inputs.make_token_lists()
    return lambda: plain.plain_encode_cells(bert, projection, encoded, cls=inputs.CLS).numpy()


def extraction() -> Work:
    xy, features = inputs.make_slice()

    def work() -> Any:
        normalized = plain.plain_normalize(xy)
        plain.plain_split(normalized, 1_000)
        return plain.plain_virtual_cells(normalized, features).labels

    return work


def tokenize() -> Work:
    counts = inputs.make_counts()
    ids = [f"gene{column}" for column in range(counts.matrix.shape[1])]
    known = np.flatnonzero(counts.token_ids >= 0)
    tokens = {ids[column]: counts.token_ids[column] for column in known}
    medians = {ids[column]: counts.medians[column] for column in known}

    def work() -> Any:
        encoded = plain.plain_tokens(counts.matrix, ids, tokens, medians)
        return lambda: np.concatenate([np.sort(cell) for cell in encoded])

    return work
