"""Principal components of expression that heads read."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

import stofm as st
from stofm._keys import Obsm
from stofm.heads import expression as module
from stofm.heads.blocks import Blocks
from stofm.heads.expression import (
    ExpressionComponents,
    add_expression,
    principal_axes,
    read_expression,
)
from stofm.heads.genes import Gene, GeneColumns
from stofm.heads.request import HeadOptions, Request, resolve_slices

N_GENES = 40
GENES = tuple(Gene(f"g{k}", "") for k in range(N_GENES))
QUIET = {"library_key": "library", "device": "cpu", "show_progress_bar": False}


@pytest.fixture
def counts(rng):
    """120 cells of three types; two cells without counts, a gene without any."""
    profiles = rng.gamma(0.6, 4.0, (3, N_GENES))
    made = rng.poisson(profiles[rng.integers(0, 3, 120)]).astype(np.float32)
    made[[17, 60]], made[:, 5] = 0.0, 0.0
    return made


@pytest.fixture
def components(counts):
    return ExpressionComponents.fit(sparse.csr_matrix(counts), GENES, 6)


def table(counts, names=None, **options):
    names = [gene.name for gene in GENES] if names is None else names
    return AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=names), **options)


def read(components, adata, vocabulary, layer=None):
    columns = GeneColumns.read(adata, vocabulary, must_map=False)
    return components.read(adata, columns, layer=layer)


def target_of(counts):
    """The total of the cell in the middle, to which counts are scaled."""
    totals = counts.sum(axis=1)
    return float(np.median(totals[totals > 0]))


def normalised(counts, target):
    totals = counts.sum(axis=1, keepdims=True, dtype=float)
    return np.log1p(target * counts / np.where(totals > 0, totals, 1.0))


def blocks_of(sections, use_rep=(Obsm.X,)):
    features = np.ones((sections.n_obs, 2), dtype=np.float32)
    return Blocks(features, use_rep, (2,), {rep: {} for rep in use_rep})


def add(
    data,
    rows=None,
    *,
    n_components=5,
    use_rep=(Obsm.X,),
    library_key=None,
    layer=None,
    classes=None,
):
    """Components of all cells, and how they are read."""
    sections = resolve_slices(data, library_key, spatial_key="")
    rows = np.arange(sections.n_obs) if rows is None else rows
    request = Request(layer=layer, options=HeadOptions(n_components=n_components))
    blocks = blocks_of(sections, use_rep)
    found, components = add_expression(sections, blocks, rows, request, classes)
    return components, found.expression


@pytest.mark.parametrize("n_components", [1, 7, 30])
def test_principal_axes(rng, n_components, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 37)
    values = rng.normal(size=(100, 12)) @ rng.normal(size=(12, 12)) + 3.0
    values[rng.random((100, 12)) < 0.4] = 0.0
    mean, axes, variances = principal_axes(sparse.csr_matrix(values), n_components)
    for one, other in zip(
        principal_axes(values, n_components), (mean, axes, variances), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-9)
    n_found = min(n_components, 12)
    assert axes.shape == (12, n_found)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    _, sizes, rows = np.linalg.svd(values - values.mean(axis=0))
    np.testing.assert_allclose(variances, (sizes**2 / 100)[:n_found], rtol=1e-8)
    signs = np.sign(rows[np.arange(12), np.abs(rows).argmax(axis=1)])
    np.testing.assert_allclose(axes, (rows * signs[:, None])[:n_found].T, atol=1e-7)


def test_as_computed_densely(counts, components, vocabulary):
    values = normalised(counts, target_of(counts))
    values[[17, 60]] = 0.0
    # More may be chosen than there are genes.
    np.testing.assert_array_equal(components.chosen, np.arange(N_GENES))
    np.testing.assert_allclose(components.shares, counts.sum(0) / counts.sum(), rtol=1e-6)
    np.testing.assert_allclose(components.mean, values.mean(axis=0), rtol=1e-5, atol=1e-7)
    _, sizes, rows = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(components.variances, sizes[:6] ** 2 / 120, rtol=1e-4)
    expected = (values - values.mean(axis=0)) @ rows[:6].T
    signs = np.sign(rows[np.arange(6), np.abs(rows[:6]).argmax(axis=1)])
    found = read(components, table(counts), vocabulary)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected * signs, atol=2e-3)


def test_genes_that_vary_most(counts, monkeypatch):
    monkeypatch.setattr(module, "_MOST_GENES", 9)
    found = ExpressionComponents.fit(sparse.csr_matrix(counts), GENES, 6)
    most = np.argsort(-normalised(counts, target_of(counts)).var(axis=0))[:9]
    np.testing.assert_array_equal(found.chosen, np.sort(most))
    assert (found.axes.shape, found.mean.shape) == ((9, 6), (9,))
    # Totals are of all genes.
    assert found.shares.shape == (N_GENES,)
    assert found.shares.sum() == pytest.approx(1.0)


def test_no_more_components_than_cells_tell(counts):
    # A gene without counts has no say.
    for n_cells, expected in ((4, 3), (120, 39)):
        made = ExpressionComponents.fit(sparse.csr_matrix(counts[:n_cells]), GENES, 50)
        assert made.axes.shape == (N_GENES, expected)
        assert np.isfinite(made.axes).all()
        assert made.variances.min() > 0


def test_cells_that_are_all_the_same(counts):
    for same in (np.zeros((9, N_GENES)), counts[:1]):
        with pytest.raises(ValueError, match=r"of 40 genes is the same in all \d labelled cells"):
            ExpressionComponents.fit(sparse.csr_matrix(same.astype(np.float32)), GENES, 5)


def test_order_of_genes(counts, components, vocabulary, rng):
    order = rng.permutation(N_GENES)
    moved = table(counts[:, order], [f"g{k}" for k in order])
    expected = read(components, table(counts), vocabulary)
    np.testing.assert_allclose(read(components, moved, vocabulary), expected, atol=1e-5)


def test_names_in_a_column_of_var(counts, components, vocabulary):
    adata = table(counts, [f"probe{k}" for k in range(N_GENES)])
    adata.var["symbol"] = [gene.name for gene in GENES]
    expected = read(components, table(counts), vocabulary)
    np.testing.assert_array_equal(read(components, adata, vocabulary), expected)


def test_genes_that_nobody_knows_do_not_count(counts, components, vocabulary):
    more = np.column_stack([np.full((120, 3), 500.0, dtype=np.float32), counts])
    adata = table(more, ["x", "y", "z", *(gene.name for gene in GENES)])
    expected = read(components, table(counts), vocabulary)
    np.testing.assert_allclose(read(components, adata, vocabulary), expected, atol=1e-5)


def test_columns_of_the_same_gene_are_summed(counts, components, vocabulary, rng):
    part = rng.binomial(counts[:, 3].astype(int), 0.4).astype(np.float32)
    names = [gene.name for gene in GENES]
    split = np.column_stack([counts, part])
    split[:, 3] -= part
    adata = table(split, [*names, "again"])
    adata.var["symbol"] = [*names, "g3"]
    expected = read(components, table(counts), vocabulary)
    np.testing.assert_allclose(read(components, adata, vocabulary), expected, atol=1e-5)


def test_missing_genes_leave_what_is_expected(counts, components, vocabulary):
    there = np.setdiff1d(np.arange(N_GENES), [2, 11, *range(20, 30)])
    adata = table(counts[:, there], [f"g{k}" for k in there])
    found = read(components, adata, vocabulary)
    # Cells have the same share of their counts in the genes that are there as the labelled cells.
    target = target_of(counts) * float(components.shares[there].sum())
    values = normalised(counts[:, there], target) - components.mean[there]
    # The mean of components given genes, both normal, the other way round.
    axes, variances = components.axes[there].astype(float), components.variances.astype(float)
    covariance = axes * variances @ axes.T + 0.1 * variances[-1] * np.eye(len(there))
    expected = values @ np.linalg.solve(covariance, axes * variances)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    plain = normalised(counts[:, there], target_of(counts)) - components.mean[there]
    assert np.abs(plain @ np.linalg.solve(covariance, axes * variances) - found).max() > 0.05
    # It is nearer to what all genes say than if the others were as in the mean cell.
    whole = read(components, table(counts), vocabulary)
    filled = values @ components.axes[there]
    assert ((found - whole) ** 2).sum() < 0.8 * ((filled - whole) ** 2).sum()


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_too_few_genes(counts, components, vocabulary, caplog):
    # What counts is what the genes make up, and not how many there are.
    weight = (components.axes**2) @ components.variances
    order = np.argsort(weight)
    few = order[np.cumsum(weight[order]) < 0.1 * weight.sum()]
    assert len(few) > 1
    adata = table(counts[:, few], [f"g{k}" for k in few])
    assert read(components, adata, vocabulary) is None
    told = f"{len(few)} of the 40 genes whose expression the head reads are there, too few"
    assert told in caplog.text
    caplog.clear()
    enough = order[-len(few) :]
    adata = table(counts[:, enough], [f"g{k}" for k in enough])
    assert read(components, adata, vocabulary) is not None
    assert not caplog.text


def test_cells_without_counts(counts, components, vocabulary):
    found = read(components, table(counts), vocabulary)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[17], -components.mean @ components.axes, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found[17], found[60])


def test_blocks_layers_and_kinds_of_matrices(counts, components, vocabulary, tmp_path, monkeypatch):
    expected = read(components, table(counts), vocabulary)
    dense = table(counts)
    dense.X, dense.layers["counts"] = normalised(counts, 1e4), counts
    np.testing.assert_array_equal(read(components, dense, vocabulary, "counts"), expected)
    with pytest.raises(ValueError, match="raw counts"):
        read(components, dense, vocabulary)
    table(counts).write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    monkeypatch.setattr("stofm._edge.counts._BLOCK_ENTRIES", 50 * N_GENES)
    np.testing.assert_allclose(read(components, backed, vocabulary), expected, atol=1e-5)
    backed.file.close()


def test_slices_are_centred_if_they_were_for_fitting(components, rng):
    scores = rng.normal(size=(90, 6)).astype(np.float32) + 3.0
    slices = [np.arange(0, 70, 2), np.arange(1, 70, 2), np.arange(70, 89), np.array([89])]
    np.testing.assert_array_equal(components.centered(scores, slices), scores)
    # Cells without components have no say in the mean.
    scores[4] = np.nan
    before, by_slice = scores.copy(), replace(components, by_slice=True)
    found = by_slice.centered(scores, slices)
    for rows in slices[:2]:
        mean = np.nanmean(scores[rows], axis=0)
        np.testing.assert_allclose(found[rows], scores[rows] - mean, atol=1e-5)
    # The mean of fewer than 20 cells says nothing.
    np.testing.assert_array_equal(found[70:], scores[70:])
    np.testing.assert_array_equal(scores, before)
    order = rng.permutation(90)
    places = [np.argsort(order)[rows] for rows in slices]
    np.testing.assert_array_equal(by_slice.centered(scores[order], places), found[order])


def test_labelled_slices_that_differ(counts, vocabulary):
    # The genes of each type are another one's: nothing of the mean is left.
    other = (counts[:, ::-1] + 30 * (np.arange(N_GENES) < 20)).astype(np.float32)
    data = [table(counts), table(other)]
    components, scores = add(data)
    assert components.by_slice
    for own in (scores[:120], scores[120:]):
        np.testing.assert_allclose(own.mean(axis=0), 0.0, atol=1e-3)
    again = ExpressionComponents.of(components.entries, components.arrays)
    sections = resolve_slices(data)
    found = read_expression(again, sections, blocks_of(sections), None).expression
    np.testing.assert_array_equal(found, scores)
    # Few cells say nothing about a slice.
    components, scores = add(data, np.arange(139))
    assert not components.by_slice
    np.testing.assert_array_equal(scores[:120], read(components, data[0], vocabulary))


def test_slices_of_other_classes_are_not_centred(counts, vocabulary):
    """What differs is what the slices are made of."""
    axes = ExpressionComponents.fit(sparse.csr_matrix(counts), GENES, 1)
    side = read(axes, table(counts), vocabulary)[:, 0] > 0
    data, classes = [table(counts[side]), table(counts[~side])], np.sort(~side).astype(np.int64)
    assert add(data)[0].by_slice
    assert not add(data, classes=classes)[0].by_slice


def test_arrays_are_exact(counts, components, vocabulary):
    again = ExpressionComponents.of(components.entries, components.arrays)
    assert (again.genes, again.by_slice) == (components.genes, False)
    np.testing.assert_array_equal(
        read(again, table(counts), vocabulary), read(components, table(counts), vocabulary)
    )


def test_labelled_cells_alone_are_fitted(counts, vocabulary, rng):
    rows = rng.permutation(120)[:70]
    components, scores = add(table(counts), rows)
    expected = ExpressionComponents.fit(sparse.csr_matrix(counts[rows]), GENES, 5)
    np.testing.assert_array_equal(components.axes, expected.axes)
    np.testing.assert_array_equal(scores, read(expected, table(counts), vocabulary))


def test_several_tables(counts, rng):
    """The same cells in one table, and in two, in another order of genes."""
    rows = rng.permutation(120)[:90]
    whole, scores = add(table(counts), rows)
    order = rng.permutation(N_GENES)
    second = table(counts[70:][:, order], [f"g{k}" for k in order])
    apart, found = add([table(counts[:70]), second], rows)
    assert apart.genes == whole.genes
    np.testing.assert_array_equal(apart.axes, whole.axes)
    np.testing.assert_array_equal(apart.mean, whole.mean)
    np.testing.assert_allclose(found, scores, atol=1e-5)


def test_another_order_of_rows(counts, rng):
    rows, order = rng.permutation(120)[:90], rng.permutation(120)
    first, scores = add(table(counts), rows)
    # The same cells in the same order, which are elsewhere in the file.
    again, moved = add(table(counts[order]), np.argsort(order)[rows])
    np.testing.assert_array_equal(again.axes, first.axes)
    np.testing.assert_array_equal(moved, scores[order])


def test_shared_genes_are_read(counts):
    parts = [
        table(counts[:60, :30], [f"g{k}" for k in range(30)]),
        table(counts[60:, 10:], [f"g{k}" for k in range(10, 40)]),
    ]
    components, scores = add(parts)
    assert components.genes == GENES[10:30]
    assert scores.shape == (120, 5)
    expected = ExpressionComponents.fit(sparse.csr_matrix(counts[:, 10:30]), GENES[10:30], 5)
    np.testing.assert_array_equal(components.axes, expected.axes)


def test_many_cells_are_thinned_out(counts, rng, monkeypatch):
    rows = rng.permutation(120)[:100]
    monkeypatch.setattr(module, "_MOST_CELLS", 45)
    thin, scores = add(table(counts), rows)
    expected = ExpressionComponents.fit(sparse.csr_matrix(counts[rows[::3]]), GENES, 5)
    np.testing.assert_array_equal(thin.axes, expected.axes)
    assert len(scores) == 120


@pytest.mark.parametrize(
    ("n_components", "use_rep", "expected"),
    [
        (None, (Obsm.X_CELL, Obsm.X), 71),
        (None, (Obsm.X, "X_pca"), 0),
        (None, ("X_pca",), 0),
        (7, ("X_pca",), 7),
        (0, (Obsm.X,), 0),
    ],
)
def test_number_of_components(adata, n_components, use_rep, expected):
    found = add(adata, n_components=n_components, use_rep=use_rep, library_key="library")
    if expected:
        assert found[1].shape == (184, expected)
    else:
        assert found == (None, None)


@pytest.fixture
def pair(adata):
    return [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]


def take_away(adata, lack):
    """The table without what components are read from, and what a message says of it."""
    if lack == "genes":
        return adata[:, :2].copy(), "2 of the 71 genes"
    if lack == "names":
        adata.var_names = [f"strange{k}" for k in range(71)]
        return adata, "share no gene|too few"
    adata.X = adata.X * 0.37 if lack == "raw counts" else None
    return adata, {"raw counts": "raw counts", "a matrix": "is empty"}[lack]


@pytest.mark.parametrize("lack", ["raw counts", "names", "a matrix"])
@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_labelled_cells_without(pair, caplog, lack):
    pair[1], told = take_away(pair[1], lack)
    assert add(pair, n_components=None) == (None, None)
    assert "184 cells are judged without their expression" in caplog.text
    with pytest.raises(ValueError, match=told):
        add(pair)
    # Tables without labelled cells have no say.
    components, scores = add(pair, np.arange(101))
    expected = add(pair[0])
    np.testing.assert_array_equal(components.axes, expected[0].axes)
    np.testing.assert_array_equal(scores[:101], expected[1])
    assert np.isnan(scores[101:]).all()


@pytest.mark.parametrize("lack", ["raw counts", "genes", "names", "a matrix"])
@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_a_table_of_a_query_without(pair, caplog, lack):
    components, expected = add(pair)
    pair[1], _ = take_away(pair[1], lack)
    sections = resolve_slices(pair)
    found = read_expression(components, sections, blocks_of(sections), None).expression
    assert "without their expression" in caplog.text
    np.testing.assert_array_equal(found[:101], expected[:101])
    assert np.isnan(found[101:]).all()


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_layers(adata, model, caplog):
    components, expected = add(adata, library_key="library")
    adata.layers["raw"], adata.X = adata.X.copy(), adata.X * 0.37
    sections = resolve_slices(adata, "library")

    def again(layer=None):
        return read_expression(components, sections, blocks_of(sections), layer).expression

    np.testing.assert_array_equal(again("raw"), expected)
    np.testing.assert_array_equal(add(adata, library_key="library", layer="raw")[1], expected)
    # Without a name it is the one that was embedded.
    st.tl.embed(adata, model, layer="raw", **QUIET)
    np.testing.assert_array_equal(again(), expected)
    np.testing.assert_array_equal(add(adata, library_key="library")[1], expected)
    assert "without their expression" not in caplog.text
    del adata.layers["raw"]
    assert np.isnan(again()).all()
    assert "There is no layer 'raw'" in caplog.text
    with pytest.raises(KeyError, match="There is no layer 'raw'"):
        add(adata, library_key="library")
