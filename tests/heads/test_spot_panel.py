from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

import stofm as st
from stofm._edge.tokens import read_tokens
from stofm.heads.options import Reading
from stofm.heads.spot_panel import (
    SpotPanel,
    component_loadings,
    genes_of,
    read_panel_counts,
)
from stofm.heads.targets import log_normalised
from stofm.nn import encode_cells

READING = Reading(device="cpu", show_progress_bar=False)
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture
def panel(adata, model):
    """Every second gene that the vocabulary and the slices have."""
    genes = genes_of(adata, model, "the query")
    return np.unique(genes[genes >= 0])[::2]


def test_genes_are_found_by_any_name(adata, model):
    genes = genes_of(adata, model, "the query")
    assert (genes[-4:] == -1).all()
    np.testing.assert_array_equal(genes[:-4], np.arange(67))
    adata.var_names = [f"GENE{k}" for k in range(1, 72)]
    np.testing.assert_array_equal(genes_of(adata, model, "the query"), genes)


def test_counts_over_a_panel(adata, model, panel):
    genes = genes_of(adata, model, "the query")
    # The second column becomes the first one's gene; a gene of the panel is not in the slices.
    genes[1], genes[2] = genes[0], -1
    counts = read_panel_counts(adata, genes, panel, None).toarray()
    dense = adata.X.toarray()
    expected = np.stack([dense[:, genes == place].sum(axis=1) for place in panel], axis=1)
    np.testing.assert_array_equal(counts, expected)
    assert (expected[:, 1] == 0).all()
    np.testing.assert_array_equal(expected[:, 0], dense[:, 0] + dense[:, 1])


def test_features_are_those_of_the_cell_encoder(adata, model, panel):
    own = adata[:, panel].copy()
    counts = read_panel_counts(adata, genes_of(adata, model, "the query"), panel, None)
    spots = SpotPanel(model.vocabulary.gene_ids[panel], np.zeros((len(panel), 0), "f4"), 1.0)
    st.pp.tokenize(own, model, show_progress_bar=False)
    ranked = read_tokens(own, model)
    expected = encode_cells(model.cell_encoder, ranked, model.vocabulary, **CPU)
    np.testing.assert_allclose(spots.features(counts, model, READING), expected, atol=1e-6)


def test_components_stand_beside(adata, model, panel, rng):
    counts = read_panel_counts(adata, genes_of(adata, model, "the query"), panel, None)
    loadings = rng.normal(size=(len(panel), 3)).astype(np.float32)
    features = SpotPanel(model.vocabulary.gene_ids[panel], loadings, 50.0).features(
        counts, model, READING
    )
    dense = counts.toarray()
    logs = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 50.0)
    assert features.shape == (adata.n_obs, model.config.cell_encoder.d_cell + 3)
    np.testing.assert_allclose(features[:, -3:], logs @ loadings, rtol=1e-4, atol=1e-4)


def test_a_spot_without_counts_is_normalised_to_nothing():
    counts = sparse.csr_matrix([[0, 0], [3, 1]])
    np.testing.assert_allclose(
        log_normalised(counts, target_sum=4.0).toarray(), np.log1p([[0, 0], [3, 1]])
    )


def test_components_are_those_of_the_covariance(rng):
    counts = sparse.csr_matrix(rng.poisson(3.0, (200, 12)))
    loadings = component_loadings(counts, rng.random((3, 12)), target_sum=30.0, n_components=4)
    logs = log_normalised(counts, target_sum=30.0).toarray()
    scores = (logs - logs.mean(axis=0)) @ loadings
    values = np.linalg.svd(logs - logs.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose((scores**2).sum(axis=0), values[:4] ** 2, rtol=1e-3)
    assert (loadings[np.abs(loadings).argmax(axis=0), range(4)] > 0).all()


def test_components_are_made_of_genes_that_differ_between_types(rng, monkeypatch):
    monkeypatch.setattr("stofm.heads.spot_panel._MAX_GENES", 3)
    means = np.full((2, 90), 5.0)
    means[0, [1, 40, 88]] = 20.0
    counts = sparse.csr_matrix(rng.poisson(3.0, (50, 90)))
    loadings = component_loadings(counts, means, target_sum=300.0, n_components=50)
    assert loadings.shape == (90, 3)
    assert np.flatnonzero(loadings.any(axis=1)).tolist() == [1, 40, 88]
