from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

import stofm as st
from stofm._edge.colors import PALETTE
from stofm._edge.observations import cell_digests
from stofm.metrics.labels import Reliability

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad

GREY = "#bdbdbd"


@pytest.fixture
def annotated(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    """The slices with truth ``kind`` (z, y, x, some NaN) and an annotation of z, y and w."""
    classes = ["z", "y", "w"]
    proba = rng.dirichlet([0.6, 0.6, 0.6], adata.n_obs)
    found = np.array(classes, dtype=object)[proba.argmax(axis=1)]
    found[proba.max(axis=1) < 0.5] = "unknown"
    adata.obs["stofm_annotation"] = pd.Categorical(found, categories=[*classes, "unknown"])
    adata.obs["stofm_annotation_confidence"] = proba.max(axis=1)
    adata.obsm["stofm_annotation_proba"] = pd.DataFrame(
        proba, index=adata.obs_names, columns=classes
    )
    adata.obs.loc[adata.obs_names[:7], "kind"] = None
    return adata


def fields(ax: Axes) -> dict[tuple[str, str], str]:
    """What is written into the confusion matrix, by true class and annotation."""
    rows = [label.get_text().split(" (")[0] for label in ax.get_yticklabels()]
    columns = [label.get_text() for label in ax.get_xticklabels()]
    return {
        (rows[int(text.get_position()[1])], columns[int(text.get_position()[0])]): text.get_text()
        for text in ax.texts
    }


def test_panels_with_truth(annotated: ad.AnnData) -> None:
    axes = st.pl.annotation(annotated, truth_key="kind", show=False)
    assert [ax.get_title().split(" ")[0] for ax in axes] == [
        "stofm_annotation",
        "accuracy",
        "expected",
    ]
    assert [ax.get_xlabel() for ax in axes] == ["", "annotation", "confidence"]


def test_panels_without_truth(annotated: ad.AnnData) -> None:
    labels, confidence = st.pl.annotation(annotated, show=False)
    assert labels.get_title() == "stofm_annotation"
    assert confidence.get_title() == "stofm_annotation_confidence"
    assert confidence.collections[0].get_clim() == (0.0, 1.0)


def test_only_what_the_data_allow(annotated: ad.AnnData) -> None:
    del annotated.obs["stofm_annotation_confidence"], annotated.obsm["stofm_annotation_proba"]
    assert isinstance(st.pl.annotation(annotated, show=False), Axes)
    assert len(st.pl.annotation(annotated, truth_key="kind", show=False)) == 2


def test_classes_have_the_colors_of_the_truth(annotated: ad.AnnData) -> None:
    annotated.uns["kind_colors"] = ["#111111", "#222222", "#333333"]
    ax, *_ = st.pl.annotation(annotated, truth_key="kind", show=False)
    z, y, w, unknown = annotated.uns["stofm_annotation_colors"]
    assert [z, y, unknown] == ["#111111", "#222222", GREY]
    assert w == PALETTE[0]
    drawn = {to_hex(color) for color in ax.collections[0].get_facecolors()}
    assert drawn == {z, y, w, unknown}
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["z", "y", "w", "unknown"]


def test_a_color_of_the_truth_is_not_used_twice(annotated: ad.AnnData) -> None:
    st.pl.annotation(annotated, truth_key="kind", show=False)
    colors = annotated.uns["stofm_annotation_colors"]
    assert colors[2] not in annotated.uns["kind_colors"]
    assert len(set(colors)) == 4


def test_stored_colors_are_used_without_truth(annotated: ad.AnnData) -> None:
    annotated.uns["stofm_annotation_colors"] = ["#aa0000", "#00aa00", "#0000aa", "#aaaa00"]
    st.pl.annotation(annotated, show=False)
    colors = annotated.uns["stofm_annotation_colors"]
    assert list(colors) == ["#aa0000", "#00aa00", "#0000aa", GREY]


def test_confusion_is_percent_of_the_true_class(annotated: ad.AnnData) -> None:
    _, ax, _ = st.pl.annotation(annotated, truth_key="kind", show=False)
    table = pd.crosstab(annotated.obs["kind"], annotated.obs["stofm_annotation"], normalize="index")
    written = fields(ax)
    for (true, found), share in table.stack().items():
        if share > 0:
            assert float(written[true, found]) == pytest.approx(100 * share, abs=0.5)
    # x is no class of the annotation, and stands last; w is none of the truth.
    assert [label.get_text()[0] for label in ax.get_yticklabels()] == ["z", "y", "x"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["z", "y", "w", "unknown"]


def test_rows_of_the_confusion_matrix_name_their_cells(annotated: ad.AnnData) -> None:
    _, ax, _ = st.pl.annotation(annotated, truth_key="kind", show=False)
    totals = [label.get_text() for label in ax.get_yticklabels()]
    n_z = int((annotated.obs["kind"] == "z").sum())
    assert totals[0] == f"z ({n_z})"


def test_scores_are_over_cells_whose_class_is_known(annotated: ad.AnnData) -> None:
    _, ax, _ = st.pl.annotation(annotated, truth_key="kind", show=False)
    part = annotated.obs[annotated.obs["kind"].isin(["z", "y"])]
    right = part["kind"].astype(str) == part["stofm_annotation"].astype(str)
    assert ax.get_title().startswith(f"accuracy {right.mean():.3f}, ")
    macro = st.metrics.macro_f1(part["kind"].astype(str), part["stofm_annotation"].astype(str))
    assert ax.get_title().endswith(f"macro-F1 {macro:.3f}")


def test_reliability_is_of_the_likeliest_class(annotated: ad.AnnData) -> None:
    *_, ax = st.pl.annotation(annotated, truth_key="kind", show=False)
    rows = annotated.obs["kind"].isin(["z", "y"]).to_numpy()
    proba = annotated.obsm["stofm_annotation_proba"][rows]
    right = (proba.idxmax(axis=1) == annotated.obs["kind"][rows].astype(str)).to_numpy()
    confidence = proba.max(axis=1).to_numpy()
    bins = np.array_split(np.argsort(confidence), 10)
    line = ax.containers[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [confidence[b].mean() for b in bins])
    np.testing.assert_allclose(line.get_ydata(), [right[b].mean() for b in bins])
    gaps = [abs(confidence[b].mean() - right[b].mean()) * len(b) for b in bins]
    assert ax.get_title() == f"expected calibration error {sum(gaps) / len(right):.3f}"


def test_calibration_error_of_perfect_and_of_overconfident_cells() -> None:
    always = np.ones(10, dtype=bool)
    assert Reliability.of(np.ones(10), always, 3).error == 0.0
    assert Reliability.of(np.ones(10), ~always, 3).error == 1.0
    assert len(Reliability.of(np.ones(2), always[:2], 10).n_cells) == 2


def test_slices_have_a_panel_each_and_scores_one(annotated: ad.AnnData) -> None:
    axes = st.pl.annotation(annotated, truth_key="kind", library_key="slide", show=False)
    assert [ax.get_title() for ax in axes[:2]] == ["a", "b"]
    assert len(axes) == 4
    # Nothing overlaps, and nothing lies beyond the figure.
    figure = axes[0].figure
    figure.draw_without_rendering()
    boxes = [ax.get_tightbbox() for ax in axes]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width + 1
        assert box.y1 <= figure.bbox.height + 1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_panels_can_be_chosen(annotated: ad.AnnData) -> None:
    kinds = ("confusion", "truth", "map")
    axes = st.pl.annotation(annotated, truth_key="kind", panels=kinds, show=False)
    # Maps come first.
    assert [ax.get_title().split(" ")[0] for ax in axes] == ["kind", "stofm_annotation", "accuracy"]
    figure, given = plt.subplots()
    drawn = st.pl.annotation(
        annotated, truth_key="kind", panels=["reliability"], ax=given, show=False
    )
    assert drawn is given
    assert drawn.figure is figure


def test_saved_and_data_left_alone(annotated: ad.AnnData, tmp_path: Path) -> None:
    before = annotated.copy()
    st.pl.annotation(annotated, truth_key="kind", show=False, save=tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    pd.testing.assert_frame_equal(annotated.obs, before.obs)
    assert set(annotated.uns) == {"kind_colors", "stofm_annotation_colors"}


def test_missing_keys(annotated: ad.AnnData) -> None:
    with pytest.raises(KeyError, match=r"no obs\['stofm_anotation'\].*Nearest.*stofm_annotation"):
        st.pl.annotation(annotated, key="stofm_anotation", show=False)
    with pytest.raises(KeyError, match=r"no obs\['kinds'\]: pass the column with the true"):
        st.pl.annotation(annotated, truth_key="kinds", show=False)
    del annotated.obs["stofm_annotation_confidence"]
    with pytest.raises(KeyError, match=r"no obs\['stofm_annotation_confidence'\]"):
        st.pl.annotation(annotated, panels=["confidence"], show=False)


def test_panels_that_are_not_there(annotated: ad.AnnData) -> None:
    with pytest.raises(ValueError, match=r"each once, found \['maps'\]"):
        st.pl.annotation(annotated, panels=["maps"], show=False)
    with pytest.raises(ValueError, match=r"\['confusion'\] compare with the truth"):
        st.pl.annotation(annotated, panels=["map", "confusion"], show=False)
    with pytest.raises(ValueError, match="3 panels are needed"):
        st.pl.annotation(annotated, truth_key="kind", ax=plt.figure().add_subplot(), show=False)


def test_truth_of_other_classes(annotated: ad.AnnData) -> None:
    annotated.obs["other"] = pd.Categorical(["p", "q"] * 47)
    with pytest.raises(
        ValueError, match=r"found \['p', 'q'\], the annotation has \['z', 'y', 'w'\]"
    ):
        st.pl.annotation(annotated, truth_key="other", show=False)


def test_numbers_are_classes_however_they_are_stored(annotated: ad.AnnData) -> None:
    names = {"z": "0", "y": "1", "w": "2"}
    annotated.obs["stofm_annotation"] = annotated.obs["stofm_annotation"].cat.rename_categories(
        names
    )
    annotated.obsm["stofm_annotation_proba"].columns = ["0", "1", "2"]
    truth = annotated.obs["kind"].map({"z": 0.0, "y": 1.0, "x": 2.0}).astype(float)
    titles = []
    for stored in (truth, truth.astype("category"), truth.astype("Int64")):
        annotated.obs["truth"] = stored
        panels = ["confusion", "reliability"]
        axes = st.pl.annotation(annotated, truth_key="truth", panels=panels, show=False)
        titles.append([ax.get_title() for ax in axes])
    assert titles[0] == titles[1] == titles[2]
    assert not titles[0][0].startswith("accuracy 0.000")


def test_titles_tell_how_many_cells_the_head_was_fitted_to(annotated: ad.AnnData) -> None:
    seen = cell_digests(annotated, "spatial")[:40]
    annotated.uns["stofm"] = {"stofm_annotation": {"params": {"fitted_to": seen}}}
    labels, confusion, _ = st.pl.annotation(annotated, truth_key="kind", show=False)
    assert labels.get_title() == "stofm_annotation\nhead fitted to 40 of 94 cells"
    assert confusion.get_title().endswith("\nhead fitted to 40 of 94 cells")
    labels, _ = st.pl.annotation(annotated[:40].copy(), show=False)
    assert labels.get_title() == "stofm_annotation\nhead fitted to all cells"
    labels, _ = st.pl.annotation(annotated[40:].copy(), show=False)
    assert labels.get_title() == "stofm_annotation"


def test_spots_are_called_spots(annotated: ad.AnnData) -> None:
    annotated.uns["stofm"] = {"source": {"observations": "spots"}}
    axes = st.pl.annotation(annotated, truth_key="kind", show=False)
    assert axes[1].get_ylabel() == "truth (spots)"
    assert axes[2].get_ylabel() == "share of spots that are right"
