from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import stofm as st

READING = {"library_key": "library", "show_progress_bar": False}


def test_what_is_written(adata, model, tmp_path) -> None:
    st.tl.attention(adata, model, top=6, **READING)
    weights = adata.obsp["stofm_attention"]
    assert weights.shape == (184, 184)
    assert weights.dtype == np.float32
    assert np.diff(weights.indptr).max() == 6
    assert not weights.diagonal().any()
    rows, columns = weights.nonzero()
    library = adata.obs["library"].to_numpy()
    assert (library[rows] == library[columns]).all()
    assert adata.obs["stofm_attention_virtual"].between(0, 1).all()
    assert adata.uns["stofm"]["stofm_attention"]["params"]["top"] == 6
    adata.write_h5ad(tmp_path / "slice.h5ad")
    read = ad.read_h5ad(tmp_path / "slice.h5ad")
    assert (read.obsp["stofm_attention"] != weights).nnz == 0


def test_rows_follow_the_cells(adata, model, rng) -> None:
    order = rng.permutation(adata.n_obs)
    shuffled = st.tl.attention(adata[order].copy(), model, top=200, copy=True, **READING)
    found = st.tl.attention(adata, model, top=200, copy=True, **READING)
    assert "stofm_attention" not in adata.obsp
    np.testing.assert_allclose(
        shuffled.obsp["stofm_attention"].toarray(),
        found.obsp["stofm_attention"].toarray()[np.ix_(order, order)],
        atol=1e-5,
    )


def test_a_slice_alone_is_as_among_others(adata, model) -> None:
    found = st.tl.attention(adata, model, copy=True, n_shifted=1, **READING)
    is_left = (adata.obs["library"] == "left").to_numpy()
    alone = adata[is_left].copy()
    st.tl.attention(alone, model, n_shifted=1, show_progress_bar=False)
    own = found.obsp["stofm_attention"][is_left][:, is_left]
    np.testing.assert_allclose(alone.obsp["stofm_attention"].toarray(), own.toarray(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top must be a whole number of at least 1"),
        ({"n_shifted": -1}, "n_shifted must be a whole number of at least 0"),
        ({"key_added": "a/b"}, "can't be written to a file"),
    ],
)
def test_messages(adata, model, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        st.tl.attention(adata, model, **options, **READING)
    assert not adata.obsp


def test_what_is_not_ours_stays(adata, model) -> None:
    adata.obs["mine_virtual"] = 1.0
    with pytest.raises(ValueError, match=r"would replace obs\['mine_virtual'\]"):
        st.tl.attention(adata, model, key_added="mine", **READING)


def test_a_table_of_spatialdata(adata, model) -> None:
    SpatialData = pytest.importorskip("spatialdata").SpatialData
    sdata = SpatialData(tables={"table": adata.copy()})
    st.tl.attention(sdata, model, **READING)
    st.tl.attention(adata, model, **READING)
    found = sdata.tables["table"].obsp["stofm_attention"]
    assert (found != adata.obsp["stofm_attention"]).nnz == 0
