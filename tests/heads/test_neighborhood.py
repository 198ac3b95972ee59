"""Networks of heads that read what lies around cells."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import stofm as st
from stofm._keys import Obs, Obsm
from stofm.heads import fitting, imputation, network
from stofm.heads.gene_columns import GeneColumns
from stofm.heads.inputs import Inputs, Source, add_neighborhood, choose_neighborhood, read_inputs
from stofm.heads.network import HeadTraining
from stofm.heads.options import DEFAULT_REP, FitOptions, Reading
from stofm.heads.sections import resolve_slices
from stofm.heads.targets import Targets
from stofm.spatial.neighbor_graph import neighbor_means

QUIET = {"library_key": "library", "device": "cpu", "show_progress_bar": False}
READING = Reading(**QUIET)


@pytest.fixture
def cells(adata, model, rng):
    """Halves of two slices that differ in single cells hardly, and in ten of them well."""
    st.tl.embed(adata, model, **QUIET)
    adata.obs["half"] = np.where(adata.obsm["spatial"][:, 0] < 350, "west", "east")
    for key in (Obsm.X_CELL, Obsm.X):
        noise = rng.normal(size=adata.obsm[key].shape)
        noise[:, 0] += np.where(adata.obs["half"] == "west", 0.7, -0.7)
        adata.obsm[key] = noise.astype(np.float32)
    return adata


def inputs_of(data, features, use_rep=DEFAULT_REP, widths=(4, 3)):
    return Inputs(features, use_rep, widths, {rep: {} for rep in use_rep})


@pytest.fixture
def inputs(adata, rng):
    return inputs_of(adata, rng.normal(size=(184, 7)).astype(np.float32))


def slices_of(data):
    return resolve_slices(data, "library")


@pytest.mark.parametrize(
    ("use_rep", "widths", "averaged", "of_means"),
    [
        ((Obsm.X_CELL, Obsm.X), (4, 3), slice(0, 4), (4,)),
        ((Obsm.X, Obsm.X_CELL), (3, 4), slice(3, 7), (4,)),
        ((Obsm.X, "X_pca"), (3, 4), slice(0, 7), (3, 4)),
    ],
)
def test_what_is_averaged(adata, inputs, use_rep, widths, averaged, of_means):
    sections = slices_of(adata)
    read = inputs_of(adata, inputs.features, use_rep, widths)
    found = add_neighborhood(sections, read, 5, spatial_key=Obsm.SPATIAL)
    means = neighbor_means(
        inputs.features[:, averaged], adata.obsm["spatial"], sections.slices.rows, 5
    )
    np.testing.assert_array_equal(found.neighborhood, means)
    assert found.n_neighbors == 5
    np.testing.assert_array_equal(found.of("neighborhood"), np.hstack([means, inputs.features]))
    assert found.widths_of("neighborhood") == (*of_means, *widths)
    some = found.take(np.arange(7, 20))
    np.testing.assert_array_equal(some.neighborhood, means[7:20])


def test_the_first_components_are_averaged_too(adata, inputs, rng):
    sections = slices_of(adata)
    expression = rng.normal(size=(184, 63)).astype(np.float32)
    # The cells of one slice have none.
    expression[sections.slices.rows[1]] = np.nan
    read = replace(inputs, expression=expression)
    assert read.sources == ("embedding", "expression")
    found = add_neighborhood(sections, read, 5, spatial_key=Obsm.SPATIAL)
    assert found.sources == get_args(Source)
    first = expression[:, :50]
    means = neighbor_means(first, adata.obsm["spatial"], sections.slices.rows, 5)
    both = found.of("expression neighborhood")
    np.testing.assert_array_equal(both, np.hstack([means, first]))
    assert found.widths_of("expression neighborhood") == (50, 50)
    assert found.widths_of("expression") == (63,)
    has_expression = np.isfinite(expression[:, 0])
    np.testing.assert_array_equal(np.isfinite(both), np.tile(has_expression[:, None], 100))
    rows = np.arange(7, 20)
    np.testing.assert_array_equal(found.take(rows).of("expression neighborhood"), both[rows])


def choose(data, inputs, n_neighbors=None, *, rows=None, **options):
    sections = slices_of(data)
    own = FitOptions(n_neighbors=n_neighbors, **options)
    rows = np.arange(sections.n_obs) if rows is None else rows
    return choose_neighborhood(sections, inputs, own, rows=rows)


@pytest.mark.parametrize(
    ("n_neighbors", "use_rep", "options", "expected"),
    [
        (None, DEFAULT_REP, {}, 10),
        (None, DEFAULT_REP, {"split": "blocks"}, 10),
        # Held-out cells would share their neighbours with fitted ones.
        (None, DEFAULT_REP, {"split": "random"}, 0),
        (None, (Obsm.X_CELL, "X_pca"), {}, 0),
        (4, (Obsm.X_CELL, "X_pca"), {"split": "random"}, 4),
        (0, DEFAULT_REP, {}, 0),
    ],
)
def test_number_of_neighbors(adata, inputs, n_neighbors, use_rep, options, expected):
    read = inputs_of(adata, inputs.features, use_rep)
    found = choose(adata, read, n_neighbors, **options)
    assert found.n_neighbors == expected
    assert (found.neighborhood is None) == (expected == 0)


def test_cells_without_places(adata, inputs):
    del adata.obsm["spatial"]
    assert choose(adata, inputs) is inputs
    with pytest.raises(KeyError, match=r"There is no obsm\['spatial'\]"):
        choose(adata, inputs, 3)


@pytest.mark.parametrize("lack", ["no places", "no usable places"])
@pytest.mark.filterwarnings("ignore:.*without their neighbours")
def test_tables_without_labels_have_no_say(adata, inputs, lack):
    pair = [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]
    expected = choose(pair[0], inputs.take(np.arange(101))).neighborhood
    if lack == "no places":
        del pair[1].obsm["spatial"]
    else:
        pair[1].obsm["spatial"][3, 0] = np.nan
    found = choose(pair, inputs, rows=np.arange(90))
    np.testing.assert_array_equal(found.neighborhood[:101], expected)
    assert np.isnan(found.neighborhood[101:]).all()
    with pytest.raises((KeyError, ValueError), match="spatial"):
        choose(pair, inputs, 10, rows=np.arange(120))


def test_slices_are_those_that_were_embedded(adata, model, inputs, rng):
    adata.obs["bregma"] = adata.obs.pop("library")
    adata.obsm["xy"], adata.obsm["spatial"] = adata.obsm["spatial"], rng.random((184, 2))
    st.tl.embed(adata, model, **(QUIET | {"library_key": "bregma", "spatial_key": "xy"}))
    rows = [np.flatnonzero(adata.obs["bregma"] == name) for name in ("left", "right")]
    expected = neighbor_means(inputs.features[:, :4], adata.obsm["xy"], rows, 10)
    sections = resolve_slices(adata, None)
    found = add_neighborhood(sections, inputs, 10, spatial_key=Obsm.SPATIAL)
    np.testing.assert_array_equal(found.neighborhood, expected)
    st.tl.domains(adata, n_domains=3)
    again = adata.copy()
    st.tl.domains(again, n_domains=3, library_key="bregma", spatial_key="xy")
    assert again.obs[Obs.DOMAIN].equals(adata.obs[Obs.DOMAIN])
    # The column that is read can't be written.
    with pytest.raises(ValueError, match="bregma"):
        st.tl.domains(adata, n_domains=3, key_added="bregma")


def test_small_slices_are_not_judged_by_their_neighbours(adata, inputs):
    adata.obs["library"] = np.where(np.arange(184) < 5, "five", "many")
    sections = slices_of(adata)
    found = add_neighborhood(sections, inputs, 10, spatial_key=Obsm.SPATIAL)
    assert np.isnan(found.neighborhood[:5]).all()
    assert np.isfinite(found.neighborhood[5:]).all()
    # Cells to fit to have what there is.
    assert np.isfinite(choose(adata, inputs).neighborhood).all()


@pytest.fixture
def _short(monkeypatch):
    """Fit networks in a moment."""
    short = HeadTraining(learning_rate=5e-3, max_epochs=6, patience=3)
    monkeypatch.setattr(
        network, "HeadTraining", lambda **own: HeadTraining(**own) if own else short
    )


def fit(data, **options):
    own = {"label_key": "half", "n_heads": 1, "n_components": 0, "n_neighbors": 10, **QUIET}
    return st.tl.annotate(data, **(own | options))


def named(data, head, **options):
    return st.tl.annotate(data, head=head, copy=True, **(QUIET | options))


def accuracy(data, head):
    made = named(data, head)
    best = made.obsm[Obsm.ANNOTATION_PROBA].idxmax(axis=1)
    return (best == data.obs["half"]).mean()


@pytest.mark.usefixtures("_short")
def test_regions_are_told_by_what_is_around(cells, tmp_path):
    left, right = (cells[cells.obs["library"] == name].copy() for name in ("left", "right"))
    head = fit(left)
    assert head.reads == ("embedding", "neighborhood")
    assert head.n_neighbors == 10
    assert head.weights[1] > 0.5
    assert accuracy(right, head) > accuracy(right, fit(left, n_neighbors=0)) + 0.05
    read = read_inputs(slices_of(right), READING)
    beside = head.read_beside(slices_of(right), read, Reading())
    means = neighbor_means(right.obsm[Obsm.X_CELL], right.obsm["spatial"], [np.arange(83)], 10)
    np.testing.assert_array_equal(beside.neighborhood, means)
    head.save(tmp_path / "head")
    again = st.AnnotationHead.load(tmp_path / "head")
    assert again.n_neighbors == head.params["n_neighbors"] == 10
    pd.testing.assert_frame_equal(
        named(cells, again).obsm[Obsm.ANNOTATION_PROBA],
        named(cells, head).obsm[Obsm.ANNOTATION_PROBA],
        check_exact=True,
    )


@pytest.mark.usefixtures("_short")
def test_order_of_cells(cells, rng):
    moved = cells[rng.permutation(184)].copy()
    first, again = (named(one, fit(one)).obsm[Obsm.ANNOTATION_PROBA] for one in (cells, moved))
    pd.testing.assert_frame_equal(first.loc[again.index], again, check_exact=True)


@pytest.mark.usefixtures("_short")
@pytest.mark.filterwarnings("ignore:.*without their neighbours")
def test_a_query_without_places(cells, caplog):
    head = fit(cells, reject_rate=0)
    query = cells.copy()
    del query.obsm["spatial"]
    made = named(query, head)
    assert "184 cells are judged without their neighbours" in caplog.text
    features = np.hstack([cells.obsm[Obsm.X_CELL], cells.obsm[Obsm.X]])
    odds = st.train.apply_head(head.networks[0], features, "classes") ** (1 / head.temperature)
    expected = odds / odds.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(made.obsm[Obsm.ANNOTATION_PROBA], expected, atol=1e-5)
    assert Obs.ANNOTATION in made.obs


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("lack", ["no places", "no usable places"])
@pytest.mark.filterwarnings("ignore:.*without their neighbours")
def test_a_table_without_places_beside_others(cells, lack, caplog):
    parts = [cells[cells.obs["library"] == name].copy() for name in ("left", "right", "left")]
    head = fit(cells)
    whole = named(parts, head, library_key=None)
    if lack == "no places":
        del parts[1].obsm["spatial"]
    else:
        parts[1].obsm["spatial"][3, 0] = np.nan
    found = named(parts, head)
    assert "83 cells are judged without their neighbours" in caplog.text
    for one, other in zip(found, whole, strict=True):
        same = one.obsm[Obsm.ANNOTATION_PROBA].equals(other.obsm[Obsm.ANNOTATION_PROBA])
        assert same == (one.n_obs == 101)


class Toys(fitting.Task):
    name = "toys"
    training = HeadTraining(max_epochs=1)

    def make_head(self, first, splits, common):
        raise NotImplementedError


def test_neighbourhoods_are_by_the_tuned_model(adata, model, monkeypatch):
    tuned = st.Stofm(model.config, model.vocabulary, seed=9).eval()

    class Tuned:
        model, history, best_step = tuned, pd.DataFrame({"epoch": [1], "loss": [0.5]}), 1

        def __init__(self, head):
            self.head = head

    monkeypatch.setattr(fitting, "fine_tune_head", lambda *args, **_: Tuned(args[2]))
    sections = slices_of(adata)
    read = read_inputs(sections, READING, model=model)
    read = add_neighborhood(sections, read, 6, spatial_key=Obsm.SPATIAL, needed=[0])
    targets = Targets("classes", adata.obs["kind"].cat.codes.to_numpy().astype(np.int64), 3)
    split = st.spatial.split_cells(adata.obsm["spatial"], sections.slices.rows, seed=0)
    options = FitOptions(strategy="full", model=model, reading=READING)
    fitted = fitting.fit_first(Toys(targets=targets, options=options), sections, read, split)
    own = fitted.inputs.features[:, : read.widths[0]]
    expected = neighbor_means(own, adata.obsm["spatial"], sections.slices.rows, 6)
    np.testing.assert_array_equal(fitted.inputs.neighborhood, expected)
    assert np.abs(expected - read.neighborhood).max() > 0.01


@pytest.mark.usefixtures("_short")
def test_proportions(cells):
    share = np.where(cells.obs["half"] == "west", 0.9, 0.1)
    cells.obsm["truth"] = pd.DataFrame({"a": share, "b": 1 - share}, index=cells.obs_names)
    options = {"proportions_key": "truth", "n_heads": 1, "n_components": 0, **QUIET}
    head = st.tl.deconvolve(cells, **options)
    assert "neighborhood" in head.reads
    assert head.params["n_neighbors"] == 10
    made = st.tl.deconvolve(cells, head=head, copy=True, **QUIET).obsm[Obsm.DECONVOLUTION]
    alone = st.tl.deconvolve(cells, n_neighbors=0, **options)
    assert alone.reads == ("embedding",)
    before = st.tl.deconvolve(cells, head=alone, copy=True, **QUIET).obsm[Obsm.DECONVOLUTION]
    errors = [np.abs(found["a"] - share).mean() for found in (made, before)]
    assert errors[0] < 0.8 * errors[1]


def test_imputation(adata, model, rng, monkeypatch):
    monkeypatch.setattr(imputation.ExpressionTask, "training", HeadTraining(max_epochs=3))
    west = adata.obsm["spatial"][:, 0] < 350
    dense = adata.X.toarray()
    dense[:, 2] = np.where(west, 9, 1)
    adata.X = sparse.csr_matrix(dense)
    gene = adata.var_names[2]
    monkeypatch.setattr(
        imputation, "stack_weights", lambda errors: np.full(len(errors), 1 / len(errors))
    )
    head = st.tl.impute(adata, genes=[gene], model=model, n_heads=1, **QUIET)
    assert head.reads == get_args(Source)
    query = adata.copy()
    st.tl.impute(query, head=head, model=model, **QUIET)
    assert query.obsm[Obsm.IMPUTED][gene].notna().all()
    bare = resolve_slices(query, "library")
    read = inputs_of(query, rng.normal(size=(184, 7)).astype(np.float32))
    known = [GeneColumns.read(query, model.vocabulary)]
    beside = head.read_beside_panel(bare, known, read, Reading())
    means = neighbor_means(read.features[:, :4], query.obsm["spatial"], bare.slices.rows, 10)
    np.testing.assert_array_equal(beside.neighborhood, means)
    # Of what no model makes neither places nor neighbours are needed, unless asked for.
    query.obsm["X_pca"] = adata.obsm["X_pca"] = dense[:, :6].astype(np.float32)
    del query.obsm["spatial"]
    options = {"genes": [gene], "n_heads": 1, "use_rep": "X_pca", **QUIET}
    st.tl.impute(query, head=st.tl.impute(adata, **options), **QUIET)
    head = st.tl.impute(adata, n_neighbors=3, **options)
    with pytest.raises(KeyError, match=r"There is no obsm\['spatial'\]"):
        st.tl.impute(query, head=head, **QUIET)


@pytest.mark.parametrize("value", [-1, 2.5])
def test_numbers_that_can_not_be(cells, value):
    for call in (
        lambda: fit(cells, n_neighbors=value),
        lambda: st.tl.domains(cells, n_domains=2, library_key="library", n_neighbors=value),
        lambda: st.tl.deconvolve(cells, proportions_key="x", n_neighbors=value, **QUIET),
        lambda: st.tl.impute(cells, genes=["x"], n_neighbors=value, **QUIET),
    ):
        with pytest.raises(ValueError, match=f"n_neighbors must be .* found {value}"):
            call()
