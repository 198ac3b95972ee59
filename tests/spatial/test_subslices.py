from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score

from stofm.spatial import (
    NO_NEIGHBOR,
    NodeType,
    SubSliceConfig,
    build_subslice,
    lay_out_slice,
    pair_distances,
    rows_by_subslice,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = ["n1_v1", "n3_v2", "n20_v3", "n47_v2", "n48_v2"]


@pytest.fixture
def slice_(rng):
    xy = rng.random((501, 2)) * [300.0, 200.0]
    features = rng.normal(size=(501, 6)).astype(np.float32)
    features[:, 0] += xy[:, 0] / 30
    return xy, features


def test_whole_slice_like_the_reference():
    golden = np.load(GOLDEN / "i_end_to_end.npz")
    config = replace(
        SubSliceConfig.reference(),
        n_cells=int(golden["split_num"]),
        position_weight=float(golden["alpha"]),
        leiden_resolution=float(golden["leiden_res"]),
    )
    layout = lay_out_slice(golden["xy"], golden["features"], config)
    offsets = golden["split_offsets"]
    for k, rows in enumerate(rows_by_subslice(layout)):
        np.testing.assert_array_equal(rows, golden["split_flat"][offsets[k] : offsets[k + 1]])
    assert adjusted_rand_score(layout.virtual_cell, golden["cluster_labels"]) == 1.0
    np.testing.assert_allclose(layout.virtual.coordinates, golden["virtual_nodes"], atol=1e-5)
    np.testing.assert_allclose(layout.virtual.features, golden["virtual_features"], atol=1e-5)


@pytest.mark.parametrize("mixing", ["sum", "concatenate"])
def test_order_of_rows_does_not_matter(slice_, rng, mixing):
    xy, features = slice_
    config = SubSliceConfig(n_cells=100, mixing=mixing)
    shuffled = rng.permutation(len(xy))
    first = lay_out_slice(xy, features, config)
    second = lay_out_slice(xy[shuffled], features[shuffled], config)
    np.testing.assert_array_equal(first.subslice[shuffled], second.subslice)
    np.testing.assert_array_equal(first.virtual_cell[shuffled], second.virtual_cell)
    np.testing.assert_allclose(first.virtual.features, second.virtual.features, atol=1e-6)


def test_every_cell_in_one_subslice_and_all_virtual_cells_in_each(slice_):
    xy, features = slice_
    config = SubSliceConfig(n_cells=100)
    layout = lay_out_slice(xy, features, config)
    assert layout.n_subslices == 6
    seen = []
    for rows in rows_by_subslice(layout):
        subslice = build_subslice(layout, features, rows, config)
        n_virtual = layout.virtual.n_virtual
        assert subslice.node_type[0] == NodeType.SLICE
        assert (subslice.node_type[1 : 1 + n_virtual] == NodeType.VIRTUAL).all()
        assert (subslice.node_type[1 + n_virtual :] == NodeType.CELL).all()
        assert not subslice.features[0].any()
        np.testing.assert_array_equal(subslice.features[1 : 1 + n_virtual], layout.virtual.features)
        cells = subslice.cell_index[1 + n_virtual :]
        np.testing.assert_array_equal(subslice.features[1 + n_virtual :], features[cells])
        np.testing.assert_array_equal(
            subslice.coordinates[1 + n_virtual :], layout.coordinates[cells]
        )
        seen.append(cells)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(len(xy)))


@pytest.mark.parametrize(
    "config", [SubSliceConfig(n_cells=4), replace(SubSliceConfig.reference(), n_cells=4)]
)
@pytest.mark.parametrize("kind", ["one cell", "two cells", "one place", "line", "lattice"])
def test_degenerate_slices(config, kind, rng):
    xy = {
        "one cell": np.array([[3.0, 4.0]]),
        "two cells": np.array([[3.0, 4.0], [5.0, 4.0]]),
        "one place": np.ones((13, 2)),
        "line": np.column_stack([np.zeros(17), np.arange(17.0)]),
        "lattice": np.argwhere(np.ones((5, 5))).astype(float),
    }[kind]
    features = rng.normal(size=(len(xy), 3)).astype(np.float32)
    layout = lay_out_slice(xy, features, config)
    assert np.isfinite(layout.coordinates).all()
    parts = rows_by_subslice(layout)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(xy)))
    assert np.isfinite(layout.virtual.features).all()
    assert set(layout.virtual_cell) == set(range(layout.virtual.n_virtual))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_cells": 0}, "n_cells must be at least 1, found 0"),
        ({"partition": "hexagons"}, "partition must be one of .*found 'hexagons'"),
        ({"position_weight": 1.5}, "between 0 and 1, found 1.5"),
        ({"leiden_resolution": 0.0}, "must be positive"),
        ({"mixing": "sum", "n_components": 3}, "mixing='sum' needs n_components=2, found 3"),
        ({"max_virtual_cells": 0}, "max_virtual_cells must be at least 1"),
    ],
)
def test_bad_rules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SubSliceConfig(**options)


def test_mismatched_rows_are_refused():
    with pytest.raises(ValueError, match="3 coordinates and 2 rows"):
        lay_out_slice(np.zeros((3, 2)), np.zeros((2, 4)), SubSliceConfig())


def test_distances_in_spacings_are_those_of_a_part_and_of_a_scaled_slice(slice_):
    xy, features = slice_
    rules = SubSliceConfig(n_cells=100, unit="spacing")
    layout = lay_out_slice(xy, features, rules)
    rows = rows_by_subslice(layout)[2]
    whole = build_subslice(layout, features, rows, rules)
    scaled = build_subslice(lay_out_slice(xy * 3, features, rules), features, rows, rules)
    np.testing.assert_allclose(whole.pairs.distances, scaled.pairs.distances, rtol=1e-5)
    alone = lay_out_slice(xy[rows], features[rows], rules)
    part = build_subslice(alone, features[rows], np.arange(len(rows)), rules)

    def between_cells(one):
        is_cell = one.node_type == NodeType.CELL
        both = is_cell[one.pairs.rows] & is_cell[one.pairs.columns]
        return np.sort(one.pairs.distances[both])

    np.testing.assert_allclose(between_cells(whole), between_cells(part), rtol=1e-4)
    places = whole.coordinates[whole.node_type == NodeType.CELL]
    assert np.median(np.sort(cdist(places, places))[:, 6]) == pytest.approx(1)


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
