"""Annotation heads, and how far they can be trusted."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import softmax

import stofm as st
from stofm._edge.tables import frame_names
from stofm._keys import Obs, Obsm, Uns
from stofm.heads.annotation import (
    Rejection,
    Surroundings,
    calibrated_probabilities,
    fit_temperature,
)

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


@pytest.fixture
def known_cells(rng):
    """Three classes in eleven columns of very different scale, one of them constant."""
    classes = rng.integers(0, 3, 997)
    values = (rng.normal(size=(3, 11)) * 3)[classes] + rng.normal(size=(997, 11))
    values[:, 4] = 2.0
    return (values * 10.0 ** np.arange(-5, 6)).astype(np.float32), classes


def test_temperature_recovers_how_far_scores_are_overstated(rng):
    scores = rng.normal(size=(4001, 5)) * 2
    drawn = (softmax(scores, axis=1).cumsum(axis=1) > rng.random((4001, 1))).argmax(axis=1)
    for factor in (0.4, 1.0, 3.0):
        assert fit_temperature(scores * factor, drawn) == pytest.approx(factor, rel=0.1)
    assert fit_temperature(scores[:0], drawn[:0]) == 1.0


@pytest.mark.parametrize("n_cells", [1, 33])
def test_few_cells_leave_the_temperature_near_one(rng, n_cells):
    classes = rng.integers(0, 4, n_cells)
    sure = np.eye(4)[classes] * 3
    assert 0.5 < fit_temperature(sure, classes) < 1
    wrong = fit_temperature(np.eye(4)[(classes + 1) % 4] * 9, classes)
    assert 1 < wrong < (2 if n_cells == 1 else 5)


def test_temperature_changes_probabilities_and_not_the_class(rng):
    scores = rng.normal(size=(53, 5)).astype(np.float32)
    found = calibrated_probabilities(scores, 2.5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, softmax(scores / 2.5, axis=1), rtol=1e-5)
    assert np.array_equal(found.argmax(axis=1), scores.argmax(axis=1))


def test_distance_is_that_of_mahalanobis(known_cells):
    features, classes = known_cells
    around = Surroundings.fit(features, classes)
    standard = features.astype(np.float64)
    standard = (standard - standard.mean(axis=0)) / np.where(
        np.ptp(standard, axis=0) > 0, standard.std(axis=0), np.inf
    )
    means = np.stack([standard[classes == k].mean(axis=0) for k in range(3)])
    residuals = standard - means[classes]
    within = residuals.T @ residuals / len(standard)
    within += np.eye(11) * 0.01 * np.trace(within) / 11
    expected = cdist(standard, means, "mahalanobis", VI=np.linalg.inv(within)).min(axis=1)
    np.testing.assert_allclose(around.distances(features), expected, rtol=1e-3)


def test_far_cells_are_far(known_cells):
    features, classes = known_cells
    around = Surroundings.fit(features, classes)
    far = features + 20 * features.std(axis=0)
    assert around.distances(far).min() > around.distances(features).max()


def test_embeddings_that_are_all_the_same():
    features = np.ones((6, 4), dtype=np.float32)
    around = Surroundings.fit(features, np.array([0, 1] * 3))
    assert not around.distances(features).any()


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_no_more_known_cells_are_rejected_than_stated(rng, rate):
    confidence = rng.random(1009)
    distances = rng.random(1009) - 0.5 * confidence
    found = Rejection.fit(confidence, distances, rate)
    share = found.rejects(confidence, distances).mean()
    assert found.measured == share
    assert rate - 0.005 < share <= rate
    assert (found.rate, found.n_cells) == (rate, 1009)
    # As many cells lie beyond the one threshold as beyond the other.
    beyond = (confidence < found.least_probability).sum()
    assert beyond == pytest.approx((distances > found.greatest_distance).sum(), abs=1)


def test_both_must_speak_against_a_class(rng):
    confidence, distances = rng.random(500), rng.random(500)
    found = Rejection.fit(confidence, distances, 0.05)
    some = np.array([[0.0, 9.0], [0.0, 0.0], [1.0, 9.0]])
    assert found.rejects(some[:, 0], some[:, 1]).tolist() == [True, False, False]


def test_few_or_equal_cells():
    assert Rejection.fit(np.array([0.5]), np.array([1.0]), 0.02).measured == 0.0
    same = Rejection.fit(np.full(50, 0.9), np.full(50, 2.0), 0.1)
    assert same.measured == 0.0
