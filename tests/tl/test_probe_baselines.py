from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from stofm.heads.sections import resolve_slices
from stofm.tl import _probe_baselines
from stofm.tl._probe_baselines import (
    log_counts,
    most_variable,
    principal_components,
    with_neighbors,
)


@pytest.fixture
def slices(adata):
    """A slice, and one with fewer genes in another order."""
    left, right = (adata[adata.obs["library"] == name].copy() for name in ("left", "right"))
    return [left, right[:, ::-1][:, 5:].copy()]


def expected_values(adata, genes):
    counts = adata.X.toarray().astype(float)
    # All genes of a cell count, those that other slices lack too.
    scaled = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    return scaled[:, [adata.var_names.get_loc(name) for name in genes]]


def test_counts_and_components_are_those_of_shared_genes(slices):
    from sklearn.decomposition import PCA

    genes = [name for name in slices[0].var_names if name in set(slices[1].var_names)]
    expected = np.vstack([expected_values(one, genes) for one in slices])
    values = log_counts(resolve_slices(slices))
    assert_allclose(values.toarray(), expected, atol=1e-5)
    found = principal_components(values)
    assert found.shape == (184, 50)
    scores = PCA(50, svd_solver="full").fit_transform(expected)
    assert_allclose(np.abs(found)[:, :40], np.abs(scores)[:, :40], atol=1e-3)


def test_dense_counts_and_those_of_a_layer_are_the_same(slices):
    expected = log_counts(resolve_slices(slices)).toarray()
    slices[0].X = slices[0].X.toarray()
    assert_allclose(log_counts(resolve_slices(slices)).toarray(), expected, atol=1e-6)
    for one in slices:
        one.layers["raw"] = one.X
        one.X = one.X * 0.5
    found = log_counts(resolve_slices(slices), layer="raw")
    assert_allclose(found.toarray(), expected, atol=1e-6)


def test_slices_without_common_genes_are_refused(slices):
    slices[1].var_names = [f"other{k}" for k in range(slices[1].n_vars)]
    with pytest.raises(ValueError, match="share no gene"):
        log_counts(resolve_slices(slices))
    single = slices[0][:, :1].copy()
    with pytest.raises(ValueError, match=r"a single gene in common, 'ENSG00000000001'"):
        log_counts(resolve_slices(single))


def test_of_many_genes_the_most_variable_are_taken(slices, monkeypatch):
    monkeypatch.setattr(_probe_baselines, "_MOST_GENES", 6)
    values = log_counts(resolve_slices(slices[0]))
    best = np.sort(np.argsort(-values.toarray().var(axis=0))[:6])
    assert_allclose(most_variable(values).toarray(), values.toarray()[:, best])


def test_neighbours_are_of_the_same_slice(slices, rng):
    sections = resolve_slices(slices)
    components = rng.normal(size=(184, 3)).astype(np.float32)
    found = with_neighbors(components, sections, spatial_key="spatial")
    assert found.shape == (184, 6)
    means = np.empty((184, 3))
    for rows, one in zip(sections.slices.rows, slices, strict=True):
        xy = one.obsm["spatial"]
        for cell, place in enumerate(xy):
            near = np.argsort(np.linalg.norm(xy - place, axis=1))[1:11]
            means[rows[cell]] = components[rows[near]].mean(axis=0)
    assert_allclose(found[:, 3:] * np.sqrt(means.var(axis=0).mean()), means, atol=1e-4)
