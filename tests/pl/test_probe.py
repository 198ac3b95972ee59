from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import stofm as st

NAMES = ["a", "b", "PCs", "PCs + neighbours"]
MEANS = dict(zip(NAMES, (0.9, 0.4, 0.6, 0.7), strict=True))


@pytest.fixture
def result():
    """Three slices and two seeds; a is above the PCs in all, b below."""
    rows = [
        {
            "slice": name,
            "representation": representation,
            "seed": seed,
            "macro_f1": mean + 0.05 * (number - 1) * (representation != "PCs") + 0.01 * seed,
            "calibration_error": 1 - mean,
            "ari": mean if representation != "b" else np.nan,
        }
        for number, name in enumerate("uvw")
        for representation, mean in MEANS.items()
        for seed in (0, 1)
    ]
    return st.tl.ProbeResult(pd.DataFrame(rows))


def row_of(ax, name):
    """Height of a representation's row."""
    return [label.get_text() for label in ax.get_yticklabels()].index(name)


def dots(ax, name):
    """Values of the slices of a representation."""
    height = row_of(ax, name)
    (own,) = [
        line
        for line in ax.lines
        if line.get_marker() == "o" and abs(np.mean(line.get_ydata()) - height) < 0.1
    ]
    return own


def test_a_dot_for_each_slice_and_the_better_of_the_pcs_as_a_line(result):
    ax = st.pl.probe(result, show=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "b", "PCs", "PCs + neighbours", "a",
    ]  # fmt: skip
    assert np.allclose(dots(ax, "a").get_xdata(), [0.855, 0.905, 0.955])
    (line,) = [one for one in ax.lines if one.get_linestyle() == "--"]
    assert np.allclose(line.get_xdata(), 0.705)
    assert ax.get_legend().get_texts()[0].get_text() == "better of the PCs (PCs + neighbours)"
    assert ax.get_xlabel() == "macro-F1 on what is left out"
    colors = {name: dots(ax, name).get_color() for name in ("a", "b", "PCs + neighbours")}
    assert len(set(colors.values())) == 3


def test_whiskers_are_the_interval_of_the_difference(result):
    ax = st.pl.probe(result, show=False)
    summary = result.summary()
    wide = [
        line.get_xdata()
        for line in ax.lines
        if line.get_linestyle() == "-"
        and line.get_marker() == "None"
        and list(line.get_ydata()) == [row_of(ax, "PCs")] * 2
    ]
    expected = 0.705 + summary.loc["PCs", ["low", "high"]].to_numpy()
    assert np.allclose(wide, [expected])


def test_of_errors_the_lowest_is_the_best_and_on_top(result):
    ax = st.pl.probe(result, measure="calibration_error", show=False)
    assert row_of(ax, "a") == 3
    better = st.pl.probe(result, show=False)
    assert dots(ax, "a").get_color() == dots(better, "a").get_color()


def test_representations_without_the_measure_are_left_out(result):
    ax = st.pl.probe(result, measure="ari", show=False)
    assert len(ax.get_yticklabels()) == 3


def test_axes_of_ones_own_and_files(result, tmp_path):
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    assert st.pl.probe(result, ax=ax, show=False) is ax
    st.pl.probe(result, show=False, save=tmp_path / "probe.png")
    assert (tmp_path / "probe.png").stat().st_size > 5000


def test_labels_lie_within_the_figure(result):
    ax = st.pl.probe(result, show=False)
    figure = ax.figure
    figure.canvas.draw()
    box = ax.get_tightbbox()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height


def test_messages(result):
    with pytest.raises(TypeError, match=r"Expected what st.tl.probe returns, found DataFrame"):
        st.pl.probe(result.scores, show=False)
    with pytest.raises(ValueError, match="measure must be one of"):
        st.pl.probe(result, measure="f1", show=False)
