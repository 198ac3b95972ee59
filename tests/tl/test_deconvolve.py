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
from stofm.heads.network import apply_head

RULES = st.spatial.SpotRules(n_spots=400, cells_per_spot=(1, 4))
QUIET = {"device": "cpu", "show_progress_bar": False}
KEY, STD = Obsm.DECONVOLUTION, Obsm.DECONVOLUTION_STD
TYPES = ["astro", "micro", "oligo"]

pytestmark = pytest.mark.usefixtures("few_epochs")


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


@pytest.fixture
def embedded(spots, model):
    """The spots with the tiny model's embeddings."""
    st.tl.embed(spots, model, **QUIET)
    return spots


def split_by(options):
    """Arguments of a call, and options of the head."""
    names = st.tl.HeadOptions.__dataclass_fields__
    own = {name: options.pop(name) for name in list(options) if name in names}
    return options | ({"options": st.tl.HeadOptions(**own)} if own else {})


def from_reference(spots, cells, **options):
    options = split_by({"label_key": "kind", "spots": RULES, **options})
    return st.tl.deconvolve(spots, reference=cells, **options, **QUIET)


def from_known(spots, **options):
    options = split_by({"proportions_key": "truth", "use_rep": "X_known", **options})
    return st.tl.deconvolve(spots, **options, **QUIET)


def apply(spots, head, **options):
    return st.tl.deconvolve(spots, head=head, copy=True, **options, **QUIET)


def check_proportions(spots, head, key=KEY):
    found = spots.obsm[key]
    assert list(found.columns) == list(head.types)
    assert list(found.index) == list(spots.obs_names)
    assert found.to_numpy().min() >= 0.0
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-12)
    spread = spots.obsm[key + "_std"]
    assert list(spread.columns) == list(head.types)
    assert spread.to_numpy().min() >= 0.0
    assert spread.to_numpy().max() > 0.0


def test_from_a_reference(spots, cells):
    before = spots.X.copy()
    head = from_reference(spots, cells)
    assert isinstance(head, st.tl.DeconvolutionHead)
    assert head.types == tuple(TYPES)
    check_proportions(spots, head)
    assert st.metrics.pearson(spots.obsm["truth"], spots.obsm[KEY]).min() > 0.7
    record = spots.uns[Uns.STOFM][KEY]
    assert record["params"]["use_rep"] == []
    assert (before != spots.X).nnz == 0
    assert len(head.networks) == 3
    assert set(head.reads) == {"expression"}
    assert len(head.expression.genes) <= 62
    assert head.validation_scores["pearson"].min() > 0.7
    assert head.params["n_spots"] == 400
    # No model is read, and nothing is embedded.
    assert (head.use_rep, head.origin) == ((), {})
    assert set(spots.obsm) == {"spatial", "truth", "X_known", KEY, STD}


def test_from_known_proportions(spots):
    head = from_known(spots)
    assert KEY not in spots.obsm
    st.tl.deconvolve(spots, head=head, **QUIET)
    check_proportions(spots, head)
    assert st.metrics.pearson(spots.obsm["truth"], spots.obsm[KEY]).min() > 0.8
    assert list(head.validation_scores.index) == list(head.types)
    assert head.split["how"] == "blocks"
    assert head.params["proportions_key"] == "truth"


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_types_that_a_file_can_not_name(spots, tmp_path, suffix):
    spots.obsm["truth"].columns = types = ["L2/3", "L2_3", "oligo"]
    head = from_known(spots)
    st.tl.deconvolve(spots, head=head, **QUIET)
    del spots.obsm["truth"]
    path = tmp_path / f"spots.{suffix}"
    getattr(spots, f"write_{suffix}")(path)
    again = getattr(ad, f"read_{suffix}")(path)
    assert list(head.types) == types
    for key in (KEY, STD):
        assert list(again.obsm[key]) == ["L2_3_2", "L2_3", "oligo"]
        axes = st.pl.deconvolution(again, key=key, show=False)
        assert [ax.get_title() for ax in axes] == types
    plt.close("all")
    # They are names of types to learn, too.
    assert list(from_known(again, proportions_key=KEY).types) == types


def test_spread_of_an_earlier_run(spots):
    head = from_known(spots)
    st.tl.deconvolve(spots, head=head, **QUIET)
    first = next(k for k, weight in enumerate(head.weights) if weight > 0)
    for name in ("networks", "reads"):
        object.__setattr__(head, name, getattr(head, name)[first : first + 1])
    object.__setattr__(head, "weights", (1.0,))
    st.tl.deconvolve(spots, head=head, **QUIET)
    assert STD not in {*spots.obsm, *spots.uns[Uns.STOFM]}


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
    head = st.tl.deconvolve(cells, model=model, **options, **QUIET)
    assert head.types == tuple(TYPES)
    assert head.expression is not None
    assert head.use_rep == (Obsm.X_CELL, Obsm.X)
    assert head.params["spot_size"] == 10.0
    # The cells themselves are not embedded, their spots are.
    assert Obsm.X not in cells.obsm
    st.tl.deconvolve(spots, head=head, model=model, **QUIET)
    assert list(spots.obsm[KEY].columns) == list(head.types)


@pytest.mark.parametrize("way", ["reference", "known"])
def test_save_and_load(spots, cells, tmp_path, way):
    head = from_reference(spots, cells) if way == "reference" else from_known(spots)
    head.save(tmp_path / "head")
    again = st.tl.DeconvolutionHead.load(tmp_path / "head")
    assert repr(again) == repr(head)
    assert json.loads((tmp_path / "head" / "config.json").read_text())["task"] == "deconvolution"
    one, other = (apply(spots, which) for which in (head, again))
    for key in (KEY, STD):
        pd.testing.assert_frame_equal(one.obsm[key], other.obsm[key], check_exact=True)
    pd.testing.assert_frame_equal(head.validation_scores, again.validation_scores)
    check_proportions(other, again)


def test_a_head_finds_the_same_as_when_it_was_fitted(spots, cells):
    head = from_reference(spots, cells)
    new = apply(spots[::-1].copy(), head, key_added="again")
    check_proportions(new, head, "again")
    first = spots.obsm[KEY]
    np.testing.assert_allclose(new.obsm["again"].loc[first.index], first, atol=1e-5)


def test_seed_and_order(spots, cells, rng):
    found = []
    for seed in (0, 0, 1):
        from_reference(spots, cells, seed=seed)
        found.append(spots.obsm[KEY].to_numpy())
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3
    order = rng.permutation(80)
    shuffled = spots[order].copy()
    from_reference(shuffled, cells[rng.permutation(90)].copy())
    np.testing.assert_allclose(shuffled.obsm[KEY], found[0][order], atol=1e-4)


def test_messages_name_the_reference(spots, cells):
    cells.layers["counts"], cells.X = cells.X, cells.X * 0.37
    told = r"^reference.X does not .*reference.layers\['counts'\] .*pass reference_layer='counts'"
    with pytest.raises(ValueError, match=told):
        from_reference(spots, cells)
    with pytest.raises(KeyError, match=r"^.The reference: There is no obs\['nope'\] with labels"):
        from_reference(spots, cells, label_key="nope")
    with pytest.raises(KeyError, match=r"The query: There is no layer 'counts'"):
        from_reference(spots, cells, layer="counts")
    cells.obs.loc[cells.obs_names[:40], "kind"] = "other"
    with pytest.warns(UserWarning, match=r"^The reference: .*'other' \(40 cells, 44.4%\)"):
        from_reference(spots, cells, reference_layer="counts")


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_a_query_of_other_genes(spots, cells, rng, caplog):
    head = from_reference(spots, cells)
    expected = spots.obsm[KEY]
    moved = spots[:, rng.permutation(62)].copy()
    np.testing.assert_allclose(apply(moved, head).obsm[KEY], expected, atol=1e-5)
    # Genes that are missing are expected from the others.
    some = apply(spots[:, :50].copy(), head).obsm[KEY]
    assert st.metrics.pearson(spots.obsm["truth"], some).min() > 0.5
    with pytest.raises(ValueError, match="80 of 80 cells have nothing of what the head reads"):
        apply(spots[:, :1].copy(), head)
    assert "genes whose expression the head reads are there, too few" in caplog.text


def test_a_query_of_a_head_without_raw_counts(spots, cells):
    head = from_reference(spots, cells)
    query = spots.copy()
    query.layers["counts"], query.X = query.X, query.X * 0.37
    pd.testing.assert_frame_equal(apply(query, head, layer="counts").obsm[KEY], spots.obsm[KEY])
    with (
        pytest.warns(UserWarning, match="raw counts"),
        pytest.raises(ValueError, match="have nothing of what the head reads"),
    ):
        apply(query, head)


@pytest.mark.filterwarnings("ignore:.*have no counts")
def test_spots_without_counts_are_named(spots, cells, caplog):
    spots.X = spots.X.toarray() * (np.arange(80) > 2)[:, None]
    head = from_reference(spots, cells)
    assert "3 of 80 spots have no counts" in caplog.text
    check_proportions(spots, head)
    check_proportions(apply(spots, head), head)


def test_a_reference_with_several_tables(spots, cells):
    several = SimpleNamespace(tables={"cells": cells, "bins": spots})
    for reference in (several, [cells, several], {"a": several}):
        with pytest.raises(KeyError, match=r"tables \['bins', 'cells'\]; .* reference=sdata"):
            from_reference(spots, reference)
    from_reference(spots, SimpleNamespace(tables={"cells": cells}))
    assert KEY in spots.obsm


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
        ({"proportions_key": "truth", "split": "slices"}, "there is a single one"),
        ({"spot_size": 3.0, "label_key": "kind", "seed": -1}, "seed must be a whole number"),
        (
            {"proportions_key": "truth", "strategy": "lora", "use_rep": "X_known"},
            r"obsm\['X_known'\] are not embeddings",
        ),
        ({"proportions_key": "truth", "use_rep": ()}, "use_rep must name"),
        (
            {"reference": "cells", "label_key": "kind", "n_components": 0},
            "n_components must be .* at least 1",
        ),
        ({"head": "folder"}, None),
    ],
)
def test_options_that_can_not_be(spots, cells, options, message):
    options = {key: cells if value == "cells" else value for key, value in options.items()}
    options = split_by(options)
    keys = set(spots.obsm)
    with pytest.raises(TypeError if message is None else ValueError, match=message or "Expected"):
        st.tl.deconvolve(spots, **options, **QUIET)
    assert set(spots.obsm) == keys
    assert Uns.STOFM not in spots.uns


def test_too_few_spots(spots):
    spots.obsm["truth"].iloc[19:] = np.nan
    with pytest.raises(ValueError, match="19 of 80 spots have known proportions; at least 20"):
        from_known(spots)


def test_types_of_a_reference_that_can_not_be(spots, cells):
    with pytest.raises(KeyError, match=r"There is no obs\['type'\]"):
        from_reference(spots, cells, label_key="type")
    cells.obs["kind"] = ["rare", *cells.obs["kind"][1:]]
    with pytest.warns(UserWarning, match=r"Rare classes of obs\['kind'\] .*: rare \(1\)\."):
        head = from_reference(spots, cells, min_share=0)
    assert head.types == ("astro", "micro", "oligo")
    head = from_reference(spots, cells, missing=["rare"])
    assert head.types == ("astro", "micro", "oligo")


def test_members_for_known_proportions(embedded, tmp_path, scales_of):
    head = from_known(embedded, use_rep=(Obsm.X_CELL, Obsm.X))
    assert set(head.reads) == {
        "embedding",
        "neighborhood",
        "expression",
        "expression neighborhood",
    }
    assert head.expression.axes.shape[0] == 62
    assert head.params["n_neighbors"] == head.n_neighbors == 10
    scales_of(head.networks[0], (12, 12, 14))
    made = apply(embedded, head)
    assert st.metrics.pearson(embedded.obsm["truth"], made.obsm[KEY]).min() > 0.7
    head.save(tmp_path / "head")
    again = apply(embedded, st.tl.DeconvolutionHead.load(tmp_path / "head"))
    for key in (KEY, STD):
        pd.testing.assert_frame_equal(again.obsm[key], made.obsm[key], check_exact=True)
    alone = from_known(embedded, use_rep=(Obsm.X_CELL, Obsm.X), n_components=0, n_neighbors=0)
    assert (alone.expression, set(alone.reads)) == (None, {"embedding"})
    expected = apply(embedded, alone).obsm[KEY]
    embedded.X = None
    pd.testing.assert_frame_equal(apply(embedded, alone).obsm[KEY], expected, check_exact=True)


def test_proportions_are_told_by_what_is_around(embedded, rng):
    west = embedded.obsm["spatial"][:, 0] < 50
    share = np.where(west, 0.9, 0.1)
    for key in (Obsm.X_CELL, Obsm.X):
        noise = rng.normal(size=embedded.obsm[key].shape)
        noise[:, 0] += np.where(west, 0.7, -0.7)
        embedded.obsm[key] = noise.astype(np.float32)
    embedded.obsm["truth"] = pd.DataFrame({"a": share, "b": 1 - share}, index=embedded.obs_names)
    errors = []
    for n_neighbors in (None, 0):
        options = {"n_components": 0, "n_neighbors": n_neighbors}
        head = from_known(embedded, use_rep=(Obsm.X_CELL, Obsm.X), **options)
        errors.append(np.abs(apply(embedded, head).obsm[KEY]["a"] - share).mean())
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_known_proportions_without_raw_counts(embedded, caplog):
    options = {"use_rep": (Obsm.X_CELL, Obsm.X), "n_neighbors": 0}
    head = from_known(embedded, **options)
    embedded.X = embedded.X * 0.37
    made = apply(embedded, head)
    assert "are judged without their expression" in caplog.text
    features = np.hstack([embedded.obsm[Obsm.X_CELL], embedded.obsm[Obsm.X]])
    own = [k for k, source in enumerate(head.reads) if source == "embedding"]
    votes = [apply_head(head.networks[k], features, "proportions") for k in own]
    expected = np.average(votes, axis=0, weights=[head.weights[k] for k in own])
    np.testing.assert_allclose(made.obsm[KEY], expected, atol=1e-6)
    assert from_known(embedded, **options).expression is None
    with pytest.raises(ValueError, match="raw counts"):
        from_known(embedded, n_components=5, **options)


def test_the_layer_that_was_embedded(embedded, model):
    options = {"use_rep": (Obsm.X_CELL, Obsm.X), "n_components": 5}
    expected = apply(embedded, from_known(embedded, **options)).obsm[KEY]
    embedded.layers["raw"], embedded.X = embedded.X.copy(), embedded.X * 0.37
    st.tl.embed(embedded, model, layer="raw", **QUIET)
    head = from_known(embedded, **options)
    assert "expression" in head.reads
    pd.testing.assert_frame_equal(apply(embedded, head).obsm[KEY], expected, check_exact=True)


def test_order_of_spots(embedded, rng):
    moved = embedded[rng.permutation(80)].copy()
    first, again = (
        apply(embedded, from_known(one, use_rep=(Obsm.X_CELL, Obsm.X))).obsm[KEY]
        for one in (embedded, moved)
    )
    pd.testing.assert_frame_equal(first, again, check_exact=True)


def test_squares_of_cells_of_which_a_layer_has_the_counts(cells, model, rng):
    cells = cells[rng.permutation(90)].copy()
    cells.obsm["spatial"] = rng.random((90, 2)) * 70
    cells.layers["raw"], cells.X = cells.X.copy(), cells.X * 0.37
    options = {"label_key": "kind", "spot_size": 10.0, "model": model}
    head = st.tl.deconvolve(cells, layer="raw", **options, **QUIET)
    assert "expression" in head.reads
    # What it is applied to may have its counts in X.
    query = cells.copy()
    query.X = query.layers.pop("raw")
    assert np.isfinite(apply(query, head, model=model).obsm[KEY]).all(axis=None)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.filterwarnings("ignore:Tuning")
def test_tuning_the_model(spots, model):
    head = from_known(spots, use_rep=(Obsm.X_CELL, Obsm.X), model=model, strategy="full")
    assert head.model is not None
    st.tl.deconvolve(spots, head=head, **QUIET)
    check_proportions(spots, head)


def test_a_model_that_can_not_be_tuned_is_refused_before_anything_is_fitted(embedded, monkeypatch):
    monkeypatch.setattr(fitting, "fit_head", None)
    with pytest.raises(ValueError, match="pass that model as `model` to tune it"):
        from_known(embedded, use_rep=(Obsm.X_CELL, Obsm.X), strategy="full")
