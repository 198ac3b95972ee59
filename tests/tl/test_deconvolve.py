from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import stofm as st
from stofm._keys import Obsm, Uns
from stofm.heads import fitting

RULES = st.spatial.SpotRules(n_spots=400, cells_per_spot=(1, 4))
QUIET = {"device": "cpu", "show_progress_bar": False}


@pytest.fixture
def cells(rng, vocabulary):
    """A reference: 90 cells of three types, 67 genes."""
    profiles = rng.gamma(0.3, 6.0, (3, 67))
    kind = np.repeat([0, 1, 2], 30)
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(profiles[kind]).astype(np.float32)),
        obs=pd.DataFrame(
            {"kind": np.array(["astro", "micro", "oligo"])[kind]},
            index=[f"c{k}" for k in range(90)],
        ),
        var=pd.DataFrame(index=vocabulary.gene_ids),
    )


@pytest.fixture
def spots(cells, rng):
    """80 spots of three cells of the reference each, in the plane; five genes less."""
    members = rng.integers(0, 90, (80, 3))
    counts = cells.X.toarray()[members].sum(axis=1)[:, 5:]
    shares = pd.get_dummies(cells.obs["kind"]).to_numpy(dtype=float)[members].mean(axis=1)
    names = [f"s{k}" for k in range(80)]
    return ad.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(index=names),
        var=cells.var.iloc[5:],
        obsm={
            "spatial": rng.random((80, 2)) * 100,
            "truth": pd.DataFrame(shares, index=names, columns=["astro", "micro", "oligo"]),
            # What a head can learn from in a moment.
            "X_known": (shares @ rng.normal(size=(3, 6))).astype(np.float32),
        },
    )


def from_reference(spots, cells, model, **options):
    options = {"label_key": "kind", "spots": RULES, "n_components": 8, "n_heads": 2, **options}
    return st.tl.deconvolve(spots, reference=cells, model=model, **options, **QUIET)


def from_known(spots, **options):
    options = {"proportions_key": "truth", "use_rep": "X_known", **options}
    return st.tl.deconvolve(spots, **options, **QUIET)


def check_proportions(spots, head, key=Obsm.DECONVOLUTION):
    found = spots.obsm[key]
    assert list(found.columns) == list(head.types)
    assert list(found.index) == list(spots.obs_names)
    assert found.to_numpy().min() >= 0.0
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-12)
    spread = spots.obsm[key + "_std"]
    assert list(spread.columns) == list(head.types)
    assert spread.to_numpy().min() >= 0.0
    assert spread.to_numpy().max() > 0.0


def test_projection_and_components_have_a_scale_each(spots, cells, model, scales_of):
    head = from_reference(spots, cells, model, n_components=6)
    d_cell = model.config.cell_encoder.d_cell
    for network in head.networks:
        assert len(set(scales_of(network, (d_cell, 6)))) == 2


def test_from_a_reference(spots, cells, model):
    before = spots.X.copy()
    head = from_reference(spots, cells, model)
    assert isinstance(head, st.tl.DeconvolutionHead)
    assert head.types == ("astro", "micro", "oligo")
    check_proportions(spots, head)
    assert st.metrics.pearson(spots.obsm["truth"], spots.obsm[Obsm.DECONVOLUTION]).min() > 0.7
    record = spots.uns[Uns.STOFM][Obsm.DECONVOLUTION]
    assert record["cell_encoder"] == model.cell_encoder_fingerprint
    assert record["params"]["n_heads"] == 2
    assert (before != spots.X).nnz == 0
    assert len(head.networks) == 2
    assert len(head.panel.genes) <= 62
    assert head.validation_scores["pearson"].min() > 0.7
    assert head.params["n_spots"] == 400
    # Nothing that a simulated spot can not have is read, so nothing is embedded.
    assert Obsm.X not in spots.obsm


def test_from_known_proportions(spots):
    head = from_known(spots)
    assert Obsm.DECONVOLUTION not in spots.obsm
    st.tl.deconvolve(spots, head=head, **QUIET)
    check_proportions(spots, head)
    assert st.metrics.pearson(spots.obsm["truth"], spots.obsm[Obsm.DECONVOLUTION]).min() > 0.8
    assert list(head.validation_scores.index) == list(head.types)
    assert head.split["how"] == "blocks"
    assert head.params["proportions_key"] == "truth"


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_types_that_a_file_can_not_name(spots, tmp_path, suffix):
    spots.obsm["truth"].columns = types = ["L2/3", "L2_3", "oligo"]
    head = from_known(spots, n_heads=2)
    st.tl.deconvolve(spots, head=head, **QUIET)
    del spots.obsm["truth"]
    path = tmp_path / f"spots.{suffix}"
    getattr(spots, f"write_{suffix}")(path)
    again = getattr(ad, f"read_{suffix}")(path)
    assert list(head.types) == types
    for key in (Obsm.DECONVOLUTION, Obsm.DECONVOLUTION_STD):
        assert list(again.obsm[key]) == ["L2_3_2", "L2_3", "oligo"]
        axes = st.pl.deconvolution(again, key=key, show=False)
        assert [ax.get_title() for ax in axes] == types
    plt.close("all")
    # One head has no spread: that of the earlier run is gone, with its names.
    st.tl.deconvolve(again, head=from_known(again, proportions_key=Obsm.DECONVOLUTION, n_heads=1))
    assert list(st.tl.deconvolve(again, head=head, copy=True).obsm[Obsm.DECONVOLUTION_STD])
    assert Obsm.DECONVOLUTION_STD not in {*again.obsm, *again.uns[Uns.STOFM]}


def test_rows_without_proportions_are_left_out(spots, caplog):
    spots.obsm["truth"].iloc[:30, 1] = np.nan
    with caplog.at_level(logging.INFO, "stofm"):
        head = from_known(spots)
    assert "30 of 80 spots have no known proportions" in caplog.text
    assert sum(head.split[name] for name in ("n_fitted", "n_held_out", "n_left_out")) == 50


def test_from_single_cells_on_a_grid(cells, spots, model, rng):
    cells.obsm["places"] = rng.random((90, 2)) * 70
    cells.obs["kind"] = cells.obs["kind"].where(np.arange(90) != 4, None)
    options = {"label_key": "kind", "spot_size": 10.0, "spatial_key": "places"}
    one_network = {"n_heads": 1, "n_components": 0, "n_neighbors": 0}
    head = st.tl.deconvolve(cells, model=model, **one_network, **options, **QUIET)
    assert head.types == ("astro", "micro", "oligo")
    assert head.use_rep == (Obsm.X_CELL, Obsm.X)
    assert head.params["spot_size"] == 10.0
    # The cells themselves are not embedded, their spots are.
    assert Obsm.X not in cells.obsm
    st.tl.deconvolve(spots, head=head, model=model, **QUIET)
    assert list(spots.obsm[Obsm.DECONVOLUTION].columns) == list(head.types)
    # A single network has no spread.
    assert Obsm.DECONVOLUTION_STD not in spots.obsm


@pytest.mark.parametrize("way", ["reference", "known"])
def test_save_and_load(spots, cells, model, tmp_path, way):
    head = from_reference(spots, cells, model) if way == "reference" else from_known(spots)
    head.save(tmp_path / "head")
    again = st.tl.DeconvolutionHead.load(tmp_path / "head")
    assert repr(again) == repr(head)
    assert json.loads((tmp_path / "head" / "config.json").read_text())["task"] == "deconvolution"
    one, other = (
        st.tl.deconvolve(spots, head=which, model=model, copy=True, **QUIET)
        for which in (head, again)
    )
    pd.testing.assert_frame_equal(one.obsm[Obsm.DECONVOLUTION], other.obsm[Obsm.DECONVOLUTION])
    pd.testing.assert_frame_equal(head.validation_scores, again.validation_scores)
    check_proportions(other, again)


def test_a_head_finds_the_same_as_when_it_was_fitted(spots, cells, model):
    head = from_reference(spots, cells, model)
    new = st.tl.deconvolve(
        spots[::-1].copy(), head=head, model=model, key_added="again", copy=True, **QUIET
    )
    check_proportions(new, head, "again")
    first = spots.obsm[Obsm.DECONVOLUTION]
    np.testing.assert_allclose(new.obsm["again"].loc[first.index], first, atol=1e-5)


def test_seed_and_order(spots, cells, model, rng):
    found = []
    for seed in (0, 0, 1):
        from_reference(spots, cells, model, seed=seed)
        found.append(spots.obsm[Obsm.DECONVOLUTION].to_numpy())
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3
    order = rng.permutation(80)
    shuffled = spots[order].copy()
    from_reference(shuffled, cells[rng.permutation(90)].copy(), model)
    np.testing.assert_allclose(shuffled.obsm[Obsm.DECONVOLUTION], found[0][order], atol=1e-4)


def test_messages_name_the_reference(spots, cells, model):
    cells.layers["counts"], cells.X = cells.X, cells.X * 0.37
    told = r"^reference.X does not .*reference.layers\['counts'\] .*pass reference_layer='counts'"
    with pytest.raises(ValueError, match=told):
        from_reference(spots, cells, model)
    with pytest.raises(KeyError, match=r"^.The reference: There is no obs\['nope'\] with labels"):
        from_reference(spots, cells, model, label_key="nope")
    with pytest.raises(KeyError, match=r"The query: There is no layer 'counts'"):
        from_reference(spots, cells, model, layer="counts")
    cells.obs.loc[cells.obs_names[:40], "kind"] = "other"
    with pytest.warns(UserWarning, match=r"^The reference: .*'other' \(40 cells, 44.4%\)"):
        from_reference(spots, cells, model, reference_layer="counts")


@pytest.mark.filterwarnings("ignore:.*count as 0")
def test_a_head_for_other_genes(spots, cells, model, caplog):
    head = from_reference(spots, cells, model)
    st.tl.deconvolve(spots[:, :50].copy(), head=head, model=model, **QUIET)
    assert "genes that the head reads are not in adata and count as 0" in caplog.text
    with pytest.raises(ValueError, match=r"Only \d+ of the 60 genes that the head reads"):
        st.tl.deconvolve(spots[:, :20].copy(), head=head, model=model, **QUIET)


def test_a_head_for_another_model(spots, cells, model):
    head = from_reference(spots, cells, model)
    other = st.Stofm(model.config, model.vocabulary, seed=2).eval()
    with pytest.raises(ValueError, match=r"fitted to what tiny .* makes of spots"):
        st.tl.deconvolve(spots, head=head, model=other, **QUIET)


@pytest.mark.filterwarnings("ignore:.*have no counts")
def test_spots_without_counts_are_named(spots, cells, model, caplog):
    head = from_reference(spots, cells, model)
    spots.X = spots.X.toarray() * (np.arange(80) > 2)[:, None]
    st.tl.deconvolve(spots, head=head, model=model, **QUIET)
    assert "3 of 80 spots have no counts" in caplog.text
    check_proportions(spots, head)


@pytest.mark.filterwarnings("ignore:.*have no counts")
def test_spots_without_counts_are_named_when_a_head_is_fitted(spots, cells, model, caplog):
    spots.X = spots.X.toarray() * (np.arange(80) > 2)[:, None]
    from_reference(spots, cells, model, n_heads=1)
    assert "3 of 80 spots have no counts" in caplog.text


def test_names_of_types_stay_when_they_look_like_something_else(spots, tmp_path):
    spots.obsm["truth"].columns = ["0", "NA", "None"]
    head = from_known(spots, n_heads=1)
    head.save(tmp_path / "head")
    again = st.tl.DeconvolutionHead.load(tmp_path / "head")
    pd.testing.assert_frame_equal(head.validation_scores, again.validation_scores)
    assert list(again.validation_scores.index) == ["0", "NA", "None"]


def test_a_reference_with_several_tables(spots, cells, model):
    several = SimpleNamespace(tables={"cells": cells, "bins": spots})
    for reference in (several, [cells, several], {"a": several}):
        with pytest.raises(KeyError, match=r"tables \['bins', 'cells'\]; .* reference=sdata"):
            from_reference(spots, reference, model)
    from_reference(spots, SimpleNamespace(tables={"cells": cells}), model, n_heads=1)
    assert Obsm.DECONVOLUTION in spots.obsm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"Pass one of proportions_key= .* found none"),
        (
            {"proportions_key": "truth", "spot_size": 3.0},
            r"found \['proportions_key', 'spot_size'\]",
        ),
        ({"spot_size": 3.0}, "spot_size= needs label_key="),
        ({"reference": "cells"}, "reference= needs label_key="),
        (
            {"reference": "cells", "label_key": "kind", "strategy": "lora"},
            r"strategy='lora' does not go with reference=",
        ),
        ({"reference": "cells", "label_key": "kind", "copy": True}, "copy=True does not go with"),
        (
            {"reference": "cells", "label_key": "kind", "key_added": "X_stofm"},
            "key_added='X_stofm' would replace",
        ),
        (
            {"proportions_key": "truth", "n_heads": 0},
            "n_heads must be a whole number of at least 1, found 0",
        ),
        (
            {"reference": "cells", "label_key": "kind", "n_components": -1},
            "n_components must be a whole number of at least 0, found -1",
        ),
        ({"reference": "cells", "label_key": "kind", "split": "s"}, "split must be one of"),
        ({"proportions_key": "truth", "split": "slices"}, "there is a single one"),
        ({"spot_size": 3.0, "label_key": "kind", "seed": -1}, "seed must be a whole number"),
        (
            {"proportions_key": "truth", "strategy": "lora", "use_rep": "X_known"},
            r"obsm\['X_known'\] are not embeddings",
        ),
        ({"proportions_key": "truth", "strategy": "some"}, "strategy must be one of"),
        ({"head": "folder"}, None),
    ],
)
def test_options_that_can_not_be(spots, cells, options, message):
    options = {key: cells if value == "cells" else value for key, value in options.items()}
    keys = set(spots.obsm)
    with pytest.raises(TypeError if message is None else ValueError, match=message or "Expected"):
        st.tl.deconvolve(spots, **options, **QUIET)
    assert set(spots.obsm) == keys
    assert Uns.STOFM not in spots.uns


def test_too_few_spots(spots):
    spots.obsm["truth"].iloc[19:] = np.nan
    with pytest.raises(ValueError, match="19 of 80 spots have known proportions; at least 20"):
        from_known(spots)


def test_types_of_a_reference_that_can_not_be(spots, cells, model):
    with pytest.raises(KeyError, match=r"There is no obs\['type'\]"):
        from_reference(spots, cells, model, label_key="type")
    cells.obs["kind"] = ["rare", *cells.obs["kind"][1:]]
    with pytest.raises(ValueError, match=r"one cell each: \['rare'\]"):
        from_reference(spots, cells, model)
    head = from_reference(spots, cells, model, missing=["rare"])
    assert head.types == ("astro", "micro", "oligo")


@pytest.mark.usefixtures("few_steps")
@pytest.mark.filterwarnings("ignore:Tuning")
def test_tuning_the_model(spots, model):
    head = from_known(spots, use_rep=(Obsm.X_CELL, Obsm.X), model=model, strategy="full", n_heads=2)
    assert head.model is not None
    assert head.reads.count("embedding") == 2
    st.tl.deconvolve(spots, head=head, **QUIET)
    check_proportions(spots, head)


def test_a_model_that_can_not_be_tuned_is_refused_before_anything_is_fitted(
    spots, model, monkeypatch
):
    st.tl.embed(spots, model, **QUIET)
    monkeypatch.setattr(fitting, "fit_head", None)
    with pytest.raises(ValueError, match="pass that model as `model` to tune it"):
        from_known(spots, use_rep=(Obsm.X_CELL, Obsm.X), strategy="full")
