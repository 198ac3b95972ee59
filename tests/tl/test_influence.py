from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import stofm as st
from stofm.heads.request import Request
from stofm.perturb.masking import _change, effects_between
from stofm.perturb.reading import Subject

READING = {"library_key": "library", "show_progress_bar": False}


@pytest.fixture
def found(adata, model):
    return st.tl.influence(adata, groupby="kind", model=model, **READING)


def test_a_row_for_each_pair_of_types(adata, found) -> None:
    columns = ["source", "target", "strength", "expected", "z", "FDR", "n_pairs", "length"]
    assert found.pairs.columns.tolist() == columns
    assert len(found.pairs) == 9
    assert found.pairs["z"].is_monotonic_decreasing
    assert (found.pairs["strength"] > 0).all()
    assert found.distances["n_pairs"].sum() == found.pairs["n_pairs"].sum()
    assert found.params["reach"] > 0
    assert "shift of the embedding" in repr(found).lower()
    assert "<table" in found._repr_html_()


def test_nothing_is_written(adata, model) -> None:
    before = adata.copy()
    st.tl.influence(adata, groupby="kind", model=model, n_max=3, **READING)
    assert adata.uns.keys() == before.uns.keys()
    assert adata.obsm.keys() == before.obsm.keys()
    assert adata.obs.equals(before.obs)


def test_seed_and_number_of_senders(adata, model, found) -> None:
    again = st.tl.influence(adata, groupby="kind", model=model, **READING)
    pd.testing.assert_frame_equal(found.pairs, again.pairs)
    few = st.tl.influence(adata, groupby="kind", model=model, n_max=5, min_pairs=1, **READING)
    assert few.pairs["n_pairs"].sum() < found.pairs["n_pairs"].sum() / 2
    other = st.tl.influence(
        adata, groupby="kind", model=model, n_max=5, min_pairs=1, seed=1, **READING
    )
    assert not few.pairs.equals(other.pairs)


def test_the_order_of_rows_does_not_matter(adata, model, rng) -> None:
    shuffled = adata[rng.permutation(adata.n_obs)].copy()
    few = [
        st.tl.influence(one, groupby="kind", model=model, n_max=20, **READING).pairs
        for one in (adata, shuffled)
    ]
    columns = ["source", "target"]
    first, second = (one.sort_values(columns, ignore_index=True) for one in few)
    pd.testing.assert_frame_equal(first, second, rtol=1e-2, atol=1e-2)
    assert first["n_pairs"].equals(second["n_pairs"])


def test_a_wider_reach_has_more_pairs(adata, model, found) -> None:
    wide = st.tl.influence(
        adata, groupby="kind", model=model, reach=2 * found.params["reach"], **READING
    )
    assert wide.pairs["n_pairs"].sum() > 1.3 * found.pairs["n_pairs"].sum()


def test_cells_without_a_type_are_left_out(adata, model) -> None:
    adata.obs["kind"] = adata.obs["kind"].cat.add_categories("").mask(adata.obs["kind"] == "1")
    pairs = st.tl.influence(adata, groupby="kind", model=model, **READING).pairs
    assert {*pairs["source"], *pairs["target"]} == {"0", "2"}


def test_class_probabilities_of_a_head(adata, model, few_epochs) -> None:
    options = st.tl.HeadOptions(n_neighbors=0, n_components=0)
    how = {"model": model, "use_rep": "X_stofm", "options": options, **READING}
    head = st.tl.annotate(adata, label_key="kind", **how)
    found = st.tl.influence(adata, groupby="kind", model=model, head=head, **READING)
    assert found.params["effect"] == "change of class probabilities"
    assert found.pairs["strength"].between(0, 1).all()
    # Of unmasked cells the probabilities are those that annotate writes.
    st.tl.annotate(adata, head=head, model=model, **READING)
    features = np.asarray(adata.obsm["X_stofm"])
    proba = adata.obsm["stofm_annotation_proba"].to_numpy()
    change = _change(head, model)(features[:50], features[50:100])
    expected = np.abs(proba[:50] - proba[50:100]).sum(axis=1) / 2
    np.testing.assert_allclose(change, expected, atol=1e-5)


def test_a_head_that_reads_more_or_of_another_model_is_refused(adata, model, few_epochs) -> None:
    how = {"label_key": "kind", "model": model, **READING}
    head = st.tl.annotate(adata, **how)
    with pytest.raises(ValueError, match=r"use_rep='X_stofm' and options=st\.tl\."):
        st.tl.influence(adata, groupby="kind", model=model, head=head, **READING)
    options = st.tl.HeadOptions(n_neighbors=0, n_components=0)
    head = st.tl.annotate(adata, use_rep="X_stofm", options=options, **how)
    other = st.Stofm(model.config, model.vocabulary, seed=9).eval()
    with pytest.raises(ValueError, match="was fitted to embeddings from tiny"):
        st.tl.influence(adata, groupby="kind", model=other, head=head, **READING)
    with pytest.raises(TypeError, match="Expected a head for annotation"):
        st.tl.influence(adata, groupby="kind", model=model, head=model, **READING)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groupby": "types"}, KeyError, r"no obs\['types'\]"),
        ({"groupby": "library_one"}, ValueError, "has 1 type.*at least two"),
        ({"groupby": "kind", "reach": -1.0}, ValueError, "reach must be above 0.*found -1.0"),
        ({"groupby": "kind", "n_max": 0}, ValueError, "n_max must be a whole number"),
        ({"groupby": "kind", "reach": 1e-9}, ValueError, "within reach=1e-09; raise `reach`"),
    ],
)
def test_messages(adata, model, options, error, message) -> None:
    adata.obs["library_one"] = "one"
    with pytest.raises(error, match=message):
        st.tl.influence(adata, model=model, **options, **READING)


def test_senders_are_drawn_by_type_over_all_slices(adata, model) -> None:
    subject = Subject.read(adata, Request(model, **READING), None)
    kinds = adata.obs["kind"].cat.codes.to_numpy().astype(np.int64)
    pairs, _ = effects_between(subject.tissue, kinds, None, reach=200.0, n_max=4)
    senders = np.unique(pairs.senders)
    assert np.bincount(kinds[senders]).tolist() == [4, 4, 4]
    library = adata.obs["library"].to_numpy()
    assert (library[pairs.senders] == library[pairs.receivers]).all()


def test_a_table_of_spatialdata(adata, model) -> None:
    SpatialData = pytest.importorskip("spatialdata").SpatialData
    sdata = SpatialData(tables={"table": adata.copy()})
    options = {"groupby": "kind", "model": model, "n_max": 3, "min_pairs": 1, **READING}
    expected, found = (st.tl.influence(one, **options).pairs for one in (adata, sdata))
    pd.testing.assert_frame_equal(found, expected)
