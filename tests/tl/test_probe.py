from __future__ import annotations

import logging
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import stofm as st
from stofm.heads.network import HeadTraining, fit_head
from stofm.tl import _probe_scores

BASELINES = ["PCs", "PCs + neighbours", "log counts"]


@pytest.fixture(scope="module")
def simulated():
    """Three slices whose cells are mixed, with an informative representation and noise."""
    adata = st.datasets.simulate_slice(67, 31, n_slices=3, seed=3)
    rng = np.random.default_rng(1)
    adata = adata[rng.permutation(adata.n_obs)].copy()
    codes = adata.obs["region"].cat.codes.to_numpy()
    classes = np.eye(codes.max() + 1)[codes]
    adata.obsm["good"] = 4 * classes + rng.normal(size=classes.shape)
    adata.obsm["noise"] = rng.normal(size=(adata.n_obs, 5)).astype(np.float32)
    return adata


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    """Fit heads in a few large steps, and start k-means once."""
    training = HeadTraining(max_epochs=6, learning_rate=1e-2)
    monkeypatch.setattr(_probe_scores, "fit_head", partial(fit_head, training=training))
    monkeypatch.setattr(_probe_scores, "_KMEANS_STARTS", 1)


@pytest.fixture
def adata(simulated):
    return simulated.copy()


@pytest.fixture
def slices(adata):
    """The same as a dict of slices."""
    names = adata.obs["slice_id"].cat.categories
    return {name: adata[adata.obs["slice_id"] == name].copy() for name in names}


def probe(data, use_rep=("good",), **options):
    common = {"label_key": "region", "seeds": 1, "show_progress_bar": False}
    if isinstance(data, ad.AnnData) and "library_key" not in options:
        common["library_key"] = "slice_id"
    return st.tl.probe(data, use_rep=use_rep, **{**common, **options})


def values(result, name="good", measure="macro_f1"):
    scores = result.scores
    return scores.loc[scores["representation"] == name, measure].tolist()


def test_an_informative_representation_is_above_all_others(adata):
    before = adata.copy()
    result = probe(adata, ["noise", "good", ("noise", "good")], seeds=2)
    names = ["noise", "good", "noise + good", *BASELINES]
    scores = result.scores
    assert scores.columns.tolist() == [
        "slice", "representation", "seed", "accuracy", "macro_f1", "calibration_error", "ari",
        "nmi", "n_fitted", "n_tested",
    ]  # fmt: skip
    expected = [(s, n, k) for s in ("slice0", "slice1", "slice2") for n in names for k in (0, 1)]
    found = scores[["slice", "representation", "seed"]].itertuples(index=False, name=None)
    assert list(found) == expected
    assert (scores["n_fitted"] + scores["n_tested"]).max() <= 201
    assert scores[["accuracy", "macro_f1", "calibration_error"]].stack().between(0, 1).all()
    assert scores["ari"].isna().equals(scores["representation"] == "log counts")
    summary = result.summary()
    assert summary.index.tolist() == names
    assert summary["mean"].idxmax() in {"good", "noise + good"}
    assert summary["mean"].idxmin() == "noise"
    assert summary.loc["good", "low"] > 0 > summary.loc["noise", "high"]
    assert summary["n_better"].to_dict()["good"] == 3
    # The AnnData is as it was.
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert set(adata.obsm) == set(before.obsm)
    assert set(adata.uns) == set(before.uns)
    assert (adata.X != before.X).nnz == 0


def test_what_is_left_out_is_never_fitted(adata, monkeypatch):
    seen = []
    original = _probe_scores.fit_head

    def noted(features, targets, *, fitted, held_out, seed):
        seen.append(np.concatenate([fitted, held_out]))
        return original(features, targets, fitted=fitted, held_out=held_out, seed=seed)

    monkeypatch.setattr(_probe_scores, "fit_head", noted)
    probe(adata)
    slices = adata.obs["slice_id"].to_numpy()
    assert len(seen) == 9
    for rows, name in zip(seen, np.repeat(["slice0", "slice1", "slice2"], 3), strict=True):
        assert set(slices[rows]) == {"slice0", "slice1", "slice2"} - {name}
        assert len(set(rows)) == len(rows)


def test_rare_classes_are_left_out_and_counted(adata):
    names = adata.obs["region"].astype(str)
    names.iloc[np.flatnonzero(adata.obs["slice_id"] == "slice0")[0]] = "odd"
    adata.obs["region"] = names
    with (
        pytest.warns(UserWarning, match=r"Rare classes .*: odd \(1\)\. A class needs 1% of"),
        pytest.warns(UserWarning, match=r"not tested: 'odd' \(1 cells of slice0\)"),
    ):
        probe(adata)


def test_it_is_the_same_each_time_and_for_slices_in_one_table_or_several(adata, slices):
    first = probe(adata, seeds=2).scores
    pd.testing.assert_frame_equal(probe(adata, seeds=2).scores, first)
    # Slices one after another are the same as a dict or a list of them.
    order = np.argsort(adata.obs["slice_id"].to_numpy(), kind="stable")
    joined, several = probe(adata[order].copy()).scores, probe(slices).scores
    pd.testing.assert_frame_equal(joined, several)
    as_list = probe(list(slices.values())).scores
    pd.testing.assert_frame_equal(as_list.drop(columns="slice"), several.drop(columns="slice"))


def test_another_order_changes_which_cells_tell_when_to_stop_and_nothing_else():
    adata = st.datasets.simulate_slice(300, 100, n_slices=3, seed=3)
    adata.obsm["good"] = np.eye(9)[adata.obs["region"].cat.codes.to_numpy()]
    first = probe(adata).scores["macro_f1"]
    shuffled = adata[np.random.default_rng(1).permutation(adata.n_obs)].copy()
    assert np.abs(probe(shuffled).scores["macro_f1"] - first).max() < 0.2


def test_the_protocol_of_the_paper_names_its_leak(adata, caplog):
    with (
        caplog.at_level(logging.WARNING, logger="stofm"),
        pytest.warns(UserWarning, match="their neighbours were fitted, and embeddings"),
    ):
        result = probe(adata, seeds=3, protocol="stofm-paper")
    assert "Scores are higher than those on new slices will be" in caplog.text
    scores = result.scores
    assert scores["slice"].unique().tolist() == ["random cells"]
    assert values(result, measure="seed") == [0, 1, 2]
    assert len(set(values(result, "PCs"))) > 1
    assert scores["n_tested"].between(36, 42).all()
    assert (scores["n_fitted"] + scores["n_tested"]).between(190, 201).all()
    # A single test has a spread and an interval over its runs.
    row = result.summary().loc["PCs"]
    assert row["spread"] > 0
    assert row["low"] < row["high"]


def test_the_summary_is_that_of_the_scores():
    rng = np.random.default_rng(0)
    names = ["a", "PCs", "PCs + neighbours"]
    rows = [
        {"slice": s, "representation": n, "seed": k, "macro_f1": rng.random(), "ari": np.nan}
        for s in "uvw" for n in names for k in range(2)
    ]  # fmt: skip
    scores = pd.DataFrame(rows).assign(calibration_error=lambda t: 1 - t["macro_f1"])
    result = st.tl.ProbeResult(scores.sample(frac=1, random_state=1))
    means = scores.groupby(["slice", "representation"])["macro_f1"].mean().unstack()
    summary = result.summary()
    assert np.allclose(summary["mean"][names], means.mean()[names])
    assert np.allclose(summary["spread"][names], means.std()[names])
    best = means.mean()[names[1:]].idxmax()
    assert result.better_of_pcs() == best
    differences = means["a"] - means[best]
    row = summary.loc["a"]
    assert np.isclose(row["difference"], differences.mean())
    assert row["n_better"] == (differences > 0).sum()
    assert row["low"] < row["difference"] < row["high"]
    assert summary.loc[best, ["difference", "low", "high"]].tolist() == [0, 0, 0]
    # The lower error is the better one.
    errors = result.summary("calibration_error")
    assert result.better_of_pcs("calibration_error") == best
    assert np.isclose(errors.loc["a", "difference"], -row["difference"])
    assert errors.loc["a", "n_better"] == row["n_better"]
    assert result.summary("ari").empty
    assert f"difference to {best}" in repr(result)
    assert "<table" in result._repr_html_()
    with pytest.raises(ValueError, match=r"measure must be one of .*, found 'f1'"):
        result.summary("f1")


def test_the_interval_is_that_of_drawing_slices_and_seeds():
    names = ["a", "PCs", "PCs + neighbours"]
    rng = np.random.default_rng(2)
    own = rng.normal(size=(40, 1)) + 0.1 * rng.normal(size=(40, 2))
    rows = [
        {"slice": s, "representation": n, "seed": k, "macro_f1": own[s, k] if n == "a" else 0.0}
        for s in range(40) for n in names for k in range(2)
    ]  # fmt: skip
    row = st.tl.ProbeResult(pd.DataFrame(rows)).summary().loc["a"]
    error = own.mean(axis=1).std() / np.sqrt(40)
    assert np.isclose((row["high"] - row["low"]) / (2 * 1.96), error, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_rep": []}, ValueError, "use_rep must name entries of obsm or tuples of them"),
        ({"use_rep": ["good", "good"]}, ValueError, "each once"),
        ({"use_rep": "PCs"}, ValueError, "none called 'PCs'"),
        ({"use_rep": "god"}, KeyError, "Nearest: .*'good'"),
        ({"label_key": "types"}, KeyError, r"There is no obs\['types'\] with labels"),
        ({"left_out": "slice9"}, ValueError, "left_out names 'slice9', which is no slice. Nearest"),
        (
            {"left_out": [("slice0", "slice1", "slice2")]},
            ValueError,
            "Nothing can be tested: that needs two classes with 1% or more of the cells",
        ),
        ({"left_out": []}, ValueError, "Nothing can be tested"),
        ({"seeds": 0}, ValueError, "seeds must be a whole number of at least 1, found 0"),
        ({"protocol": "paper"}, ValueError, "protocol must be one of"),
        ({"protocol": "stofm-paper"}, ValueError, "leave out `left_out` and `seeds`"),
        ({"layer": "raw"}, KeyError, "There is no layer 'raw'"),
        ({"library_key": "slices"}, KeyError, r"There is no obs\['slices'\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:Classes that no cell outside")
def test_messages(adata, options, error, message):
    with pytest.raises(error, match=message):
        probe(adata, **options)


def test_embeddings_of_several_models_are_refused(slices):
    for number, one in enumerate(slices.values()):
        one.obsm["X_stofm"] = one.obsm["noise"]
        one.uns["stofm"] = {"X_stofm": {"model": f"m{number}", "model_fingerprint": str(number)}}
    with pytest.raises(ValueError, match=r"by m0 \(0\) in the first AnnData and by m1 \(1\) in"):
        probe(slices, "X_stofm")
