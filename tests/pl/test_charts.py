from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import stofm as st


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def history():
    """Two stages; the first without held-out slices."""
    cells = pd.DataFrame({"step": [10, 20], "masked_genes": [4.0, 3.0], "split": "train"})
    spatial = pd.DataFrame(
        {
            "step": [10, 20, 20, 30, 40, 40],
            "split": ["train", "train", "validation", "train", "train", "validation"],
            "masked_cells": [0.9, 0.7, 0.65, 0.6, 0.4, 0.7],
        }
    )
    tables = [cells.assign(stage="cell_encoder"), spatial.assign(stage="spatial")]
    table = pd.concat(tables, ignore_index=True).assign(epoch=0, seconds=1.0)
    part = table["masked_genes"].fillna(table["masked_cells"])
    table["cells"] = table["step"] * 64
    return table.assign(loss=part * 2, learning_rate=1e-4, gradient_norm=1.0)


def drawn(ax, label):
    """Points of the line with a label."""
    (line,) = [one for one in ax.lines if one.get_label() == label]
    return np.column_stack([line.get_xdata(), line.get_ydata()]).tolist()


def test_one_panel_for_each_stage_and_loss_part(history):
    axes = st.pl.training(history, show=False)
    assert [ax.get_title() for ax in axes] == [
        "cell encoder: loss",
        "cell encoder: masked genes",
        "spatial: loss",
        "spatial: masked cells",
    ]
    assert drawn(axes[1], "training") == [[10, 4.0], [20, 3.0]]
    assert drawn(axes[3], "training") == [[10, 0.9], [20, 0.7], [30, 0.6], [40, 0.4]]
    assert drawn(axes[3], "held out") == [[20, 0.65], [40, 0.7]]
    assert {ax.get_xlabel() for ax in axes} == {"step"}


def test_the_lowest_held_out_loss_is_marked(history):
    ax = st.pl.training(history[history["stage"] == "spatial"], "loss", show=False)
    (star,) = [line for line in ax.lines if line.get_marker() == "*"]
    assert (star.get_xdata().tolist(), star.get_ydata().tolist()) == ([20], [1.3])


def test_stages_have_rows_and_panels_do_not_overlap(history):
    axes = st.pl.training(history, show=False)
    figure = axes[0].figure
    figure.canvas.draw()
    boxes = [ax.get_tightbbox() for ax in axes]
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    assert boxes[0].y0 > boxes[2].y1
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    assert all(box.y1 <= figure.bbox.height for box in boxes)


def test_what_train_returns_and_a_runs_folder(history, tmp_path):
    history.to_csv(tmp_path / "history.csv", index=False)
    result = SimpleNamespace(history=history)
    for data in (result, tmp_path, str(tmp_path)):
        ax = st.pl.training(data, "masked_cells", x="cells", show=False)
        assert drawn(ax, "held out") == [[1280, 0.65], [2560, 0.7]]
        assert ax.get_xlabel() == "cells"


def test_axes_of_ones_own(history, tmp_path):
    figure, ax = plt.subplots()
    size = figure.get_size_inches().tolist()
    assert st.pl.training(history, "masked_genes", ax=ax, show=False) is ax
    assert figure.get_size_inches().tolist() == size
    with pytest.raises(ValueError, match=r"4 panels are needed .*, but ax holds 1"):
        st.pl.training(history, ax=ax, show=False)
    st.pl.training(history, ["loss", "masked_cells"], show=False, save=tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 5000


def test_the_running_mean_smooths_long_histories():
    rng = np.random.default_rng(1)
    step = np.arange(400)
    noisy = pd.DataFrame(
        {
            "stage": "joint",
            "split": "train",
            "step": step,
            "loss": 5 - step / 100 + rng.normal(size=400),
        }
    )
    ax = st.pl.training(noisy, show=False)
    mean = np.array(drawn(ax, "training"))[:, 1]
    assert np.abs(mean - (5 - step / 100)).std() < 0.4


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ("nowhere", {}, FileNotFoundError, r"There is no nowhere.history\.csv; pass the folder"),
        (3, {}, TypeError, "Expected a run's folder, history or TrainResult, found int"),
        (pd.DataFrame({"stage": []}), {}, ValueError, "The history has no rows yet"),
        (
            None,
            {"parts": "masked"},
            KeyError,
            r"no loss part 'masked'; it has \['loss', 'masked_genes'",
        ),
        (None, {"x": "hours"}, KeyError, "x must be 'step', 'cells', 'tokens' or 'seconds'"),
        (None, {"parts": []}, ValueError, "leave `parts` out to see all"),
    ],
)
def test_messages(history, data, options, error, message):
    with pytest.raises(error, match=message):
        st.pl.training(history if data is None else data, show=False, **options)


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


def test_messages_probe(result):
    with pytest.raises(TypeError, match=r"Expected what st.tl.probe returns, found DataFrame"):
        st.pl.probe(result.scores, show=False)
    with pytest.raises(ValueError, match="measure must be one of"):
        st.pl.probe(result, measure="f1", show=False)
