from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import replace
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import torch

import stofm as st
from stofm._keys import Obs, Obsm, Uns
from stofm.nn import Stofm, UntrainedModelWarning
from stofm.spatial import SubSliceConfig


def embed(adata, model, **options):
    st.tl.embed(adata, model, show_progress_bar=False, **options)
    return np.asarray(adata.obsm[options.get("key_added", Obsm.X)])


@pytest.fixture
def one_slice(adata):
    return adata[adata.obs["library"] == "left"].copy()


def test_writes_what_it_says(adata, model):
    before = adata.copy()
    out = embed(adata, model, library_key="library")
    assert out.shape == (184, 14)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert adata.obsm[Obsm.X_CELL].shape == (184, 12)
    assert adata.obsm[Obsm.TOKENS].shape == (184, 40)
    assert adata.obsm[Obsm.COORDINATES].dtype == np.float64
    for key in (Obs.SUBSLICE, Obs.VIRTUAL_CELL):
        assert adata.obs[key].dtype == "category"
    record = adata.uns[Uns.STOFM][Obsm.X]
    assert record["model"] == "tiny"
    assert record["model_fingerprint"] == model.fingerprint
    assert record["cell_encoder"] == model.cell_encoder_fingerprint
    assert record["vocabulary"] == model.vocabulary.fingerprint
    # The user's own parts stay as they were.
    assert (adata.X != before.X).nnz == 0
    assert adata.obs_names.equals(before.obs_names)
    np.testing.assert_array_equal(adata.obsm["spatial"], before.obsm["spatial"])


def test_copy_leaves_the_original_alone(adata, model):
    new = st.tl.embed(adata, model, library_key="library", show_progress_bar=False, copy=True)
    assert Obsm.X in new.obsm
    assert list(adata.obsm) == ["spatial"]
    assert Uns.STOFM not in adata.uns
    assert list(adata.obs) == ["library", "kind"]
    assert adata.var.shape[1] == 0


def test_order_of_rows_permutes_the_rows_and_nothing_else(adata, model, rng):
    expected = embed(adata, model, library_key="library")
    order = rng.permutation(adata.n_obs)
    plain = adata[:, :].copy()
    for key in list(plain.obsm):
        if key != "spatial":
            del plain.obsm[key]
    del plain.uns[Uns.STOFM]
    shuffled = plain[order].copy()
    np.testing.assert_allclose(
        embed(shuffled, model, library_key="library"), expected[order], atol=1e-5
    )


def test_a_slice_alone_is_embedded_as_among_others(adata, model):
    together = embed(adata.copy(), model, library_key="library")
    for name in ("left", "right"):
        rows = (adata.obs["library"] == name).to_numpy()
        alone = embed(adata[rows].copy(), model)
        np.testing.assert_allclose(alone, together[rows], atol=1e-5)


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"token_budget": 50}])
def test_batches_change_nothing(adata, model, options):
    expected = embed(adata.copy(), model, library_key="library")
    out = embed(adata, model, library_key="library", **options)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_same_seed_same_result(one_slice, model):
    first, again = (embed(one_slice.copy(), model, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_shifting_and_scaling_a_slice_changes_nothing(one_slice, model):
    expected = embed(one_slice.copy(), model)
    one_slice.obsm["spatial"] = one_slice.obsm["spatial"] * 0.5 + 1000.0
    np.testing.assert_allclose(embed(one_slice, model), expected, atol=1e-4)


def test_third_coordinate_is_left_out_and_said(one_slice, model, caplog):
    expected = embed(one_slice.copy(), model)
    depth = np.linspace(0, 1, one_slice.n_obs)[:, None]
    one_slice.obsm["spatial"] = np.hstack([one_slice.obsm["spatial"], depth])
    with caplog.at_level(logging.INFO, logger="stofm"):
        out = embed(one_slice, model)
    assert "the first two are used" in caplog.text
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("n_cells", [1, 2, 3])
def test_hardly_any_cells(one_slice, model, n_cells):
    few = one_slice[:n_cells].copy()
    assert np.isfinite(embed(few, model)).all()


def test_cells_without_known_genes_are_embedded_and_counted(one_slice, model):
    counts = one_slice.X.tolil()
    counts[:5] = 0
    one_slice.X = counts.tocsr()
    with pytest.warns(UserWarning, match="5 of 101 cells have no count in any known gene"):
        out = embed(one_slice, model)
    assert np.isfinite(out).all()


def test_the_log_ends_with_a_summary(one_slice, model, caplog):
    with caplog.at_level(logging.INFO, logger="stofm"):
        embed(one_slice, model)
    assert "Computing on" in caplog.text
    last = caplog.records[-1].getMessage()
    assert "101 cells embedded into obsm['X_stofm']: " in last
    assert "cells/s" in last


# What is reused and what is made again


def calls(monkeypatch):
    """Count how often each step runs (ranking always does, to notice changed counts)."""
    from stofm._edge import embedding, places

    counted = {"cells": 0, "layout": 0}

    def count(module, name, step):
        original = getattr(module, name)

        def counting(*args, **kwargs):
            counted[step] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(embedding, "encode_cells", "cells")
    count(places, "lay_out_slice", "layout")
    return counted


def test_a_second_run_reuses_every_step(one_slice, model, monkeypatch):
    counted = calls(monkeypatch)
    first = embed(one_slice, model)
    assert counted == {"cells": 1, "layout": 1}
    np.testing.assert_array_equal(embed(one_slice, model, key_added="again"), first)
    assert counted == {"cells": 1, "layout": 1}


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_reuse_survives_a_file(adata, model, monkeypatch, tmp_path, suffix):
    first = embed(adata, model, library_key="library")
    path = tmp_path / f"slice.{suffix}"
    if suffix == "zarr":
        adata.write_zarr(path)
        again = ad.read_zarr(path)
    else:
        adata.write_h5ad(path)
        again = ad.read_h5ad(path)
    np.testing.assert_array_equal(again.obsm[Obsm.X], first)
    counted = calls(monkeypatch)
    np.testing.assert_allclose(embed(again, model, library_key="library"), first, atol=1e-6)
    assert counted == {"cells": 0, "layout": 0}


def test_the_steps_one_by_one_give_the_same_and_are_reused(one_slice, model, monkeypatch):
    expected = embed(one_slice.copy(), model)
    st.pp.tokenize(one_slice, model, show_progress_bar=False)
    st.tl.encode_cells(one_slice, model, show_progress_bar=False)
    st.pp.subslice(one_slice, model)
    counted = calls(monkeypatch)
    np.testing.assert_array_equal(embed(one_slice, model), expected)
    assert counted == {"cells": 0, "layout": 0}


def test_another_seed_makes_the_layout_again_only(one_slice, model, monkeypatch):
    embed(one_slice, model)
    counted = calls(monkeypatch)
    embed(one_slice, model, seed=5)
    assert counted == {"cells": 0, "layout": 1}


def test_another_model_makes_the_cells_again(one_slice, model, monkeypatch):
    embed(one_slice, model)
    other = Stofm(model.config, model.vocabulary, seed=9).eval()
    expected = embed(one_slice.copy(), other)
    counted = calls(monkeypatch)
    np.testing.assert_array_equal(embed(one_slice, other), expected)
    assert counted == {"cells": 1, "layout": 1}


def test_another_vocabulary_makes_everything_again(one_slice, model, monkeypatch):
    embed(one_slice, model)
    medians = model.vocabulary.medians[::-1].copy()
    other = Stofm(model.config, replace(model.vocabulary, medians=medians), seed=1).eval()
    counted = calls(monkeypatch)
    embed(one_slice, other)
    assert counted == {"cells": 1, "layout": 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_changed_cell_is_noticed(one_slice, model, dtype, rng):
    embed(one_slice, model, dtype=dtype)
    before = one_slice.obsm[Obsm.X_CELL][37].copy()
    counts = one_slice.X.toarray()
    counts[37] = rng.permutation(counts[37])
    one_slice.X = counts
    embed(one_slice, model, dtype=dtype)
    assert np.abs(one_slice.obsm[Obsm.X_CELL][37] - before).max() > 0


def test_tokens_made_again_by_hand_are_noticed(one_slice, model, rng):
    embed(one_slice, model)
    before = one_slice.obsm[Obsm.X_CELL].copy()
    one_slice.X = one_slice.X[:, rng.permutation(one_slice.n_vars)]
    st.pp.tokenize(one_slice, model, show_progress_bar=False)
    embed(one_slice, model)
    assert np.abs(one_slice.obsm[Obsm.X_CELL] - before).max() > 1e-4


def test_renamed_genes_are_noticed(one_slice, model):
    first = embed(one_slice, model)
    one_slice.var_names = one_slice.var_names[::-1].tolist()
    assert np.abs(embed(one_slice, model) - first).max() > 1e-4


@pytest.mark.parametrize("edit", ["place", "merged", "renamed", "missing"])
def test_an_edited_layout_is_made_again(one_slice, model, edit):
    first = embed(one_slice, model)
    labels = one_slice.obs[Obs.VIRTUAL_CELL]
    if edit == "place":
        one_slice.obsm[Obsm.COORDINATES][:] = 0
    elif edit == "merged":
        one_slice.obs[Obs.VIRTUAL_CELL] = labels.astype(str).replace("1", "0").astype("category")
    elif edit == "renamed":
        one_slice.obs[Obs.VIRTUAL_CELL] = ("v" + labels.astype(str)).astype("category")
    else:
        one_slice.obs[Obs.VIRTUAL_CELL] = labels.where(labels != "1")
    np.testing.assert_array_equal(embed(one_slice, model), first)


def test_counts_that_are_no_longer_raw_are_refused(one_slice, model):
    first = embed(one_slice, model)
    one_slice.X = one_slice.X.log1p()
    with pytest.raises(ValueError, match="does not hold raw counts"):
        embed(one_slice, model)
    np.testing.assert_array_equal(one_slice.obsm[Obsm.X], first)


def test_fewer_cells_are_embedded_anew(one_slice, model, monkeypatch):
    embed(one_slice, model)
    few = one_slice[::2].copy()
    plain = ad.AnnData(
        few.X, obs=few.obs[["kind"]], var=few.var[[]], obsm={"spatial": few.obsm["spatial"]}
    )
    expected = embed(plain, model)
    counted = calls(monkeypatch)
    np.testing.assert_allclose(embed(few, model), expected, atol=1e-5)
    assert counted == {"cells": 1, "layout": 1}


def test_moved_cells_get_a_new_layout(one_slice, model, monkeypatch):
    embed(one_slice, model)
    one_slice.obsm["spatial"] = one_slice.obsm["spatial"][::-1].copy()
    counted = calls(monkeypatch)
    embed(one_slice, model)
    assert counted == {"cells": 0, "layout": 1}


def test_layout_with_other_rules_is_replaced_unless_they_are_passed(one_slice, model, monkeypatch):
    embed(one_slice, model)
    rules = replace(model.config.subslice, n_cells=30)
    counted = calls(monkeypatch)
    embed(one_slice, model, subslice=rules)
    assert one_slice.obs[Obs.SUBSLICE].nunique() == 4
    embed(one_slice, model, subslice=rules)
    assert counted["layout"] == 1
    embed(one_slice, model)
    assert counted["layout"] == 2


# Models that read values


@pytest.fixture
def reader(model):
    cell_encoder = replace(
        model.config.cell_encoder, values="log", pooled=True, d_gene=8, max_positions=21
    )
    return Stofm(replace(model.config, cell_encoder=cell_encoder), model.vocabulary, seed=3).eval()


def test_values_are_written_and_reused(one_slice, reader, monkeypatch):
    expected = embed(one_slice.copy(), reader)
    st.pp.tokenize(one_slice, reader, show_progress_bar=False)
    st.tl.encode_cells(one_slice, reader, show_progress_bar=False)
    counted = calls(monkeypatch)
    np.testing.assert_array_equal(embed(one_slice, reader), expected)
    assert counted["cells"] == 0
    assert Obsm.TOKEN_VALUES in one_slice.obsm


def test_other_slices_need_other_sub_slices_only(adata, reader, monkeypatch):
    adata.obs["one"] = "all"
    embed(adata, reader, library_key="library")
    counted = calls(monkeypatch)
    embed(adata, reader, library_key="one")
    assert counted == {"cells": 0, "layout": 1}


# Other input


def test_given_cell_features_take_the_encoders_place(one_slice, model, rng):
    one_slice.obsm["X_mine"] = rng.normal(size=(101, 12))
    out = embed(one_slice, model, cell_rep="X_mine")
    assert np.isfinite(out).all()
    assert Obsm.TOKENS not in one_slice.obsm
    one_slice.obsm["X_mine"] = one_slice.obsm["X_mine"] * 2
    assert np.abs(embed(one_slice, model, cell_rep="X_mine") - out).max() > 1e-3


def test_given_cell_features_of_another_width_are_refused(one_slice, model):
    one_slice.obsm["X_pca"] = np.ones((101, 50))
    with pytest.raises(ValueError, match=r"obsm\['X_pca'\] has 50 columns; .* takes .* of 12"):
        embed(one_slice, model, cell_rep="X_pca")


def test_given_cell_features_that_are_not_there_are_refused(one_slice, model):
    with pytest.raises(KeyError, match=r"no obsm\['X_pca'\].*\['spatial'\]"):
        embed(one_slice, model, cell_rep="X_pca")


def test_backed_file_like_in_memory(one_slice, model, tmp_path):
    expected = embed(one_slice.copy(), model)
    one_slice.write_h5ad(tmp_path / "slice.h5ad")
    backed = ad.read_h5ad(tmp_path / "slice.h5ad", backed="r")
    np.testing.assert_array_equal(embed(backed, model), expected)
    np.testing.assert_array_equal(embed(backed, model), expected)  # reuse, backed
    backed.file.close()


def test_spatialdata_table(one_slice, model):
    # What matters of a SpatialData: its tables.
    data = SimpleNamespace(tables={"cells": one_slice, "bins": None})
    st.tl.embed(data, model, table_key="cells", show_progress_bar=False)
    assert Obsm.X in one_slice.obsm
    with pytest.raises(KeyError, match=r"\['bins', 'cells'\]; pass one of them as `table_key`"):
        st.tl.embed(data, model)


def test_untrained_model_is_announced(one_slice, model):
    untrained = Stofm(replace(model.config, trained=False), model.vocabulary)
    with pytest.warns(UntrainedModelWarning, match="random, not trained"):
        embed(one_slice, untrained)


def test_bfloat16_is_near(one_slice, model):
    expected = embed(one_slice.copy(), model, subslice=SubSliceConfig(n_cells=200))
    near = embed(one_slice, model, dtype="bfloat16", subslice=SubSliceConfig(n_cells=200))
    assert np.corrcoef(near.ravel(), expected.ravel())[0, 1] > 0.95
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_transformer_is_copied_once_for_all_slices(adata, model, monkeypatch):
    from stofm.nn import inference

    copied = []

    def deepcopy(module):
        copied.append(module)
        return copy.deepcopy(module)

    monkeypatch.setattr(inference, "copy", SimpleNamespace(deepcopy=deepcopy))
    embed(adata, model, library_key="library", dtype="bfloat16")
    assert copied == [model.se2_transformer]


def test_records_tell_runs_apart(one_slice, model):
    embed(one_slice, model, key_added="a")
    embed(one_slice, model, key_added="b", seed=5)
    records = one_slice.uns[Uns.STOFM]
    assert records["a"]["params"]["seed"] == 0
    assert records["b"]["params"]["seed"] == 5
    for key in (Obsm.COORDINATES, Obs.SUBSLICE, Obs.VIRTUAL_CELL, Obsm.TOKENS, Obs.N_TOKENS):
        assert records[key]["params"]


def test_a_model_in_training_stays_in_training(one_slice, model):
    expected = embed(one_slice.copy(), model)
    model.train()
    np.testing.assert_array_equal(embed(one_slice, model), expected)
    assert model.training
    assert model.cell_encoder.training
    assert model.se2_transformer.training


def test_a_model_made_without_gradients_embeds(one_slice, model, vocabulary):
    with torch.inference_mode():
        inert = Stofm(model.config, vocabulary, seed=1)
    assert np.isfinite(embed(one_slice, inert)).all()


# Bad input


@pytest.mark.parametrize(
    "key",
    [
        "spatial",
        "stofm_tokens",
        "stofm_token_values",
        "X_stofm_cell",
        "stofm_spatial",
        "subslice",
        "X_mine",
    ],
)
def test_keys_that_mean_something_else_are_not_replaced(one_slice, model, key):
    one_slice.obsm["X_mine"] = np.ones((101, 12))
    with pytest.raises(ValueError, match="would replace something that is used"):
        embed(one_slice, model, key_added=key, cell_rep="X_mine")


def test_a_backed_view_or_copy_is_refused_before_the_work(one_slice, model, tmp_path):
    one_slice.write_h5ad(tmp_path / "slice.h5ad")
    backed = ad.read_h5ad(tmp_path / "slice.h5ad", backed="r")
    for data, options in ((backed[3:50], {}), (backed, {"copy": True})):
        with pytest.raises(ValueError, match=r"use adata\.to_memory\(\)"):
            st.tl.embed(data, model, **options)
    backed.file.close()


def nothing_written(adata):
    return list(adata.obsm) == ["spatial"] and Uns.STOFM not in adata.uns


def test_interrupted_it_leaves_the_data_as_they_were(one_slice, model, monkeypatch):
    from stofm._edge import embedding

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding, "embed_slice", interrupt)
    with pytest.raises(KeyboardInterrupt):
        embed(one_slice, model)
    assert nothing_written(one_slice)


@pytest.mark.parametrize("part", ["se2_transformer.layers.0.fc1", "cell_encoder.projection"])
def test_nan_from_a_device_is_not_written(one_slice, model, part):
    with torch.no_grad():
        model.get_submodule(part).bias += torch.nan
    with pytest.raises(
        FloatingPointError, match="101 of 101 cells is not finite on cpu in float32"
    ):
        embed(one_slice, model)
    assert nothing_written(one_slice)


@pytest.mark.parametrize("option", ["batch_size", "token_budget"])
def test_batches_of_nothing_are_refused(one_slice, model, option):
    with pytest.raises(ValueError, match=f"`{option}` must be at least 1, or left out, found 0"):
        embed(one_slice, model, **{option: 0})


def test_empty_data_is_refused(adata, model):
    with pytest.raises(ValueError, match="has no cells"):
        embed(adata[:0].copy(), model)


def test_something_else_is_refused(model):
    with pytest.raises(TypeError, match="Expected an AnnData or a SpatialData, found ndarray"):
        st.tl.embed(np.zeros((3, 3)), model)
    with pytest.raises(TypeError, match="model must be a Stofm, a folder or a hub id, found int"):
        st.tl.embed(ad.AnnData(np.ones((3, 3))), 3)


def test_log_normalised_counts_are_refused(one_slice, model):
    one_slice.X = one_slice.X.log1p()
    with pytest.raises(ValueError, match="raw counts"):
        embed(one_slice, model)
    assert nothing_written(one_slice)


def test_nothing_is_warned_of_on_good_data(one_slice, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(one_slice, model)
