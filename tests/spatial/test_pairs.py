from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stofm.spatial import NO_NEIGHBOR, NodeType, pair_distances

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = ["n1_v1", "n3_v2", "n20_v3", "n47_v2", "n48_v2"]


def dense(pairs):
    matrix = np.full((pairs.n_nodes, pairs.n_nodes), NO_NEIGHBOR, dtype=np.float32)
    matrix[pairs.rows, pairs.columns] = pairs.distances
    matrix[pairs.columns, pairs.rows] = pairs.distances
    matrix[0] = matrix[:, 0] = 0.0
    np.fill_diagonal(matrix, 0.0)
    return matrix


def assert_like(nodes, node_type, expected, *, skip=()):
    ours = dense(pair_distances(nodes, node_type, neighbors_among="all_nodes"))
    keep = np.ones(len(nodes), dtype=bool)
    keep[np.asarray(skip, dtype=int)] = False
    ours, expected = ours[np.ix_(keep, keep)], expected[np.ix_(keep, keep)]
    np.testing.assert_array_equal(ours == 0, expected == 0)
    np.testing.assert_array_equal(ours == NO_NEIGHBOR, expected == NO_NEIGHBOR)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_like_the_reference():
    golden = np.load(GOLDEN / "e_distances_small.npz")
    assert_like(golden["nodes"], golden["token_types"], golden["attn_bias"])


def test_medium_like_the_reference(shared):
    golden = np.load(shared / "golden" / "e_distances_medium.npz")
    assert_like(golden["nodes"], golden["token_types"], golden["attn_bias"])


@pytest.mark.parametrize("name", TINY)
def test_tiny_like_the_reference(name):
    golden = np.load(GOLDEN / "e_distances_tiny.npz")
    parts = (golden[f"{name}_{part}"] for part in ("nodes", "token_types", "attn_bias"))
    assert_like(*parts)


def test_coincident_like_the_reference_where_it_is_defined():
    golden = np.load(GOLDEN / "e_distances_coincident.npz")
    coincident = golden["coincident_pairs"]
    assert_like(
        golden["nodes"], golden["token_types"], golden["attn_bias"], skip=np.unique(coincident)
    )


def test_coincident_nodes_are_at_distance_0():
    golden = np.load(GOLDEN / "e_distances_coincident.npz")
    pairs = pair_distances(golden["nodes"], golden["token_types"])
    found = dict(
        zip(
            zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True),
            pairs.distances,
            strict=True,
        )
    )
    for i, j in golden["coincident_pairs"].tolist():
        if 0 not in (i, j):  # the slice token has no distances
            assert found[min(i, j), max(i, j)] == 0.0


def node_types(n_virtual, n_cells):
    kinds = [NodeType.SLICE] + [NodeType.VIRTUAL] * n_virtual + [NodeType.CELL] * n_cells
    return np.array(kinds, dtype=np.int8)


def plain_pairs(nodes, kinds, n_neighbors):
    """Pairs by a double loop: virtual with all, cells with their nearest cells, ties included."""
    full = np.linalg.norm(nodes[:, None] - nodes[None], axis=-1)
    cells = np.flatnonzero(kinds == NodeType.CELL)
    n_others = min(min(n_neighbors, len(nodes) - 1) - 1, len(cells) - 1)
    expected = set()
    for i in range(1, len(nodes)):
        for j in range(i + 1, len(nodes)):
            virtual = NodeType.VIRTUAL in (kinds[i], kinds[j])
            near = False
            for a, b in ((i, j), (j, i)):
                if kinds[a] == kinds[b] == NodeType.CELL and n_others > 0:
                    others = np.sort(full[a][cells[cells != a]])
                    near |= full[a, b] <= others[n_others - 1] * (1 + 1e-9)
            if virtual or near:
                expected.add((i, j))
    return expected


@pytest.mark.parametrize("kind", ["random", "lattice", "duplicates"])
def test_like_a_double_loop(rng, kind):
    cells = {
        "random": rng.normal(size=(41, 2)),
        "lattice": np.argwhere(np.ones((7, 6))).astype(float),
        "duplicates": rng.integers(0, 2, size=(43, 2)).astype(float),
    }[kind]
    nodes = np.vstack([np.zeros((1, 2)), rng.normal(size=(3, 2)), cells])
    kinds = node_types(3, len(cells))
    pairs = pair_distances(nodes, kinds, n_neighbors=9)
    found = set(zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True))
    assert found == plain_pairs(nodes, kinds, 9)
    offsets = nodes[pairs.rows] - nodes[pairs.columns]
    np.testing.assert_allclose(pairs.distances, np.linalg.norm(offsets, axis=1), rtol=1e-6)


def test_a_lattice_turned_has_the_same_pairs(rng):
    cells = np.argwhere(np.ones((15, 13))).astype(float)
    kinds = node_types(0, len(cells))
    turn = np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    straight, turned = (
        pair_distances(np.vstack([np.zeros((1, 2)), xy]), kinds, n_neighbors=20)
        for xy in (cells, cells @ turn + 31.0)
    )
    np.testing.assert_array_equal(straight.rows, turned.rows)
    np.testing.assert_array_equal(straight.columns, turned.columns)
    np.testing.assert_allclose(straight.distances, turned.distances, rtol=1e-6)


@pytest.mark.parametrize(("n_virtual", "n_cells", "n_pairs"), [(0, 1, 0), (1, 1, 1), (2, 1, 3)])
def test_hardly_any_nodes(n_virtual, n_cells, n_pairs, rng):
    kinds = node_types(n_virtual, n_cells)
    pairs = pair_distances(rng.normal(size=(len(kinds), 2)), kinds)
    assert len(pairs.rows) == n_pairs
