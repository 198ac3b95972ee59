from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import sparse

import stofm as st

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData


def held(adata: AnnData) -> tuple[Any, ...]:
    """All that a check could change."""
    entries = {key: np.asarray(value).tobytes() for key, value in adata.obsm.items()}
    tables = adata.obs.to_csv(), adata.var.to_csv()
    return entries, tables, str(adata.uns), adata.X.data.tobytes(), list(adata.layers)


def check(adata: AnnData, model: Any, **options: Any) -> st.pp.Findings:
    """Check, and hold that nothing is changed, shown or logged."""
    before = held(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = st.pp.check(adata, model, device="cpu", **options)
    assert held(adata) == before
    return found


def test_what_is_found(adata: AnnData, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    adata.obs["control_counts"] = 1
    adata.uns["stofm"] = {"source": {"technology": "Xenium", "unit": "micrometre"}}
    caplog.set_level(logging.INFO, "stofm")
    found = check(adata, model, library_key="library")
    assert not caplog.text
    counts = adata.X.toarray()
    assert found.ok
    assert (found.n_cells, found.n_genes, found.n_matched) == (184, 71, 67)
    assert (found.technology, found.unit, found.species) == ("Xenium", "micrometre", "human")
    assert found.layer == "X"
    assert found.counts_per_cell == np.median(counts.sum(axis=1))
    assert found.counts_share == pytest.approx(counts[:, :67].sum() / counts.sum())
    assert found.control_share == pytest.approx(184 / (184 + counts.sum()))
    assert found.slices == {"left": 101, "right": 83}
    left = adata.obsm["spatial"][adata.obs["library"] == "left"]
    assert found.extent == pytest.approx(np.ptp(left, axis=0))
    assert found.seconds > 0
    assert 0 < found.memory < found.free_memory
    page = str(found)
    for text in ("184 x 71", "67 are known", "left (101), right (83)", "µm", "tiny on cpu", "GB"):
        assert text in page
    assert "To change first" not in page


def test_it_says_what_embed_says(adata: AnnData, model: Any) -> None:
    adata.obsm["spatial"][:40] = adata.obsm["spatial"][0]
    adata.X = sparse.diags((np.arange(184) != 5).astype(np.float32)) @ adata.X
    found = check(adata, model, library_key="library")
    assert found.n_empty == 1
    options: dict[str, Any] = {
        "library_key": "library",
        "show_progress_bar": False,
        "device": "cpu",
    }
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        st.tl.embed(adata, model, **options)
    told = {str(one.message) for one in shown} - set(found.warnings)
    # The number of empty cells has a line of its own.
    assert all("have no count in any known gene" in one for one in told)
    assert found.warnings


def _not_raw(adata: AnnData) -> None:
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.37


def _no_places(adata: AnnData) -> None:
    del adata.obsm["spatial"]


def _no_genes(adata: AnnData) -> None:
    adata.var_names = [f"x{k}" for k in range(adata.n_vars)]


def _overlaid(adata: AnnData) -> None:
    adata.obs["sample"] = adata.obs["library"].to_numpy()


@pytest.mark.parametrize("damage", [_not_raw, _no_places, _no_genes, _overlaid])
def test_what_embed_refuses(adata: AnnData, model: Any, damage: Callable[[AnnData], None]) -> None:
    damage(adata)
    found = check(adata, model)
    assert not found.ok
    with pytest.raises((ValueError, KeyError)) as refused:
        st.tl.embed(adata, model, device="cpu", show_progress_bar=False)
    assert refused.value.args[0] in found.problems
    assert "would stop" in str(found)
    assert "To change first" in str(found)


def test_counts_in_a_layer(adata: AnnData, model: Any) -> None:
    _not_raw(adata)
    found = check(adata, model, library_key="library")
    assert (found.layer, found.n_matched) == ("counts", 67)
    assert found.counts_share > 0.8
    assert check(adata, model, layer="counts", library_key="library").ok


def test_several_problems_are_all_told(adata: AnnData, model: Any) -> None:
    _not_raw(adata)
    _no_places(adata)
    assert len(check(adata, model).problems) == 2


def test_nothing_to_check(adata: AnnData, model: Any) -> None:
    found = check(adata[:0].copy(), model)
    assert "has no cells" in found.problems[0]
    assert "0 x 71" in str(found)


def test_too_little_memory(adata: AnnData, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stofm._edge import embedding

    monkeypatch.setattr(embedding, "free_memory", lambda _: 1000)
    found = check(adata, model, library_key="library")
    assert "and 1 kB are free" in found.problems[0]


def test_columns_that_are_no_genes(adata: AnnData, model: Any) -> None:
    types = np.repeat(["Gene Expression", "Antibody Capture"], [68, 3])
    adata.var["feature_types"] = types
    found = check(adata, model, library_key="library")
    assert found.n_controls == 3
    assert "3 columns" in str(found)


def test_backed(adata: AnnData, model: Any, tmp_path: Any) -> None:
    import anndata

    adata.write_h5ad(tmp_path / "a.h5ad")
    found = st.pp.check(
        anndata.read_h5ad(tmp_path / "a.h5ad", backed="r"), model, library_key="library"
    )
    assert found.ok
    assert found.n_matched == 67
