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
