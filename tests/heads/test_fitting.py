"""Fitting a head, whatever its task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import stofm as st
from stofm.heads import fitting
from stofm.heads.blocks import Blocks, read_embeddings, with_neighborhood
from stofm.heads.request import HeadOptions, Request, resolve_slices
from stofm.heads.targets import Targets
from stofm.spatial.plane import neighbor_means

QUIET = {"library_key": "library", "device": "cpu", "show_progress_bar": False}


def asked(**options):
    return Request(model=options.pop("model", None), options=HeadOptions(**options), **QUIET)


def targets_of(adata, known=None):
    classes = adata.obs["kind"].cat.codes.to_numpy().astype(np.int64)
    return Targets("classes", classes if known is None else np.where(known, classes, -1), 3)


def fit(adata, request, library_key="library"):
    found = fitting.fit(resolve_slices(adata, library_key), targets_of(adata), request, "toys")
    return {**found._asdict(), **found.fields}


def plan(adata, known=None, library_key="library", **options):
    sections = resolve_slices(adata, library_key)
    features = np.random.default_rng(1).random((adata.n_obs, 3)).astype(np.float32)
    blocks = Blocks(features, ("X_pca",), (3,), {"X_pca": {}})
    return fitting.plan_split(sections, targets_of(adata, known), asked(**options), blocks, seed=0)


def test_only_cells_with_a_target_are_split(adata, rng):
    known = rng.random(184) < 0.5
    for options in ({}, {"split": "blocks"}):
        split = plan(adata, known, **options)
        parts = (split.fitted, split.held_out, split.left_out)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.flatnonzero(known))


def test_split_by_slice_or_block(adata):
    assert plan(adata).how == "blocks"
    assert plan(adata, split="slices").how == "slices"
    adata.obs["quarter"] = np.arange(184) % 4
    assert plan(adata, library_key="quarter").how == "slices"
    # A slice without a target does not count.
    known = (adata.obs["quarter"] != 3).to_numpy()
    assert plan(adata, known, library_key="quarter").how == "blocks"


def test_without_coordinates(adata, caplog):
    caplog.set_level("INFO", logger="stofm")
    del adata.obsm["spatial"]
    assert plan(adata, library_key=None).how == "random"
    assert "the split is 'random'" in caplog.text
    assert plan(adata).how == "slices"
    with pytest.raises(KeyError, match="no obsm"):
        plan(adata, library_key=None, split="blocks")


def test_whole_slices_of_which_one_has_known_cells(adata):
    known = (adata.obs["library"] == "left").to_numpy()
    with pytest.raises(ValueError, match=r"split='slices' .* 1 of the 2 slices has cells to learn"):
        plan(adata, known, split="slices")


@pytest.mark.usefixtures("few_epochs")
def test_rounds_hold_out_different_cells(adata, model):
    found = fit(adata, asked(model=model))
    assert len(found["splits"]) == 3
    held_out = {tuple(split.held_out) for split in found["splits"]}
    assert len(held_out) == 3
    assert found["model"] is None
    assert {"network", "reads"} <= set(found["history"])
    assert found["n_neighbors"] == 10
    assert found["split"]["how"] == "blocks"


@pytest.mark.usefixtures("few_epochs")
def test_rounds_hold_out_other_slices(adata, rng):
    adata.obsm["X_pca"] = rng.normal(size=(184, 4)).astype(np.float32)
    adata.obs["quarter"] = np.arange(184) % 4
    for library_key, expected in (("quarter", 3), ("library", 2)):
        request = replace(asked(split="slices"), use_rep="X_pca")
        found = fit(adata, request, library_key)
        # As long as there are others.
        assert len(found["splits"]) == 3
        assert len({split.slices for split in found["splits"]}) == expected


@pytest.mark.usefixtures("few_epochs")
def test_all_that_is_read_is_by_the_tuned_model(adata, model, monkeypatch):
    tuned = st.Stofm(model.config, model.vocabulary, seed=9).eval()
    given = {}

    def tune(_sections, own, head, targets, **options):
        given.update(options, model=own, kind=targets.kind, d_input=head.config.d_input)
        return tuned, pd.DataFrame({"epoch": [1], "loss": [0.5]})

    monkeypatch.setattr("stofm.heads.tuning.fine_tune", tune)
    sections = resolve_slices(adata, "library")
    request = asked(model=model, strategy="full", n_neighbors=6)
    found = fit(adata, request)
    assert given["model"].fingerprint == model.fingerprint
    assert (given["kind"], given["d_input"], given["task"]) == ("classes", 12 + 14, "toys")
    # Tuned and fitted on one split.
    (split,) = found["splits"]
    np.testing.assert_array_equal(given["held_out"], split.held_out)
    assert len(found["members"].held_out) == 1
    assert found["model"] is tuned
    assert "slices" in set(found["history"]["reads"])
    request = replace(request, model=tuned)
    expected = read_embeddings(sections, request)
    expected = with_neighborhood(sections, expected, 6, request)
    np.testing.assert_array_equal(found["blocks"].features, expected.features)
    np.testing.assert_array_equal(found["blocks"].neighborhood, expected.neighborhood)
    assert found["origin"] == expected.origin
    stored = neighbor_means(adata.obsm["X_stofm_cell"], adata.obsm["spatial"], sections.rows, 6)
    assert np.abs(found["blocks"].neighborhood - stored).max() > 0.01


def test_a_model_that_can_not_be_tuned(adata, model, monkeypatch):
    st.tl.embed(adata, model, **QUIET)
    monkeypatch.setattr(fitting, "fit_head", None)
    other = st.Stofm(model.config, model.vocabulary, seed=9).eval()
    origin = read_embeddings(resolve_slices(adata, "library"), Request(**QUIET)).origin
    for given in (None, other):
        with pytest.raises(ValueError, match="pass that model as `model` to tune it"):
            fitting.model_to_tune(Request(model=given), origin)
