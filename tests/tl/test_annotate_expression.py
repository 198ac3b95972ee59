"""Annotation by networks that read embeddings and by ones that read expression."""

from __future__ import annotations

from typing import get_args

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import stofm as st
from stofm._keys import Obs, Obsm
from stofm.heads import ensemble
from stofm.heads.inputs import Source
from stofm.heads.network import HeadTraining

KEY, PROBA = Obs.ANNOTATION, Obsm.ANNOTATION_PROBA
QUIET = {"library_key": "library", "device": "cpu", "show_progress_bar": False}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Fit networks in a moment."""
    short = HeadTraining(learning_rate=5e-3, max_epochs=5, patience=2)
    monkeypatch.setattr(
        "stofm.heads.network.HeadTraining", lambda **own: HeadTraining(**own) if own else short
    )


@pytest.fixture
def cells(adata, model):
    """Two slices with the tiny model's embeddings."""
    st.tl.embed(adata, model, **QUIET)
    return adata


def fit(data, **options):
    return st.tl.annotate(data, **({"label_key": "kind", "n_heads": 2, **QUIET} | options))


def probabilities(data, head, **options):
    made = st.tl.annotate(data, head=head, copy=True, **(QUIET | options))
    return made.obsm[PROBA]


def accuracy(data, head):
    return (probabilities(data, head).idxmax(axis=1) == data.obs["kind"].astype(str)).mean()


def test_expression_has_a_vote(cells):
    head = fit(cells)
    assert head.reads.count("embedding") == 2
    assert set(get_args(Source)) == set(head.reads)
    assert sum(head.weights) == pytest.approx(1.0)
    # No more components than there are genes.
    assert head.expression.axes.shape == (71, 71)
    assert {"network", "reads"} <= set(head.history)
    assert accuracy(cells, head) > 0.9


def test_columns_of_each_representation_share_a_scale(cells, scales_of):
    for key, factor in ((Obsm.X_CELL, 10.0), (Obsm.X, 1000.0)):
        cells.obsm[key] = factor * cells.obsm[key]
    head = fit(cells, n_components=60)
    cell, spatial = (cells.obsm[key].shape[1] for key in (Obsm.X_CELL, Obsm.X))
    widths = {
        "embedding": (cell, spatial),
        "neighborhood": (cell, cell, spatial),
        "expression": (60,),
        "expression neighborhood": (50, 50),
    }
    for network, reads in zip(head.networks, head.reads, strict=True):
        scales = scales_of(network, widths[reads])
        assert len(set(scales)) == len(scales)


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_neighbours_of_expression_alone_beside_embeddings(cells, tmp_path, monkeypatch):
    weights = np.array([0.3, 0.0, 0.0, 0.7, 0.0])
    monkeypatch.setattr(ensemble, "blend_weights", lambda *_: weights)
    head = fit(cells)
    assert head.n_neighbors == 10
    head.save(tmp_path / "head")
    again = st.AnnotationHead.load(tmp_path / "head")
    found = probabilities(cells, again)
    pd.testing.assert_frame_equal(found, probabilities(cells, head), check_exact=True)
    # They do vote: without counts others are left, and say something else.
    bare = cells.copy()
    bare.X = bare.X * 0.37
    assert np.abs(probabilities(bare, again).to_numpy() - found.to_numpy()).max() > 0.01


def test_expression_tells_what_embeddings_do_not(cells, rng):
    for key in (Obsm.X_CELL, Obsm.X):
        cells.obsm[key] = rng.normal(size=cells.obsm[key].shape).astype(np.float32)
    head = fit(cells)
    on_expression = ["expression" in one for one in head.reads]
    assert sum(np.array(head.weights)[on_expression]) > 0.8
    assert accuracy(cells, head) > 0.9
    assert accuracy(cells, fit(cells, n_components=0)) < 0.7


def test_files(cells, tmp_path):
    head = fit(cells, n_components=6)
    assert head.params["n_components"] == 6
    assert head.params["n_heads"] == 2
    head.save(tmp_path / "head")
    again = st.AnnotationHead.load(tmp_path / "head")
    assert again.expression.axes.shape == (71, 6)
    assert (again.reads, again.weights) == (head.reads, head.weights)
    pd.testing.assert_frame_equal(
        probabilities(cells, again), probabilities(cells, head), check_exact=True
    )


def test_embeddings_alone(cells):
    head = fit(cells, n_components=0, n_neighbors=0)
    assert (head.expression, head.n_neighbors) == (None, 0)
    assert head.reads == ("embedding",) * 2
    before = probabilities(cells, head)
    # Counts are not read.
    cells.X = None
    pd.testing.assert_frame_equal(probabilities(cells, head), before, check_exact=True)


def test_other_entries_of_obsm(cells, rng):
    cells.obsm["X_pca"] = rng.normal(size=(184, 4)).astype(np.float32)
    assert fit(cells, use_rep="X_pca").expression is None
    head = fit(cells, use_rep="X_pca", n_components=8)
    assert head.expression.axes.shape == (71, 8)
    assert accuracy(cells, head) > 0.85


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_fitting_without_raw_counts(cells, caplog):
    cells.X = cells.X * 0.37
    head = fit(cells)
    assert "are judged without their expression" in caplog.text
    assert head.expression is None
    assert set(head.reads) == {"embedding", "neighborhood"}
    with pytest.raises(ValueError, match="raw counts"):
        fit(cells, n_components=20)


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_a_query_without_raw_counts(cells, caplog):
    # Nothing is divided by, so that votes can be read off.
    head = fit(cells, reject_rate=0, n_neighbors=0)
    query = cells.copy()
    query.X = query.X * 0.37
    found = probabilities(query, head)
    assert "are judged without their expression" in caplog.text
    own = [k for k, source in enumerate(head.reads) if source == "embedding"]
    features = np.hstack([cells.obsm[Obsm.X_CELL], cells.obsm[Obsm.X]])
    votes = [st.train.apply_head(head.networks[k], features, "classes") for k in own]
    odds = np.mean(votes, axis=0, dtype=float) ** (1 / head.temperature)
    expected = odds / odds.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found.to_numpy() - probabilities(cells, head).to_numpy()).max() > 0.05


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_a_query_with_few_of_the_genes(cells, caplog):
    head = fit(cells)
    query = cells[:, :2].copy()
    found = probabilities(query, head)
    assert "2 of the 71 genes whose expression the head reads are there, too few" in caplog.text
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)


def test_genes_of_a_query_in_another_order(cells, rng):
    head = fit(cells)
    moved = cells[:, rng.permutation(71)].copy()
    np.testing.assert_allclose(probabilities(moved, head), probabilities(cells, head), atol=1e-5)


def test_the_layer_that_was_embedded(adata, model):
    plain = adata.copy()
    adata.layers["raw"], adata.X = adata.X.copy(), adata.X * 0.37
    st.tl.embed(plain, model, **QUIET)
    st.tl.embed(adata, model, layer="raw", **QUIET)
    expected, head = fit(plain), fit(adata)
    assert "expression" in head.reads
    found = probabilities(adata, head)
    pd.testing.assert_frame_equal(found, probabilities(plain, expected), check_exact=True)
    named = probabilities(adata, fit(adata, layer="raw"), layer="raw")
    pd.testing.assert_frame_equal(found, named, check_exact=True)


def test_order_of_cells(cells, rng):
    moved = cells[rng.permutation(184)].copy()
    first, again = (probabilities(cells, fit(one)) for one in (cells, moved))
    pd.testing.assert_frame_equal(first, again, check_exact=True)


def test_several_tables(cells):
    parts = {name: cells[cells.obs["library"] == name].copy() for name in ("left", "right")}
    # The genes of the second are fewer, and in another order.
    parts["right"] = parts["right"][:, :4:-1].copy()
    options = {"library_key": None, "split": "random"}
    head = fit(parts, **options)
    assert len(head.expression.genes) == 66
    assert "expression" in head.reads
    made = st.tl.annotate(parts, head=head, copy=True, **(QUIET | {"library_key": None}))
    for name, part in parts.items():
        alone = probabilities(part, head, library_key=None)
        np.testing.assert_allclose(made[name].obsm[PROBA], alone, atol=1e-6)


def test_backed(cells, tmp_path):
    expected = fit(cells)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    head = fit(backed)
    assert head.weights == expected.weights
    st.tl.annotate(backed, head=head, **QUIET)
    np.testing.assert_array_equal(backed.obsm[PROBA], probabilities(cells, expected))
    backed.file.close()


def test_a_query_of_one_class_is_judged_as_among_others(cells):
    # Its neighbours would be others.
    head = fit(cells, n_neighbors=0)
    whole = probabilities(cells, head)
    some = cells[cells.obs["kind"] == "1"].copy()
    np.testing.assert_allclose(probabilities(some, head), whole.loc[some.obs_names], atol=1e-6)


def test_scores_and_rejection_are_of_all_held_out_cells(cells):
    head = fit(cells, split="random", reject_rate=0.2)
    # Two draws of a tenth each.
    assert head.validation_scores["n_cells"].tolist() == [2 * head.split["n_held_out"]]
    assert 0.0 < head.rejection.measured <= 0.2


@pytest.mark.usefixtures("few_steps")
@pytest.mark.filterwarnings("ignore:Tuning")
def test_tuning(cells, model, tmp_path):
    head = fit(cells, model=model, strategy="full", n_components=5)
    assert head.reads.count("embedding") == 2
    assert "expression" in head.reads
    head.save(tmp_path / "head")
    again = st.AnnotationHead.load(tmp_path / "head")
    pd.testing.assert_frame_equal(
        probabilities(cells, again), probabilities(cells, head), check_exact=True
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": -1}, "n_components must be a whole number of at least 0, found -1"),
        ({"n_components": 2.5}, "n_components must be a whole number"),
        ({"n_heads": 0}, "n_heads must be a whole number of at least 1, found 0"),
        ({"n_heads": 1.5}, "n_heads must be a whole number"),
    ],
)
def test_numbers_that_can_not_be(adata, model, options, message):
    with pytest.raises(ValueError, match=message):
        fit(adata, model=model, **options)
    # Before anything is embedded.
    assert Obsm.X not in adata.obsm
