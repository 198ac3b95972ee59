"""Counts of some genes out of an AnnData."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from stofm._keys import Obsm
from stofm.heads.gene_columns import GeneColumns
from stofm.heads.sections import resolve_slices
from stofm.heads.targets import expression_targets, log_normalised, on_panel


@pytest.fixture
def columns(adata, vocabulary):
    """The columns of the fixture."""
    return GeneColumns.read(adata, vocabulary)


@pytest.fixture
def panel(adata, columns):
    """The first 30 genes alone, and counts of the next three."""
    return on_panel(
        adata,
        columns,
        columns.genes[:30],
        columns.genes[30:33],
        layer=None,
        kept_obsm=[Obsm.SPATIAL, "absent"],
    )


def targets_of(panel):
    """Targets of one table."""
    bare, counts = panel
    return expression_targets(resolve_slices(bare), [counts])


def test_nothing_but_the_inputs_and_places_is_kept(adata, panel):
    bare, counts = panel
    assert np.array_equal(bare.X.toarray(), adata.X[:, :30].toarray())
    assert np.array_equal(counts.toarray(), adata.X[:, 30:33].toarray())
    assert bare.obs_names.equals(adata.obs_names)
    assert list(bare.obsm) == [Obsm.SPATIAL]
    assert bare.obs.empty
    assert not bare.uns
    assert not bare.layers


@pytest.mark.parametrize("form", [sparse.csc_matrix, np.asarray, sparse.csr_array])
def test_any_matrix_and_layer(adata, columns, panel, form):
    dense = adata.X.toarray()
    adata.layers["raw"] = dense if form is np.asarray else form(dense)
    adata.X = dense / 3
    bare, counts = on_panel(
        adata, columns, columns.genes[:30], columns.genes[30:33], layer="raw", kept_obsm=[]
    )
    assert (bare.X != panel[0].X).nnz == 0
    assert (counts != panel[1]).nnz == 0


def test_expression_is_normalised_by_the_total_of_the_inputs(adata, panel):
    dense = adata.X.toarray().astype(float)
    expected = np.log1p(1e4 * dense[:, 30:33] / dense[:, :30].sum(axis=1, keepdims=True))
    targets = targets_of(panel)
    assert sparse.issparse(targets.values)
    assert np.allclose(targets.values.toarray(), expected, atol=1e-5)


def test_targets_are_standardised_by_gene(panel, rng):
    targets = targets_of(panel)
    rows = np.sort(rng.permutation(len(targets))[:120])
    taken = targets.standardised(rows).take(rows).numpy()
    assert taken.dtype == np.float32
    assert np.allclose(taken.mean(axis=0), 0, atol=1e-5)
    assert np.allclose(taken.std(axis=0), 1, atol=1e-5)


def test_constant_genes(panel):
    bare, counts = panel
    counts = counts.tolil()
    counts[:, 1] = 0
    targets = targets_of((bare, counts.tocsr()))
    every = np.arange(len(targets))
    assert targets.is_constant(every).tolist() == [False, True, False]
    assert targets.standardised(every).scale[1] == 1.0
    assert np.array_equal(targets.standardised(every).take(every)[:, 1], np.zeros(len(every)))


def test_cells_without_counts_are_unknown(adata, columns):
    dense = adata.X.toarray()
    dense[7, :30] = 0
    empty = AnnData(dense, var=adata.var, obsm={Obsm.SPATIAL: adata.obsm[Obsm.SPATIAL]})
    bare, counts = on_panel(
        empty, columns, columns.genes[:30], columns.genes[30:33], layer=None, kept_obsm=["spatial"]
    )
    targets = expression_targets(resolve_slices(bare), [counts])
    assert np.flatnonzero(~targets.is_known).tolist() == [7]
    assert targets.values[7].nnz == 0 or not targets.values[7].toarray().any()


def test_log_normalised_values():
    counts = sparse.csr_matrix(np.array([[3.0, 0.0], [1.0, 1.0]]))
    found = log_normalised(counts, np.array([30.0, 0.0])).toarray()
    assert np.allclose(found, [[np.log1p(1000.0), 0.0], [0.0, 0.0]])
