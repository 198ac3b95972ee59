"""Annotation heads, and how far they can be trusted."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest

import stofm as st
from stofm._edge.tables import frame_names
from stofm._keys import Obs, Obsm, Uns

QUIET = {"device": "cpu", "show_progress_bar": False, "use_rep": "X_pca"}
RANDOM = st.tl.HeadOptions(split="random")

pytestmark = pytest.mark.usefixtures("few_epochs")


@pytest.fixture
def cells(adata, rng):
    """The left slice, with classes that h5ad and Zarr can't name columns by, and an embedding."""
    left = adata[adata.obs["library"] == "left"].copy()
    names = {"0": "T/NK", "1": "T_NK", "2": "L2/3"}
    left.obs["label"] = left.obs["kind"].map(names).astype(str)
    kind = left.obs["kind"].cat.codes.to_numpy()
    left.obsm["X_pca"] = np.eye(3, 5, dtype=np.float32)[kind] * 4 + rng.normal(size=(101, 5))
    return left


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_classes_that_a_file_can_not_name(cells, tmp_path, suffix):
    head = st.tl.annotate(cells, label_key="label", options=RANDOM, **QUIET)
    st.tl.annotate(cells, head=head, **QUIET)
    path = tmp_path / f"cells.{suffix}"
    getattr(cells, f"write_{suffix}")(path)
    again = getattr(ad, f"read_{suffix}")(path)
    assert head.classes == ("L2/3", "T/NK", "T_NK")
    assert frame_names(again, Obsm.ANNOTATION_PROBA) == list(head.classes)
    assert list(again.obsm[Obsm.ANNOTATION_PROBA]) == ["L2_3", "T_NK_2", "T_NK"]
    assert set(again.obs[Obs.ANNOTATION]) <= {*head.classes, "unknown"}
    for panels in (["confusion"], ["reliability"]):
        drawn = [
            st.pl.annotation(one, truth_key="label", panels=panels, show=False)
            for one in (cells, again)
        ]
        assert drawn[0].get_title() == drawn[1].get_title()
    accuracy = (again.obs[Obs.ANNOTATION].astype(str) == cells.obs["label"]).mean()
    ax = st.pl.annotation(again, truth_key="label", panels=["confusion"], show=False)
    assert f"accuracy {accuracy:.3f}" in ax.get_title()
    plt.close("all")


def test_all_or_nothing_is_written(cells, monkeypatch):
    head = st.tl.annotate(cells, label_key="label", options=RANDOM, **QUIET)

    def fail(*_args, **_options):
        raise OSError

    monkeypatch.setattr("stofm.heads.head.write_frame", fail)
    with pytest.raises(OSError):
        st.tl.annotate(cells, head=head, **QUIET)
    assert Obs.ANNOTATION not in cells.obs
    assert Uns.STOFM not in cells.uns


def test_novelty_and_sets_are_written_and_kept(cells, tmp_path):
    options = st.tl.HeadOptions(split="random", coverage=0.8)
    head = st.tl.annotate(cells, label_key="label", options=options, **QUIET)
    st.tl.annotate(cells, head=head, **QUIET)
    sets, proba = cells.obsm[Obsm.ANNOTATION_SET], cells.obsm[Obsm.ANNOTATION_PROBA]
    assert list(sets) == list(proba)
    assert set(sets.dtypes) == {np.dtype(bool)}
    is_likeliest = proba.to_numpy() == proba.to_numpy().max(axis=1, keepdims=True)
    expected = (proba.to_numpy() >= head.sets.least_probability) | is_likeliest
    np.testing.assert_array_equal(sets, expected)
    assert head.sets.coverage == cells.uns[Uns.STOFM][Obs.ANNOTATION]["params"]["coverage"] == 0.8
    assert cells.obs[Obs.NOVELTY].dtype == np.float32
    cells.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert again.obsm[Obsm.ANNOTATION_SET].equals(sets)
    head.save(tmp_path / "head")
    loaded = st.AnnotationHead.load(tmp_path / "head")
    assert (loaded.sets, loaded.novelty, loaded.rejection) == (
        head.sets, head.novelty, head.rejection,
    )  # fmt: skip
    st.tl.annotate(again, head=loaded, key_added="mine", **QUIET)
    np.testing.assert_array_equal(again.obs["mine_novelty"], cells.obs[Obs.NOVELTY])
    np.testing.assert_array_equal(again.obsm["mine_set"], sets)


def test_far_cells_are_novel(cells):
    head = st.tl.annotate(cells, label_key="label", options=RANDOM, **QUIET)
    far = cells.copy()
    far.obsm["X_pca"] = far.obsm["X_pca"] + 30 * np.eye(5, dtype=np.float32)[4]
    st.tl.annotate([cells, far], head=head, **QUIET)
    assert (cells.obs[Obs.NOVELTY] > 1).mean() < 0.3
    assert (far.obs[Obs.NOVELTY] > 2).all()


@pytest.mark.parametrize("coverage", [0, 1, 1.5])
def test_coverage_is_checked(coverage):
    with pytest.raises(ValueError, match="coverage must be above 0 and below 1"):
        st.tl.HeadOptions(coverage=coverage)
