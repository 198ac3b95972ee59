from __future__ import annotations

from typing import get_args

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import stofm as st
from stofm._keys import Obs, Obsm, Uns
from stofm.heads.blocks import Source
from stofm.heads.network import apply_head
from stofm.nn import Stofm

KEY, CONFIDENCE, PROBA = Obs.ANNOTATION, Obs.ANNOTATION_CONFIDENCE, Obsm.ANNOTATION_PROBA
QUIET = {"library_key": "library", "device": "cpu", "show_progress_bar": False}
EMBEDDINGS = (Obsm.X_CELL, Obsm.X)

pytestmark = pytest.mark.usefixtures("few_epochs")


@pytest.fixture
def cells(adata, rng):
    """Both slices with an embedding, X_pca, that tells the three kinds apart but for one in ten."""
    kind = adata.obs["kind"].cat.codes.to_numpy()
    seen = np.where(rng.random(184) < 0.1, rng.integers(0, 3, 184), kind)
    adata.obsm["X_pca"] = (np.eye(3, 9)[seen] * 6 + rng.normal(size=(184, 9))).astype(np.float32)
    return adata


@pytest.fixture
def embedded(adata, model):
    """Both slices with the tiny model's embeddings."""
    st.tl.embed(adata, model, **QUIET)
    return adata


@pytest.fixture
def halves(embedded, rng):
    """Halves of two slices, which an embedding tells in single cells hardly, in ten of them well."""
    west = embedded.obsm["spatial"][:, 0] < 350
    embedded.obs["half"] = np.where(west, "west", "east")
    for key in EMBEDDINGS:
        noise = rng.normal(size=embedded.obsm[key].shape)
        noise[:, 0] += np.where(west, 0.7, -0.7)
        embedded.obsm[key] = noise.astype(np.float32)
    return embedded


def split_by(options):
    """Arguments of a call, and options of the head."""
    names = st.tl.HeadOptions.__dataclass_fields__
    own = {name: options.pop(name) for name in list(options) if name in names}
    return options | ({"options": st.tl.HeadOptions(**own)} if own else {})


def fit(data, **options):
    usual = {"label_key": "kind", "use_rep": "X_pca", **QUIET}
    return st.tl.annotate(data, **(usual | split_by(options)))


def learn(data, **options):
    """Fit to embeddings of a model."""
    return fit(data, **({"use_rep": EMBEDDINGS} | options))


def apply(data, head, **options):
    return st.tl.annotate(data, head=head, **(QUIET | options))


def probabilities(data, head, **options):
    return apply(data, head, copy=True, **options).obsm[PROBA]


def accuracy(data, head, key="kind"):
    return (probabilities(data, head).idxmax(axis=1) == data.obs[key].astype(str)).mean()


def parts_of(data):
    return {name: data[data.obs["library"] == name].copy() for name in ("left", "right")}


def test_fields(cells, tmp_path):
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
    cells.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(again.obsm[PROBA], proba)
    assert again.obs[KEY].equals(column)


def test_fitting_writes_nothing(cells):
    keys = (list(cells.obs), list(cells.obsm), list(cells.uns))
    fit(cells)
    assert keys == (list(cells.obs), list(cells.obsm), list(cells.uns))


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
    parts = parts_of(cells)
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
    alone = made["left"].obsm["mine_proba"]
    np.testing.assert_allclose(probabilities(cells, head).loc[alone.index], alone, atol=1e-6)


def test_seed_and_order_of_cells(cells, rng):
    moved = cells[rng.permutation(184)].copy()
    for split in ("slices", "blocks", "random"):
        first, again = (apply(cells, fit(data, split=split), copy=True) for data in (cells, moved))
        pd.testing.assert_frame_equal(first.obsm[PROBA], again.obsm[PROBA], check_exact=True)
        assert first.obs[KEY].equals(again.obs[KEY])
    other = probabilities(cells, fit(cells, split=split, seed=1))
    assert not np.array_equal(first.obsm[PROBA], other)


def test_order_of_embedded_cells(embedded, rng):
    moved = embedded[rng.permutation(184)].copy()
    first, again = (probabilities(embedded, learn(one)) for one in (embedded, moved))
    pd.testing.assert_frame_equal(first, again, check_exact=True)


def test_a_reference(embedded, model):
    parts = parts_of(embedded)
    query, labelled = parts["left"].copy(), parts["right"]
    del query.obs["kind"]
    head = st.tl.annotate(query, reference=labelled, label_key="kind", key_added="mine", **QUIET)
    assert isinstance(head, st.AnnotationHead)
    assert "mine" not in labelled.obs
    expected = parts["left"]
    apply(expected, learn(labelled), key_added="mine")
    assert query.obs["mine"].equals(expected.obs["mine"])
    pd.testing.assert_frame_equal(
        query.obsm["mine_proba"], expected.obsm["mine_proba"], check_exact=True
    )
    assert query.uns[Uns.STOFM]["mine"]["model_fingerprint"] == model.fingerprint
    truth = parts["left"].obs["kind"].astype(str)
    assert (query.obsm["mine_proba"].idxmax(axis=1) == truth).mean() > 0.8


def test_a_reference_is_embedded_with_the_same_model(adata, model):
    parts = parts_of(adata)
    # It has slices of its own, and fewer genes in another order.
    reference = [parts["right"][:40, ::-1].copy(), parts["right"][40:, 9:].copy()]
    for one in reference:
        del one.obs["library"]
    query = {"a": parts["left"]}
    head = st.tl.annotate(query, reference=reference, label_key="kind", model=model, **QUIET)
    assert head.origin[Obsm.X]["model_fingerprint"] == model.fingerprint
    assert query["a"].obs[KEY].notna().all()
    assert {Obsm.X_CELL, Obsm.X} <= set(query["a"].obsm) & set(reference[0].obsm)
    assert len(head.expression.genes) == 62


def test_each_side_has_its_layer(adata, model):
    parts = parts_of(adata)
    query, reference = parts["left"], parts["right"]
    reference.layers["counts"], reference.X = reference.X, reference.X * 0.37
    options = {"reference": reference, "model": model}
    told = r"^reference\.X does not hold raw counts.* pass reference_layer='counts'"
    with pytest.raises(ValueError, match=told):
        learn(query, **options)
    assert KEY not in query.obs
    head = learn(query, reference_layer="counts", **options)
    assert head.expression is not None
    found = query.obsm.pop(PROBA)
    # A layer that one side alone has is read there.
    learn(query, layer="counts", **options)
    pd.testing.assert_frame_equal(query.obsm[PROBA], found, check_exact=True)
    with pytest.raises(KeyError, match=r"The query: There is no layer 'nope'"):
        learn(query, layer="nope", reference_layer="counts", **options)


@pytest.mark.filterwarnings("ignore:.*are judged without their")
def test_a_query_that_lacks_what_is_read(adata, model, caplog):
    parts = parts_of(adata)
    query = parts["left"]
    st.tl.embed(query, model, **QUIET)
    query.X = query.X * 0.37
    del query.obsm["spatial"]
    options = {"use_rep": Obsm.X_CELL, "model": model}
    learn(query, reference=parts["right"], **options)
    assert "101 cells are judged without their neighbours" in caplog.text
    assert "101 cells are judged without their expression" in caplog.text
    assert np.isfinite(query.obsm[PROBA]).all(axis=None)
    del query.obsm[Obsm.X_CELL], query.obs[KEY]
    # Embeddings can't be made of that.
    with pytest.raises(ValueError, match=r"^The query: adata\.X does not hold raw counts"):
        learn(query, reference=parts["right"], **options)
    query.X = None
    with pytest.raises(ValueError, match=r"adata\.X is empty"):
        learn(query, reference=parts["right"], **options)
    assert KEY not in query.obs


def test_a_member_for_each_block(embedded):
    head = learn(embedded)
    assert set(get_args(Source)) == set(head.reads)
    assert head.reads.count("neighborhood") == 4
    assert sum(head.weights) == pytest.approx(1.0)
    # No more components than there are genes.
    assert head.expression.axes.shape == (71, 71)
    assert head.params["n_neighbors"] == head.n_neighbors == 10
    assert {"network", "reads"} <= set(head.history)
    assert accuracy(embedded, head) > 0.9
    assert learn(embedded, n_components=6).expression.axes.shape == (71, 6)


def test_columns_of_each_representation_share_a_scale(embedded, scales_of):
    for key, factor in ((Obsm.X_CELL, 10.0), (Obsm.X, 1000.0)):
        embedded.obsm[key] = factor * embedded.obsm[key]
    head = learn(embedded)
    cell, spatial = (embedded.obsm[key].shape[1] for key in EMBEDDINGS)
    for network in head.networks:
        if network.config.widths:
            assert len(set(scales_of(network, (cell, cell, spatial)))) == 3


def test_expression_tells_what_embeddings_do_not(embedded, rng):
    for key in EMBEDDINGS:
        embedded.obsm[key] = rng.normal(size=embedded.obsm[key].shape).astype(np.float32)
    head = learn(embedded)
    on_expression = ["expression" in one for one in head.reads]
    assert sum(np.array(head.weights)[on_expression]) > 0.8
    assert accuracy(embedded, head) > 0.9
    assert accuracy(embedded, learn(embedded, n_components=0)) < 0.7


def test_regions_are_told_by_what_is_around(halves, tmp_path):
    parts = parts_of(halves)
    options = {"label_key": "half", "n_components": 0}
    head = learn(parts["left"], **options)
    assert set(head.reads) == {"embedding", "neighborhood"}
    around = np.array([source == "neighborhood" for source in head.reads])
    assert np.array(head.weights)[around].sum() > 0.5
    alone = learn(parts["left"], n_neighbors=0, **options)
    assert set(alone.reads) == {"embedding"}
    right = parts["right"]
    assert accuracy(right, head, "half") > accuracy(right, alone, "half") + 0.05
    head.save(tmp_path / "head")
    again = st.AnnotationHead.load(tmp_path / "head")
    assert again.n_neighbors == 10
    pd.testing.assert_frame_equal(
        probabilities(halves, again), probabilities(halves, head), check_exact=True
    )


def expected_of(head, data, members):
    """Probabilities by those members alone, which read embeddings."""
    features = np.hstack([data.obsm[key] for key in EMBEDDINGS])
    votes = [apply_head(head.networks[k], features, "classes") for k in members]
    mean = np.average(votes, axis=0, weights=[head.weights[k] for k in members])
    odds = mean ** (1 / head.temperature)
    return odds / odds.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("lack", ["no places", "raw counts", "both"])
@pytest.mark.filterwarnings("ignore:.*are judged without their")
def test_a_query_without_places_or_counts(embedded, lack, caplog):
    head = learn(embedded, reject_rate=0)
    whole = probabilities(embedded, head)
    query = embedded.copy()
    if lack in ("no places", "both"):
        del query.obsm["spatial"]
    if lack in ("raw counts", "both"):
        query.X = query.X * 0.37
    found = probabilities(query, head)
    if lack != "raw counts":
        assert "184 cells are judged without their neighbours" in caplog.text
    if lack != "no places":
        assert "184 cells are judged without their expression" in caplog.text
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)
    assert np.abs(found.to_numpy() - whole.to_numpy()).max() > 0.01
    if lack == "both":
        own = [k for k, source in enumerate(head.reads) if source == "embedding"]
        np.testing.assert_allclose(found, expected_of(head, embedded, own), atol=1e-5)


@pytest.mark.parametrize("lack", ["no places", "no usable places"])
@pytest.mark.filterwarnings("ignore:.*without their neighbours")
def test_a_table_without_places_beside_others(halves, lack, caplog):
    left, right = parts_of(halves).values()
    tables = [left, right, left.copy()]
    head = learn(halves, label_key="half", n_components=0)
    whole = apply(tables, head, library_key=None, copy=True)
    if lack == "no places":
        del right.obsm["spatial"]
    else:
        right.obsm["spatial"][3, 0] = np.nan
    found = apply(tables, head, copy=True)
    assert "83 cells are judged without their neighbours" in caplog.text
    for one, other in zip(found, whole, strict=True):
        assert one.obsm[PROBA].equals(other.obsm[PROBA]) == (one.n_obs == 101)


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_fitting_without_raw_counts(embedded, caplog):
    embedded.X = embedded.X * 0.37
    head = learn(embedded)
    assert "are judged without their expression" in caplog.text
    assert head.expression is None
    assert set(head.reads) == {"embedding", "neighborhood"}
    with pytest.raises(ValueError, match="raw counts"):
        learn(embedded, n_components=20)


def test_embeddings_alone(embedded):
    head = learn(embedded, n_components=0, n_neighbors=0)
    assert (head.expression, head.n_neighbors) == (None, 0)
    assert set(head.reads) == {"embedding"}
    before = probabilities(embedded, head)
    # Counts are not read.
    embedded.X = None
    pd.testing.assert_frame_equal(probabilities(embedded, head), before, check_exact=True)


def test_other_entries_of_obsm(cells, rng):
    cells.obsm["X_noise"] = rng.normal(size=(184, 4)).astype(np.float32)
    head = fit(cells, use_rep=("X_pca", "X_noise"))
    assert (head.expression, head.n_neighbors) == (None, 0)
    head = fit(cells, use_rep="X_noise", n_components=8)
    assert head.expression.axes.shape == (71, 8)
    assert accuracy(cells, head) > 0.85


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_genes_of_a_query(embedded, rng, caplog):
    head = learn(embedded)
    moved = embedded[:, rng.permutation(71)].copy()
    expected = probabilities(embedded, head)
    np.testing.assert_allclose(probabilities(moved, head), expected, atol=1e-5)
    found = probabilities(embedded[:, :2].copy(), head)
    assert "2 of the 71 genes whose expression the head reads are there, too few" in caplog.text
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)


def test_the_layer_that_was_embedded(adata, model):
    plain = adata.copy()
    adata.layers["raw"], adata.X = adata.X.copy(), adata.X * 0.37
    st.tl.embed(plain, model, **QUIET)
    st.tl.embed(adata, model, layer="raw", **QUIET)
    expected, head = learn(plain), learn(adata)
    assert "expression" in head.reads
    found = probabilities(adata, head)
    pd.testing.assert_frame_equal(found, probabilities(plain, expected), check_exact=True)
    named = probabilities(adata, learn(adata, layer="raw"), layer="raw")
    pd.testing.assert_frame_equal(found, named, check_exact=True)


def test_tables_of_other_genes(embedded):
    parts = parts_of(embedded)
    # The genes of the second are fewer, and in another order.
    parts["right"] = parts["right"][:, :4:-1].copy()
    head = learn(parts, library_key=None, split="random")
    assert len(head.expression.genes) == 66
    made = apply(parts, head, copy=True, library_key=None)
    for name, part in parts.items():
        alone = probabilities(part, head, library_key=None)
        np.testing.assert_allclose(made[name].obsm[PROBA], alone, atol=1e-6)


def test_backed(embedded, tmp_path):
    expected = learn(embedded)
    embedded.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    head = learn(backed)
    assert head.weights == expected.weights
    apply(backed, head)
    np.testing.assert_array_equal(backed.obsm[PROBA], probabilities(embedded, expected))
    backed.file.close()


def test_a_query_of_one_class_is_judged_as_among_others(embedded):
    # Its neighbours would be others.
    head = learn(embedded, n_neighbors=0)
    whole = probabilities(embedded, head)
    some = embedded[embedded.obs["kind"] == "1"].copy()
    np.testing.assert_allclose(probabilities(some, head), whole.loc[some.obs_names], atol=1e-6)


def test_scores_and_rejection_are_of_all_held_out_cells(embedded):
    head = learn(embedded, split="random", reject_rate=0.2)
    # Three draws of a tenth each.
    assert head.validation_scores["n_cells"].tolist() == [3 * head.split["n_held_out"]]
    assert 0.0 < head.rejection.measured <= 0.2


def test_missing_and_rare_labels_are_left_out(cells):
    labels = cells.obs["kind"].astype(str).to_numpy(dtype=object)
    labels[:20], labels[20:30], labels[30] = "Other", None, "rare"
    cells.obs["label"] = labels
    told = r"in obs\['label'\] are left out.*'Other' \(20 cells, 10.9%\).* pass missing=\[\]"
    rare = r"Rare classes of obs\['label'\] .*: rare \(1\)\. .* min_share=0"
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
        proba = probabilities(cells, head)
        # Before calibration, which takes back part of it.
        leanings.append(head.temperature * np.log(proba["few"] / proba["many"]).mean())
    assert leanings[1] > leanings[0] + 0.5


def test_embeddings_are_made_where_they_are_missing(adata, model):
    head = learn(adata, model=model, split="random")
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
    st.tl.annotate(query, reference=fitted, label_key="region", **options)
    truth = query.obs["region"].astype(str)
    found = query.obsm[PROBA].idxmax(axis=1)
    assert st.metrics.accuracy(truth, found) > 1.3 * truth.value_counts(normalize=True).iloc[0]


def test_another_models_embedding_is_refused(adata, model):
    head = learn(adata, model=model)
    other = Stofm(model.config, model.vocabulary, seed=8).eval()
    st.tl.embed(adata, other, **QUIET)
    with pytest.raises(
        ValueError, match=rf"is from tiny .* fitted to .*tiny \({model.cell_encoder_fingerprint}"
    ):
        apply(adata, head)
    assert KEY not in adata.obs
    apply(adata, head, model=model)
    assert adata.uns[Uns.STOFM][Obsm.X]["model_fingerprint"] == other.fingerprint


def test_options_are_checked_before_anything_is_embedded(adata, model):
    adata.obs["kind"] = adata.obs["kind"].cat.rename_categories(["unknown", "b", "c"])
    for wrong in ({"split": "rows"}, {"seed": -1}, {"missing": []}, {"n_components": 2.5}):
        with pytest.raises(ValueError, match=r"must be|has a class 'unknown'"):
            learn(adata, model=model, **wrong)
    assert Obsm.X_CELL not in adata.obsm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_key": None}, "found neither"),
        ({"use_rep": ()}, "use_rep must name"),
        ({"use_rep": ("X_pca", "X_pca")}, "each once"),
        ({"label_key": "one"}, "has a single class"),
        ({"strategy": "full"}, "not embeddings"),
        ({"reference": "cells", "label_key": None}, "found neither"),
        ({"reference": "cells", "copy": True}, "does not go with copy=True"),
        ({"reference": "cells", "key_added": "X_pca"}, "choose another name"),
        ({"reference": "cells", "label_key": "one"}, "has a single class"),
    ],
)
def test_bad_fits(cells, options, message):
    options = {key: cells.copy() if value == "cells" else value for key, value in options.items()}
    cells.obs["one"] = "a"
    cells.obs["single"] = ["a", "b"] * 91 + ["c", "a"]
    if "reference" in options:
        options["reference"].obs["one"] = "a"
    with pytest.raises(ValueError, match=message):
        fit(cells, **options)
    assert KEY not in cells.obs


def test_bad_use(cells):
    head = fit(cells)
    with pytest.raises(ValueError, match="found both"):
        fit(cells, head=head)
    with pytest.raises(ValueError, match="does not go with head="):
        apply(cells, head, reference=cells)
    with pytest.raises(TypeError, match=r"AnnotationHead.load\(path\)"):
        apply(cells, "folder")
    with pytest.raises(TypeError, match=r"options must be st\.tl\.HeadOptions"):
        apply(cells, head, options={"split": "blocks"})
    with pytest.raises(ValueError, match="choose another name"):
        apply(cells, head, key_added="X_pca")
    with pytest.raises(KeyError, match="Nearest"):
        fit(cells, label_key="kinds")
    with pytest.raises(KeyError, match=r"The reference: There is no obs\['kinds'\]"):
        fit(cells, label_key="kinds", reference=cells.copy())
    cells.obsm["X_pca"] = cells.obsm["X_pca"][:, :5]
    with pytest.raises(ValueError, match="reads 9 columns"):
        apply(cells, head)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("strategy", ["lora", "full"])
@pytest.mark.filterwarnings("ignore:Tuning")
def test_a_tuned_model_goes_with_the_head(embedded, model, tmp_path, strategy):
    before, stored = model.fingerprint, embedded.obsm[Obsm.X].copy()
    head = learn(embedded, model=model, strategy=strategy, split="blocks")
    assert model.fingerprint == before
    assert head.strategy == strategy
    assert head.origin[Obsm.X]["model_fingerprint"] == head.model.fingerprint
    assert set(get_args(Source)) == set(head.reads)
    head.save(tmp_path / "head")
    again = st.AnnotationHead.load(tmp_path / "head")
    made = [apply(embedded, one, copy=True) for one in (head, again)]
    pd.testing.assert_frame_equal(made[0].obsm[PROBA], made[1].obsm[PROBA], check_exact=True)
    # The embeddings from the model before tuning stay.
    np.testing.assert_array_equal(made[0].obsm[Obsm.X], stored)


def test_classes_have_the_colors_of_the_reference(cells, tmp_path):
    labelled = cells[cells.obs["library"] == "left"].copy()
    labelled.uns["kind_colors"] = ["#aa0000", "#00aa00", "#0000aa"]
    head = fit(labelled)
    head.save(tmp_path / "head")
    head = st.AnnotationHead.load(tmp_path / "head")
    st.tl.annotate(cells, head=head, **QUIET)
    names = list(cells.obs[KEY].cat.categories)
    colors = dict(zip(names, cells.uns[f"{KEY}_colors"], strict=True))
    assert [colors[kind] for kind in "012"] == labelled.uns["kind_colors"]
    assert colors["unknown"] == "#bdbdbd"


def test_the_record_tells_which_cells_the_head_was_fitted_to(cells, tmp_path):
    labelled = cells[cells.obs["library"] == "left"].copy()
    labelled.obs.loc[labelled.obs_names[:7], "kind"] = None
    head = fit(labelled)
    head.save(tmp_path / "head")
    head = st.AnnotationHead.load(tmp_path / "head")
    st.tl.annotate(cells, head=head, **QUIET)
    assert len(cells.uns[Uns.STOFM][KEY]["params"]["fitted_to"]) == len(labelled) - 7
    # Cells of another place are others, whatever they are called.
    other = cells.copy()
    other.obsm["spatial"] = other.obsm["spatial"] + 1000.0
    st.tl.annotate(other, head=head, **QUIET)
    assert "fitted_to" not in other.uns[Uns.STOFM][KEY]["params"]


def test_the_key_may_be_given_by_position(cells):
    options = st.tl.HeadOptions(split="random")
    head = st.tl.annotate(cells, "kind", use_rep="X_pca", options=options, **QUIET)
    assert head.params["label_key"] == "kind"
