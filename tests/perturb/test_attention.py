from __future__ import annotations

import tracemalloc

import numpy as np
import torch

from stofm.corpus.reader import take_cells
from stofm.genes import RankedTokens
from stofm.nn import SubSliceBatch
from stofm.perturb import UneditedSlice
from stofm.perturb.masking import attend
from stofm.spatial import build_subslice


def test_it_is_the_softmax_of_the_last_layers_logits(whole) -> None:
    found = attend(whole, top=7)
    weights = found.weights.toarray()
    for cells in whole.parts:
        nodes = build_subslice(whole.layout, whole.features, cells, whole.rules)
        with torch.inference_mode():
            pairs = whole.transformer(SubSliceBatch.from_subslices([nodes])).pairs
        n, first = nodes.n_nodes, nodes.n_nodes - len(cells)
        where = torch.meshgrid(*[torch.arange(n)] * 2, indexing="ij")
        logits = pairs.at(torch.zeros(n * n, dtype=torch.int64), *(one.ravel() for one in where))
        shares = torch.softmax(logits.view(n, n, -1), dim=1).mean(-1).numpy()
        shares = shares / (1 - shares[:, :1])
        own = shares[first:, first:].copy()
        np.testing.assert_allclose(
            found.to_virtual[cells], shares[first:, 1:first].sum(axis=1), rtol=1e-4
        )
        np.fill_diagonal(own, 0.0)
        least = np.sort(own, axis=1)[:, [-7]]
        np.testing.assert_allclose(
            weights[np.ix_(cells, cells)], np.where(own >= least, own, 0.0), rtol=1e-4, atol=1e-7
        )
    assert found.weights.nnz == 7 * whole.n_cells


def test_all_shares_sum_to_one_but_for_the_cells_own(whole) -> None:
    found = attend(whole, top=1000)
    total = found.weights.sum(axis=1) + found.to_virtual
    assert (total < 1.0).all()
    assert (total > 0.5).all()
    crossing = whole.layout.subslice[:, None] != whole.layout.subslice
    assert not found.weights.toarray()[crossing].any()


def test_other_partitions_bring_pairs_together_and_are_averaged(whole) -> None:
    once, several = attend(whole, top=1000), attend(whole, top=1000, n_shifted=3)
    crossing = whole.layout.subslice[:, None] != whole.layout.subslice
    weights = several.weights.toarray()
    assert weights[crossing].any()
    assert (weights[once.weights.toarray() > 0] > 0).all()
    assert np.diff(attend(whole, top=4, n_shifted=3).weights.indptr).max() == 4


def test_nothing_is_as_large_as_all_pairs_of_cells(model, rng) -> None:
    n = 5003
    lists = RankedTokens(
        rng.integers(2, 69, 3 * n).astype(np.int32), np.arange(0, 3 * n + 1, 3, dtype=np.int64)
    )
    coordinates = rng.random((n, 2)) * 900.0
    whole = UneditedSlice.of(model, lists, coordinates, device=torch.device("cpu"))
    tracemalloc.start()
    found = attend(whole, top=5, n_shifted=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.diff(found.weights.indptr).max() == 5
    assert peak < n**2 / 2


def test_a_single_cell_attends_to_nobody(model, ranked, coordinates) -> None:
    one = UneditedSlice.of(
        model, take_cells(ranked, np.array([3])), coordinates[:1], device=torch.device("cpu")
    )
    assert attend(one, top=5).weights.nnz == 0
