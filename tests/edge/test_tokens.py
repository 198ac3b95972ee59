"""Whether embeddings are still of the counts and coordinates that are there."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import stofm as st
from stofm._edge.tokens import changed_counts, changed_places, stale_reason
from stofm._keys import Obsm, Uns

QUIET = {"device": "cpu", "show_progress_bar": False}


@pytest.fixture
def embedded(adata, model):
    """Both slices, embedded."""
    st.tl.embed(adata, model, library_key="library", **QUIET)
    return adata


def log(counts):
    return sparse.csr_matrix(counts).log1p()


def reasons(adata, vocabulary):
    return [stale_reason(adata, key, vocabulary) for key in (Obsm.X_CELL, Obsm.X)]


@pytest.mark.parametrize("suffix", ["h5ad", "zarr", "backed"])
def test_nothing_is_stale_after_a_file(embedded, vocabulary, tmp_path, suffix):
    path = tmp_path / "slices"
    (embedded.write_zarr if suffix == "zarr" else embedded.write_h5ad)(path)
    back = ad.read_zarr(path) if suffix == "zarr" else ad.read_h5ad(path, backed=suffix == "backed")
    assert reasons(back, vocabulary) == ["", ""]


def test_cells_and_genes_may_be_taken_away_or_moved(embedded, vocabulary, rng):
    few = embedded[rng.permutation(184)[:50]]
    for part in (few, few.copy(), embedded[:, rng.permutation(71)[:30]].copy(), embedded[:1]):
        assert reasons(part, vocabulary) == ["", ""]


def test_the_way_in_which_counts_are_stored_does_not_matter(embedded, vocabulary):
    for change in (sparse.csc_matrix, lambda x: x.toarray().astype(np.int16)):
        embedded.X = change(embedded.X)
        assert reasons(embedded, vocabulary) == ["", ""]


def test_joined_slices(embedded, vocabulary):
    parts = [embedded[embedded.obs["library"] == name].copy() for name in ("left", "right")]
    joined = ad.concat(parts, uns_merge="same", merge="same")
    assert reasons(joined, vocabulary) == ["", ""]
    joined.X = joined.X[::-1]
    assert "other counts" in reasons(joined, vocabulary)[1]


def test_a_record_of_a_part_is_not_trusted(adata, model, vocabulary):
    parts = [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]
    for part in parts:
        st.tl.embed(part, model, **QUIET)
    joined = ad.concat(parts, uns_merge="first")
    for reason in reasons(joined, vocabulary):
        assert "is of 101 cells, and there are 184" in reason
    assert reasons(ad.concat(parts, uns_merge="same"), vocabulary) == ["", ""]
    equal = [parts[0], parts[0].copy()]
    equal[1].X = equal[1].X[::-1].copy()
    st.tl.embed(equal[1], model, **QUIET)
    joined = ad.concat(equal, uns_merge="same", index_unique="-")
    assert reasons(joined, vocabulary) == ["", ""]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[::-1],
        lambda x: x[:, ::-1],
        lambda x: x.sign(),
        lambda x: sparse.csr_matrix(x.toarray() + 1),
    ],
)
def test_other_counts_are_noticed(embedded, vocabulary, change):
    embedded.X = sparse.csr_matrix(change(embedded.X))
    assert "of 184 cells that were looked at" in changed_counts(embedded, vocabulary)


@pytest.mark.parametrize("change", [lambda x: x[::-1], lambda x: x[:, ::-1]])
def test_other_genes_are_noticed_without_the_vocabulary(embedded, change):
    assert not changed_counts(embedded)
    embedded.X = sparse.csr_matrix(change(embedded.X))
    assert "of 184 cells that were looked at" in changed_counts(embedded)


@pytest.mark.parametrize("change", [log, lambda x: log(x).toarray() - 0.5, lambda x: x * np.nan])
def test_counts_that_were_normalised_since_are_no_other_ones(embedded, vocabulary, change):
    embedded.X = change(embedded.X)
    assert reasons(embedded, vocabulary) == ["", ""]


def test_counts_are_looked_for_where_they_were_read(adata, model, vocabulary):
    adata.layers["raw"] = adata.X.copy()
    adata.X = adata.X[::-1]
    st.tl.embed(adata, model, library_key="library", layer="raw", **QUIET)
    assert reasons(adata, vocabulary) == ["", ""]
    adata.layers["raw"] = adata.X.copy()
    assert "adata.layers['raw'] has" in reasons(adata, vocabulary)[0]
    del adata.layers["raw"]
    assert reasons(adata, vocabulary) == ["", ""]


def test_a_cell_with_more_genes_than_tokens(adata, vocabulary):
    st.pp.tokenize(adata, vocabulary, max_tokens=5, show_progress_bar=False)
    assert changed_counts(adata, vocabulary) == ""
    assert changed_counts(adata[:, ::2].copy(), vocabulary) == ""
    adata.X = adata.X[:, ::-1]
    assert changed_counts(adata, vocabulary)


@pytest.mark.parametrize(
    ("change", "is_stale"),
    [
        (lambda xy: xy[::-1], True),
        (lambda xy: xy * [1.0, 1.2], True),
        (lambda xy: xy[:, ::-1] * -3.0 + 100.0, False),
        (lambda xy: np.round(xy, 1), False),
        (lambda xy: np.hstack([xy, xy]), False),
    ],
)
def test_other_coordinates_are_noticed(embedded, vocabulary, change, is_stale):
    embedded.obsm["spatial"] = change(embedded.obsm["spatial"])
    assert changed_places(embedded) == is_stale
    cell, spatial = reasons(embedded, vocabulary)
    assert cell == ""
    assert ("other coordinates than obsm['spatial']" in spatial) == is_stale


def test_cells_on_a_line_or_at_one_place(adata, model):
    del adata.obs["library"]
    adata.obsm["spatial"][:, 1] = 3.0
    adata.obsm["spatial"][::2] = 5.0
    with pytest.warns(UserWarning, match="one position"):
        st.tl.embed(adata[::2].copy(), model, **QUIET)
    one = adata[1::2].copy()
    with pytest.warns(UserWarning, match="on a line"):
        st.tl.embed(one, model, **QUIET)
    assert not changed_places(one)
    one.obsm["spatial"] = one.obsm["spatial"][::-1]
    assert changed_places(one)


def test_steps_that_are_run_again_leave_no_embedding_that_looks_fresh(embedded, model, vocabulary):
    moved = embedded.copy()
    moved.X = moved.X[::-1]
    st.pp.tokenize(moved, model, show_progress_bar=False)
    assert all("older than the counts" in reason for reason in reasons(moved, vocabulary))
    st.tl.encode_cells(moved, model, **QUIET)
    assert [bool(reason) for reason in reasons(moved, vocabulary)] == [False, True]

    moved = embedded.copy()
    moved.obsm["spatial"] = moved.obsm["spatial"][::-1]
    st.pp.subslice(moved, model, library_key="library")
    assert "older than the coordinates" in reasons(moved, vocabulary)[1]
    st.tl.embed(moved, model, library_key="library", **QUIET)
    assert reasons(moved, vocabulary) == ["", ""]


def test_an_embedding_under_another_name_leaves_the_first_as_it_is(embedded, model, vocabulary):
    few = embedded[:100].copy()
    st.tl.embed(few, model, library_key="library", key_added="X_few", **QUIET)
    assert reasons(few, vocabulary) == ["", ""]
    few.X = few.X[::-1]
    st.tl.embed(few, model, library_key="library", key_added="X_few", **QUIET)
    assert [bool(reason) for reason in reasons(few, vocabulary)] == [False, True]
    assert stale_reason(few, "X_few", vocabulary) == ""


def test_features_of_the_user_have_no_counts(adata, model, vocabulary, rng):
    adata.obsm["X_own"] = rng.normal(size=(184, 12)).astype(np.float32)
    st.pp.tokenize(adata, model, show_progress_bar=False)
    st.tl.embed(adata, model, library_key="library", cell_rep="X_own", **QUIET)
    adata.X = adata.X[::-1]
    assert stale_reason(adata, Obsm.X, vocabulary) == ""


def test_steps_read_nothing_that_is_stale(embedded, model, vocabulary, monkeypatch):
    monkeypatch.setattr("stofm._edge.tokens.embedded_vocabulary", lambda: vocabulary)
    embedded.X = embedded.X[::-1]
    with pytest.raises(ValueError, match="The tokens were made from other counts: of 184 cells"):
        st.tl.encode_cells(embedded, model, **QUIET)
    with pytest.raises(ValueError, match=r"X_stofm_cell.* was made from other counts"):
        st.pp.subslice(embedded, library_key="library")
    with pytest.raises(ValueError, match=r"X_stofm'.* was made from other counts.* Embed the"):
        st.tl.domains(embedded, n_domains=2)


def test_embed_says_what_it_makes_again(embedded, model, caplog):
    embedded.X = embedded.X[::-1]
    with caplog.at_level(logging.INFO, logger="stofm"):
        st.tl.embed(embedded, model, library_key="library", **QUIET)
    assert "slices are cut again" in caplog.text


def test_records_without_digests_are_not_judged(embedded, vocabulary):
    for key in (Obsm.TOKENS, Uns.SUBSLICE):
        del embedded.uns[Uns.STOFM][key]
    embedded.X = embedded.X[::-1]
    embedded.obsm["spatial"] = embedded.obsm["spatial"][::-1]
    assert reasons(embedded, vocabulary) == ["", ""]
