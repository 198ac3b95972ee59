from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import stofm as st
from stofm._keys import Obs, Uns

QUIET = {"library_key": "library", "device": "cpu", "show_progress_bar": False}

pytestmark = pytest.mark.usefixtures("few_epochs")


@pytest.fixture
def cells(adata, rng):
    """Both slices with an embedding that tells the kinds apart, and in the query a new one in a corner."""
    kind = adata.obs["kind"].cat.codes.to_numpy()
    values = np.eye(3, 6)[kind] * 6 + rng.normal(size=(184, 6))
    adata.obsm["X_pca"] = values.astype(np.float32)
    query = adata.copy()
    new = query.obsm["spatial"][:, 0] < 150
    far = rng.normal(size=(new.sum(), 6)) + 25 * np.eye(6)[5]
    query.obsm["X_pca"][new] = far.astype(np.float32)
    counts = query.X.tolil()
    counts[np.flatnonzero(new)[:, None], [4, 5]] = 40
    query.X = counts.tocsr()
    return adata, query, new


@pytest.fixture
def head(cells):
    options = st.tl.HeadOptions(split="blocks", n_components=0)
    return st.tl.annotate(cells[0], label_key="kind", use_rep="X_pca", options=options, **QUIET)


def test_a_new_group(cells, head, rng, tmp_path):
    _, query, new = cells
    before = query.copy()
    options = {"n_genes": 2, "resolution": 0.3, **QUIET}
    table = st.tl.novel(query, head, **options)
    assert table.index.tolist() == query.obs[Obs.NOVEL].cat.categories.tolist()
    assert len(table) >= 1
    grouped = query.obs[Obs.NOVEL].notna().to_numpy()
    assert grouped[new].mean() > 0.9
    assert not grouped[~new].any()
    first = table.iloc[0]
    assert set(first["markers"].split(", ")) <= {*query.var_names[[4, 5]]}
    assert first["nearest_class"] in head.classes
    assert first["share_novel"] > 0.5
    assert table["n_cells"].is_monotonic_decreasing
    assert table["n_cells"].sum() == grouped.sum()
    assert (query.X != before.X).nnz == 0
    assert query.uns[Uns.STOFM][Obs.NOVEL]["params"]["classes"] == list(head.classes)
    pd.testing.assert_frame_equal(table, st.tl.novel(query.copy(), head, **options))
    query.write_h5ad(tmp_path / "query.h5ad")
    # In one corner the group lies together.
    assert first["p"] <= 0.01
    assert first["clustering"] > 1.5


def test_nothing_is_new(cells, head):
    labelled = cells[0].copy()
    table = st.tl.novel(labelled, head, **QUIET)
    assert table.empty
    assert labelled.obs[Obs.NOVEL].isna().all()


def test_whole_slices_that_differ(cells, head):
    query = cells[1].copy()
    query.obsm["X_pca"] = query.obsm["X_pca"] + np.float32(20)
    with pytest.warns(UserWarning, match="whole slices differ"):
        st.tl.novel(query, head, **QUIET)


def test_messages(cells, head):
    query = cells[1]
    with pytest.raises(TypeError, match="Pass a head"):
        st.tl.novel(query, None)
    with pytest.raises(ValueError, match="resolution must be positive"):
        st.tl.novel(query, head, resolution=0)
    with pytest.raises(TypeError, match="Pass one AnnData"):
        st.tl.novel([query, cells[0]], head, **QUIET)
    query.obs["mine"] = 1
    with pytest.raises(ValueError, match=r"would replace obs\['mine'\]"):
        st.tl.novel(query, head, key_added="mine", **QUIET)
    assert Obs.NOVEL not in query.obs
