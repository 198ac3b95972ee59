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
    with pytest.raises(ValueError, match=r"run st\.pp\.tokenize\(adata, model\) again"):
        st.tl.encode_cells(tokenized, Stofm(model.config, other))


def test_chunks_of_cells_like_all_at_once(tokenized, model):
    st.tl.encode_cells(tokenized, model, show_progress_bar=False)
    rows = np.arange(0, 184, 7)
    part = tokenized[rows].copy()
    del part.obsm[Obsm.X_CELL]
    st.tl.encode_cells(part, model, show_progress_bar=False)
    np.testing.assert_array_equal(part.obsm[Obsm.X_CELL], tokenized.obsm[Obsm.X_CELL][rows])


def test_a_budget_of_nothing_is_refused(tokenized, model):
    with pytest.raises(ValueError, match="token_budget must be 'auto' or at least 1, found -1"):
        st.tl.encode_cells(tokenized, model, token_budget=-1)
