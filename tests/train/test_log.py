from __future__ import annotations

import sys

import psutil
import pytest
import torch
from torch import nn

from stofm.train.log import (
    History,
    ProgressBar,
    TensorBoard,
    count_weights,
    peak_memory,
    read_history,
)


def row(step, **parts):
    return {"stage": "spatial", "split": "train", "epoch": 0, "step": step, **parts}


def test_rows_come_back_to_the_last_bit(tmp_path):
    history = History(tmp_path / "history.csv")
    values = [0.1 + 0.2, 1e-17 / 3, 12345678.9012345678]
    for step, value in enumerate(values):
        history.append(row(step, loss=value, masked_cells=value))
    table = read_history(tmp_path / "history.csv")
    assert table["loss"].tolist() == values


def test_a_new_loss_part_gets_a_column(tmp_path):
    history = History(tmp_path / "history.csv")
    history.append(row(1, masked_genes=1.0))
    history.append(row(2, masked_cells=2.0))
    history.append(row(3, masked_genes=3.0))
    table = read_history(tmp_path / "history.csv")
    assert table["masked_genes"].tolist()[::2] == [1.0, 3.0]
    assert table["masked_cells"].isna().tolist() == [True, False, True]


def test_rows_that_are_there_stay(tmp_path):
    path = tmp_path / "history.csv"
    History(path).append(row(1, masked_cells=1.0))
    again = History(path)
    again.append(row(2, masked_cells=2.0, masked_genes=3.0))
    table = read_history(path)
    assert table["masked_cells"].tolist() == [1.0, 2.0]
    assert table["masked_genes"].tolist()[1:] == [3.0]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'stofm\[train\]'"):
        TensorBoard(tmp_path, 0)


def test_the_bar_shows_loss_parts_and_speed(capsys, monkeypatch):
    monkeypatch.setattr("stofm.train.log.bars_can_be_seen", lambda: True)
    bar = ProgressBar("spatial", total=4, done=1, show=True)
    bar.show_row({"loss": 0.123456, "masked_cells": 2.0}, ("masked_cells", "pairs"), 1234.5)
    bar.advance()
    bar.close()
    text = capsys.readouterr().err
    assert "spatial" in text
    assert "2/4" in text
    assert "loss=0.1235, masked_cells=2, cells/s=1234" in text


def test_no_bar_unless_asked_for(capsys):
    bar = ProgressBar("spatial", total=4, done=0, show=False)
    bar.show_row({"loss": 0.1}, (), 1.0)
    bar.advance()
    bar.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("done", [0, 4])
def test_tensorboard_hides_only_what_comes_after_the_checkpoint(tmp_path, done):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in ((0, 1.0), (done, 2.0)):
        board = TensorBoard(tmp_path, first)
        for step in range(first + 1, 7):
            board.append(row(step, loss=value))
        board.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    expected = [(step, 1.0 if step <= done else 2.0) for step in range(1, 7)]
    assert [(event.step, event.value) for event in events] == expected


def test_weights_are_counted_once_and_without_frozen_ones():
    module = nn.ModuleDict({"words": nn.Embedding(7, 3), "dense": nn.Linear(3, 2)})
    module["again"] = module["dense"]
    module["frozen"] = nn.Linear(9, 9).requires_grad_(False)
    assert count_weights(module) == 7 * 3 + 3 * 2 + 2


def test_peak_memory_counts_what_was_given_back():
    device = torch.device("cpu")
    before = peak_memory(device)
    block = bytearray(before - psutil.Process().memory_info().rss + 50_000_000)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert peak_memory(device) > before + 40_000_000
