from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import stofm as st
from stofm._keys import Obsm, Uns
from stofm.nn import Stofm


@pytest.fixture
def tokenized(adata, model):
    st.pp.tokenize(adata, model, show_progress_bar=False)
    return adata


def test_writes_unit_vectors_and_a_record(tokenized, model):
    st.tl.encode_cells(tokenized, model, show_progress_bar=False)
    out = tokenized.obsm[Obsm.X_CELL]
    assert out.shape == (184, 12)
    assert out.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1.0, atol=1e-6)
    record = tokenized.uns[Uns.STOFM][Obsm.X_CELL]
    assert record["cell_encoder"] == model.cell_encoder_fingerprint
    assert record["params"] == {"dtype": "float32"}


def test_copy(tokenized, model):
    new = st.tl.encode_cells(tokenized, model, show_progress_bar=False, copy=True)
    assert Obsm.X_CELL in new.obsm
    assert Obsm.X_CELL not in tokenized.obsm


def test_place_does_not_matter(tokenized, model):
    st.tl.encode_cells(tokenized, model, show_progress_bar=False)
    first = tokenized.obsm[Obsm.X_CELL]
    tokenized.obsm["spatial"] = tokenized.obsm["spatial"][::-1].copy()
    st.tl.encode_cells(tokenized, model, show_progress_bar=False)
    np.testing.assert_array_equal(tokenized.obsm[Obsm.X_CELL], first)


def test_without_tokens_it_says_what_to_run(adata, model):
    with pytest.raises(KeyError, match=r"run st\.pp\.tokenize\(adata, model\) first"):
        st.tl.encode_cells(adata, model)


def test_tokens_of_another_vocabulary_are_refused(tokenized, model):
    other = replace(model.vocabulary, medians=model.vocabulary.medians * 2)
    with pytest.raises(ValueError, match=r"Run st\.pp\.tokenize\(adata, model\) again"):
        st.tl.encode_cells(tokenized, Stofm(model.config, other))


def test_chunks_of_cells_like_all_at_once(tokenized, model):
    st.tl.encode_cells(tokenized, model, show_progress_bar=False)
    rows = np.arange(0, 184, 7)
    part = tokenized[rows].copy()
    del part.obsm[Obsm.X_CELL]
    st.tl.encode_cells(part, model, show_progress_bar=False)
    np.testing.assert_array_equal(part.obsm[Obsm.X_CELL], tokenized.obsm[Obsm.X_CELL][rows])


def test_a_budget_of_nothing_is_refused(tokenized, model):
    with pytest.raises(
        ValueError, match="`token_budget` must be at least 1, or left out, found -1"
    ):
        st.tl.encode_cells(tokenized, model, token_budget=-1)


# Models that read values


def with_options(model, **options):
    cell_encoder = replace(model.config.cell_encoder, **options)
    return Stofm(replace(model.config, cell_encoder=cell_encoder), model.vocabulary, seed=3).eval()


@pytest.fixture
def reader(model):
    return with_options(model, pooled=True, values="log", d_gene=8)


def encode(adata, model, **options):
    st.pp.tokenize(adata, model, show_progress_bar=False)
    st.tl.encode_cells(adata, model, show_progress_bar=False, **options)
    return np.asarray(adata.obsm[Obsm.X_CELL])


def test_values_are_read(adata, model):
    reader = with_options(model, pooled=True, d_gene=8)
    first = encode(adata, reader)
    assert Obsm.TOKEN_VALUES in adata.obsm
    other = adata.copy()
    counts = adata.X.toarray()
    counts[:, -1] = 30  # a column that no token stands for: ranks stay, values shrink
    other.X = counts
    changed = encode(other, reader)
    assert (other.obsm[Obsm.TOKENS] != adata.obsm[Obsm.TOKENS]).nnz == 0
    assert np.abs(changed - first).max() > 1e-4


def test_tokens_without_values_are_refused_by_a_model_that_reads_them(tokenized, reader):
    message = r"uses the values of tokens.*stofm_token_values.*Run st\.pp\.tokenize\(adata, model"
    with pytest.raises(KeyError, match=message):
        st.tl.encode_cells(tokenized, reader)
    st.pp.tokenize(tokenized, reader, show_progress_bar=False)
    values = tokenized.obsm[Obsm.TOKEN_VALUES]
    st.pp.tokenize(tokenized, reader, values=False, show_progress_bar=False)
    tokenized.obsm[Obsm.TOKEN_VALUES] = values  # of unknown origin
    with pytest.raises(KeyError, match=message):
        st.tl.encode_cells(tokenized, reader)
    st.pp.tokenize(tokenized, reader, show_progress_bar=False)  # by another rule
    with pytest.raises(KeyError, match=message):
        st.tl.encode_cells(tokenized, with_options(reader, depth_power=0.5))


def test_tokens_beyond_those_that_the_model_keeps_are_not_read(adata, model):
    reader = with_options(model, pooled=True, d_gene=8)
    short = Stofm(replace(reader.config, max_tokens=7), reader.vocabulary, seed=3).eval()
    expected = encode(adata.copy(), short)
    st.pp.tokenize(adata, reader, show_progress_bar=False)
    st.tl.encode_cells(adata, short, show_progress_bar=False)
    np.testing.assert_array_equal(adata.obsm[Obsm.X_CELL], expected)


def test_magnitudes_are_kept_of_what_is_pooled(adata, reader):
    embedding = encode(adata, reader)
    lengths = np.linalg.norm(embedding[:, :8], axis=1)
    assert lengths.max() > 1.1 * lengths.min()
    np.testing.assert_allclose(np.linalg.norm(embedding[:, 8:], axis=1), 2.0, atol=1e-6)


def test_neither_order_nor_company_matters(adata, reader, rng):
    together = encode(adata.copy(), reader)
    left = (adata.obs["library"] == "left").to_numpy()
    np.testing.assert_array_equal(encode(adata[left].copy(), reader), together[left])
    order = rng.permutation(adata.n_obs)
    shuffled = encode(adata[order].copy(), reader, token_budget=77)
    np.testing.assert_array_equal(shuffled, together[order])
