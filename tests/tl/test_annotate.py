from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import stofm as st
from stofm._keys import Obs, Obsm, Uns
from stofm.nn import Stofm

KEY, CONFIDENCE, PROBA = Obs.ANNOTATION, Obs.ANNOTATION_CONFIDENCE, Obsm.ANNOTATION_PROBA
QUIET = {"library_key": "library", "device": "cpu", "show_progress_bar": False}


@pytest.fixture
def cells(adata, rng):
    """Both slices with an embedding, X_pca, that tells the three kinds apart but for one in ten."""
    kind = adata.obs["kind"].cat.codes.to_numpy()
    seen = np.where(rng.random(184) < 0.1, rng.integers(0, 3, 184), kind)
    adata.obsm["X_pca"] = (np.eye(3, 9)[seen] * 6 + rng.normal(size=(184, 9))).astype(np.float32)
    return adata


def fit(data, **options):
    usual = {"label_key": "kind", "use_rep": "X_pca", "n_heads": 1, **QUIET}
    return st.tl.annotate(data, **(usual | options))


def apply(data, head, **options):
    return st.tl.annotate(data, head=head, **(QUIET | options))


def test_fields(cells):
    head = fit(cells, split="blocks")
    before = cells.copy()
    assert apply(cells, head) is None
    column, proba = cells.obs[KEY], cells.obsm[PROBA]
    assert column.cat.categories.tolist() == ["0", "1", "2", "unknown"]
    assert (column.astype(str) == cells.obs["kind"].astype(str)).mean() > 0.8
    assert list(proba) == list(head.classes) == ["0", "1", "2"]
    assert proba.index.equals(cells.obs_names)
    np.testing.assert_allclose(proba.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(cells.obs[CONFIDENCE], proba.max(axis=1))
    named = column != "unknown"
    assert (proba.idxmax(axis=1)[named] == column[named].astype(str)).all()
    record = cells.uns[Uns.STOFM][KEY]
    assert record["params"]["label_key"] == "kind"
    assert record["params"]["use_rep"] == ["X_pca"]
    assert (cells.X != before.X).nnz == 0
    assert cells.obs_names.equals(before.obs_names)


def test_fitting_writes_nothing(cells):
    keys = (list(cells.obs), list(cells.obsm), list(cells.uns))
    fit(cells)
    assert keys == (list(cells.obs), list(cells.obsm), list(cells.uns))


def test_file_round_trip(cells, tmp_path):
    head = fit(cells)
    apply(cells, head)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    import anndata as ad

    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(again.obsm[PROBA], cells.obsm[PROBA])
    assert again.obs[KEY].equals(cells.obs[KEY])


def test_head_round_trip(cells, tmp_path):
    head = fit(cells, reject_rate=0.2, split="blocks")
    head.save(tmp_path / "head")
    again = st.AnnotationHead.load(tmp_path / "head")
    assert again.rejection == head.rejection
    assert again.temperature == head.temperature
    assert again.classes == head.classes
    first, second = (apply(cells, one, copy=True) for one in (head, again))
    pd.testing.assert_frame_equal(first.obsm[PROBA], second.obsm[PROBA], check_exact=True)
    assert first.obs[KEY].equals(second.obs[KEY])


def test_copy_and_several_slices(cells):
    parts = {name: cells[cells.obs["library"] == name].copy() for name in ("left", "right")}
    head = fit(parts, library_key=None, split="slices")
    assert head.split["how"] == "slices"
    assert head.split["held_out_slices"][0] in parts
    made = apply(parts, head, library_key=None, copy=True, key_added="mine")
    assert list(made) == ["left", "right"]
    for name, part in parts.items():
        assert "mine" not in part.obs
        assert made[name].obs["mine"].notna().all()
        assert list(made[name].obsm["mine_proba"]) == ["0", "1", "2"]
        assert made[name].obs["mine_confidence"].dtype == np.float32
    # Cells are the same alone or together with others.
    together = apply(cells, head, copy=True)
    alone = made["left"].obsm["mine_proba"]
    np.testing.assert_allclose(together.obsm[PROBA].loc[alone.index], alone, atol=1e-6)


def test_seed_and_order_of_cells(cells, rng):
    moved = cells[rng.permutation(184)].copy()
    for split in ("slices", "blocks", "random"):
        first, again = (
            apply(cells, fit(data, split=split, n_heads=2), copy=True) for data in (cells, moved)
        )
        pd.testing.assert_frame_equal(first.obsm[PROBA], again.obsm[PROBA], check_exact=True)
        assert first.obs[KEY].equals(again.obs[KEY])
    other = apply(cells, fit(cells, split=split, seed=1, n_heads=2), copy=True)
    assert not np.array_equal(first.obsm[PROBA], other.obsm[PROBA])


def test_missing_and_rare_labels_are_left_out(cells):
    labels = cells.obs["kind"].astype(str).to_numpy(dtype=object)
    labels[:20], labels[20:30], labels[30] = "Other", None, "rare"
    cells.obs["label"] = labels
    told = r"in obs\['label'\] are left out.*'Other' \(20 cells, 10.9%\).* pass missing=\[\]"
    rare = r"0.01 of .* \(1 cells\): rare.* pass min_share=0"
    with pytest.warns(UserWarning, match=rare), pytest.warns(UserWarning, match=told):
        head = fit(cells, label_key="label", split="random")
    assert head.classes == ("0", "1", "2")
    assert head.params["left_out_classes"] == ["rare"]
    assert head.split["n_fitted"] + head.split["n_held_out"] == 184 - 31
    head = fit(cells, label_key="label", split="random", missing=["rare"])
    assert head.classes == ("0", "1", "2", "Other")


def test_a_class_that_would_be_held_out_is_fitted(cells, caplog):
    caplog.set_level("INFO", logger="stofm")
    slices = cells.obs["library"].astype(str)
    lone = (cells.obs["kind"] == "2") & (
        cells.obsm["spatial"][:, 0] > np.median(cells.obsm["spatial"][:, 0])
    )
    cells.obs["label"] = np.where(lone, slices + "2", cells.obs["kind"])
    head = fit(cells, label_key="label", split="slices")
    held_out = head.split["held_out_slices"][0]
    cells_of = (cells.obs["label"] == f"{held_out}2").sum()
    assert f"would have all cells of {held_out}2; these {cells_of} cells are fitted" in caplog.text
    assert head.split["n_moved"] == cells_of
    n_others = head.split["n_held_out"] + head.split["n_left_out"]
    assert n_others == (slices == held_out).sum() - cells_of
    assert f"{held_out}2" in set(apply(cells, head, copy=True).obs[KEY])


def test_few_held_out_cells_are_told_about(cells, caplog):
    caplog.set_level("INFO", logger="stofm")
    fit(cells, split="random")
    assert "18 cells of 3 of 3 classes are held out" in caplog.text


def test_options_are_checked_before_anything_is_embedded(adata, model):
    reps = ("X_stofm_cell", "X_stofm")
    adata.obs["kind"] = adata.obs["kind"].cat.rename_categories(["unknown", "b", "c"])
    for wrong in ({"split": "rows"}, {"seed": -1}, {"missing": []}):
        with pytest.raises(ValueError, match=r"must be|has a class 'unknown'"):
            fit(adata, use_rep=reps, model=model, **wrong)
    assert Obsm.X_CELL not in adata.obsm


def test_numbers_with_missing_ones(cells):
    cells.obs["number"] = np.where(np.arange(184) % 5, cells.obs["kind"].astype(int), np.nan)
    head = fit(cells, label_key="number")
    assert head.classes == ("0", "1", "2")
    apply(cells, head)
    axes = st.pl.annotation(cells, truth_key="number", library_key="library", show=False)
    assert "accuracy" in " ".join(ax.get_title() for ax in axes)


def test_unknown(cells, rng):
    head = fit(cells, split="random", reject_rate=0.4)
    rejection = head.rejection
    assert 0.2 < rejection.measured <= 0.4
    assert head.validation_scores["unknown"].tolist() == [pytest.approx(rejection.measured)]
    known = (apply(cells, head, copy=True).obs[KEY] == "unknown").mean()
    # As far from one class as from another.
    cells.obsm["X_pca"] = rng.normal(size=(184, 9)).astype(np.float32)
    strange = apply(cells, head, copy=True)
    assert (strange.obs[KEY] == "unknown").mean() > max(0.6, known + 0.2)
    unsure = strange.obs[CONFIDENCE] < rejection.least_probability
    assert unsure[strange.obs[KEY] == "unknown"].all()
    never = apply(cells, fit(cells, reject_rate=0), copy=True)
    assert not (never.obs[KEY] == "unknown").any()


def test_class_weights(cells):
    cells.obs["pair"] = np.where(
        (cells.obs["kind"] == "0") & (np.arange(184) % 4 == 0), "few", "many"
    )
    leanings = []
    for weights in (None, "balanced"):
        head = fit(cells, label_key="pair", class_weights=weights, split="random")
        proba = apply(cells, head, copy=True).obsm[PROBA]
        # Before calibration, which takes back part of it.
        leanings.append(head.temperature * np.log(proba["few"] / proba["many"]).mean())
    assert leanings[1] > leanings[0] + 0.5


def test_embeddings_are_made_where_they_are_missing(adata, model):
    head = fit(adata, use_rep=("X_stofm_cell", "X_stofm"), model=model, split="random")
    assert {Obsm.X_CELL, Obsm.X} <= set(adata.obsm)
    assert head.origin[Obsm.X]["model_fingerprint"] == model.fingerprint
    # Half of the genes, as in another panel.
    query = adata[:, ::2].copy()
    query.obsm = {"spatial": adata.obsm["spatial"]}
    query.uns = {}
    made = apply(query, head, model=model, copy=True)
    assert Obsm.X not in query.obsm
    assert made.obs[KEY].notna().all()
    assert made.uns[Uns.STOFM][KEY]["model_fingerprint"] == model.fingerprint


def test_another_panel():
    slices = [st.datasets.simulate_slice(700, 150, seed=seed) for seed in (0, 1)]
    fitted, query = slices[0][:, :100].copy(), slices[1][:, 50:].copy()
    options = {"device": "cpu", "show_progress_bar": False}
    head = st.tl.annotate(fitted, label_key="region", n_heads=1, **options)
    st.tl.annotate(query, head=head, **options)
    truth = query.obs["region"].astype(str)
    found = query.obsm[PROBA].idxmax(axis=1)
    assert st.metrics.accuracy(truth, found) > 1.3 * truth.value_counts(normalize=True).iloc[0]


def test_another_models_embedding_is_refused(adata, model):
    head = fit(adata, use_rep=("X_stofm_cell", "X_stofm"), model=model)
    other = Stofm(model.config, model.vocabulary, seed=8).eval()
    st.tl.embed(adata, other, **QUIET)
    with pytest.raises(
        ValueError, match=rf"is by tiny .* fitted to .*tiny \({model.cell_encoder_fingerprint}"
    ):
        apply(adata, head)
    assert KEY not in adata.obs
    apply(adata, head, model=model)
    assert adata.uns[Uns.STOFM][Obsm.X]["model_fingerprint"] == other.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_key": None}, "found neither"),
        ({"strategy": "tuned"}, "strategy must be one of"),
        ({"reject_rate": 1.0}, "reject_rate must be from 0"),
        ({"class_weights": "equal"}, "class_weights must be one of \\[None, 'balanced'\\]"),
        ({"split": "rows"}, "split must be one of"),
        ({"label_key": "one"}, "has a single class"),
        ({"label_key": "single", "min_share": 0}, r"one cell each: \['c'\]"),
        ({"strategy": "full"}, "not embeddings"),
    ],
)
def test_bad_fits(cells, options, message):
    cells.obs["one"] = "a"
    cells.obs["single"] = ["a", "b"] * 91 + ["c", "a"]
    with pytest.raises(ValueError, match=message):
        fit(cells, **options)


def test_bad_use(cells):
    head = fit(cells)
    with pytest.raises(ValueError, match="found both"):
        fit(cells, head=head)
    with pytest.raises(TypeError, match=r"AnnotationHead.load\(path\)"):
        apply(cells, "folder")
    with pytest.raises(ValueError, match="choose another name"):
        apply(cells, head, key_added="X_pca")
    with pytest.raises(KeyError, match="did you mean"):
        fit(cells, label_key="kinds")
    cells.obsm["X_pca"] = cells.obsm["X_pca"][:, :5]
    with pytest.raises(ValueError, match="reads 9 columns"):
        apply(cells, head)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("strategy", ["lora", "full"])
@pytest.mark.filterwarnings("ignore:Tuning")
def test_a_tuned_model_goes_with_the_head(adata, model, tmp_path, strategy):
    before = model.fingerprint
    st.tl.embed(adata, model, **QUIET)
    stored = adata.obsm[Obsm.X].copy()
    reps = ("X_stofm_cell", "X_stofm")
    head = fit(adata, use_rep=reps, model=model, strategy=strategy, split="blocks")
    assert model.fingerprint == before
    assert head.strategy == strategy
    assert head.origin[Obsm.X]["model_fingerprint"] == head.model.fingerprint
    head.save(tmp_path / "head")
    again = st.AnnotationHead.load(tmp_path / "head")
    made = [apply(adata, one, copy=True) for one in (head, again)]
    pd.testing.assert_frame_equal(made[0].obsm[PROBA], made[1].obsm[PROBA], check_exact=True)
    # The embeddings by the model before tuning stay.
    np.testing.assert_array_equal(made[0].obsm[Obsm.X], stored)
