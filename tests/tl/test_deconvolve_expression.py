"""Deconvolution by networks that read embeddings and by ones that read expression."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import stofm as st
from stofm._keys import Obsm
from stofm.heads.network import HeadTraining
from stofm.heads.options import Reading
from stofm.heads.sections import resolve_slices

KEY, STD = Obsm.DECONVOLUTION, Obsm.DECONVOLUTION_STD
TYPES = ["astro", "micro", "oligo"]
QUIET = {"device": "cpu", "show_progress_bar": False}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Fit networks in a moment."""
    short = HeadTraining(learning_rate=5e-3, max_epochs=8, patience=3)
    monkeypatch.setattr(
        "stofm.heads.network.HeadTraining", lambda **own: HeadTraining(**own) if own else short
    )


@pytest.fixture
def spots(rng, vocabulary, model):
    """100 spots in the plane, of 67 genes of three types, with embeddings."""
    profiles = rng.gamma(0.3, 6.0, (3, 67))
    shares = rng.dirichlet(np.full(3, 0.5), 100)
    names = [f"s{k}" for k in range(100)]
    made = ad.AnnData(
        sparse.csr_matrix(rng.poisson(shares @ profiles * 4).astype(np.float32)),
        obs=pd.DataFrame(index=names),
        var=pd.DataFrame(index=vocabulary.gene_ids),
        obsm={
            "spatial": rng.random((100, 2)) * 100,
            "truth": pd.DataFrame(shares, index=names, columns=TYPES),
        },
    )
    st.tl.embed(made, model, **QUIET)
    return made


def fit(data, **options):
    options = {"proportions_key": "truth", "n_heads": 2, **options}
    return st.tl.deconvolve(data, **options, **QUIET)


def apply(data, head, **options):
    return st.tl.deconvolve(data, head=head, copy=True, **options, **QUIET)


def test_expression_has_a_vote(spots, tmp_path):
    head = fit(spots)
    assert head.reads.count("embedding") == 2
    assert "expression" in head.reads
    assert head.expression.axes.shape == (67, 67)
    made = apply(spots, head)
    assert st.metrics.pearson(spots.obsm["truth"], made.obsm[KEY]).min() > 0.85
    np.testing.assert_allclose(made.obsm[KEY].sum(axis=1), 1.0, rtol=1e-9)
    assert made.obsm[KEY].to_numpy().min() >= 0.0
    head.save(tmp_path / "head")
    again = apply(spots, st.tl.DeconvolutionHead.load(tmp_path / "head"))
    for key in (KEY, STD):
        pd.testing.assert_frame_equal(again.obsm[key], made.obsm[key], check_exact=True)


def test_columns_of_each_representation_share_a_scale(spots, scales_of):
    spots.obsm[Obsm.X] = 100 * spots.obsm[Obsm.X]
    head = fit(spots, n_neighbors=0)
    widths = [spots.obsm[key].shape[1] for key in (Obsm.X_CELL, Obsm.X)]
    cell, spatial = scales_of(head.networks[0], widths)
    assert spatial > 10 * cell
    for network, reads in zip(head.networks, head.reads, strict=True):
        if reads == "expression":
            scales_of(network, (67,))


def test_mean_and_spread_are_by_weight(spots):
    head = fit(spots, n_components=6)
    sections = resolve_slices(spots)
    inputs = head.read(sections, None, Reading(**QUIET))
    votes = np.stack(
        [
            st.train.apply_head(network, inputs.of(source), "proportions").astype(float)
            for network, source in zip(head.networks, head.reads, strict=True)
        ]
    )
    mean = np.average(votes, axis=0, weights=head.weights)
    spread = np.sqrt(np.average((votes - mean) ** 2, axis=0, weights=head.weights))
    made = apply(spots, head)
    np.testing.assert_allclose(made.obsm[KEY], mean, atol=1e-6)
    np.testing.assert_allclose(made.obsm[STD], spread, atol=1e-5)


def test_embeddings_alone(spots):
    head = fit(spots, n_components=0, n_neighbors=0)
    assert (head.expression, head.reads) == (None, ("embedding",) * 2)
    expected = apply(spots, head).obsm[KEY]
    spots.X = None
    pd.testing.assert_frame_equal(apply(spots, head).obsm[KEY], expected, check_exact=True)


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_without_raw_counts(spots, caplog):
    head = fit(spots, n_neighbors=0)
    spots.X = spots.X * 0.37
    made = apply(spots, head)
    assert "are judged without their expression" in caplog.text
    features = np.hstack([spots.obsm[Obsm.X_CELL], spots.obsm[Obsm.X]])
    own = [
        st.train.apply_head(network, features, "proportions")
        for network, source in zip(head.networks, head.reads, strict=True)
        if source == "embedding"
    ]
    np.testing.assert_allclose(made.obsm[KEY], np.mean(own, axis=0), atol=1e-6)
    assert fit(spots).expression is None
    with pytest.raises(ValueError, match="raw counts"):
        fit(spots, n_components=5)


def test_the_layer_that_was_embedded(spots, model):
    expected = apply(spots, fit(spots, n_components=5)).obsm[KEY]
    spots.layers["raw"], spots.X = spots.X.copy(), spots.X * 0.37
    st.tl.embed(spots, model, layer="raw", **QUIET)
    head = fit(spots, n_components=5)
    assert "expression" in head.reads
    pd.testing.assert_frame_equal(apply(spots, head).obsm[KEY], expected, check_exact=True)


def test_order_of_spots(spots, rng):
    moved = spots[rng.permutation(100)].copy()
    first, again = (apply(spots, fit(one)).obsm[KEY] for one in (spots, moved))
    pd.testing.assert_frame_equal(first, again, check_exact=True)


@pytest.mark.filterwarnings("ignore:.*have a single cell")
def test_spots_made_of_cells_of_which_a_layer_has_the_counts(spots, model, rng):
    cells = spots.copy()
    cells.obs["kind"] = spots.obsm["truth"].idxmax(axis=1).astype(str)
    cells.layers["raw"], cells.X = spots.X.copy(), spots.X * 0.37
    options = {"label_key": "kind", "spot_size": 10.0, "model": model}
    head = st.tl.deconvolve(cells, layer="raw", n_heads=1, **options, **QUIET)
    assert "expression" in head.reads
    # Spots that it is applied to have their counts in X.
    assert np.isfinite(apply(spots, head, model=model).obsm[KEY]).all(axis=None)
