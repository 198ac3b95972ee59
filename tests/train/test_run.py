from __future__ import annotations

import psutil
import torch

from stofm._files import read_table
from stofm.train.folder import HISTORY_COLUMNS, RunFolder
from stofm.train.run import peak_memory

PARTS = ["masked_genes", "masked_cells"]


def row(step, **parts):
    return {"stage": "spatial", "split": "train", "epoch": 0, "step": step, **parts}


def test_rows_come_back_to_the_last_bit(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin_history(PARTS)
    values = [0.1 + 0.2, 1e-17 / 3, 12345678.9012345678]
    for step, value in enumerate(values):
        folder.append(row(step, loss=value, masked_cells=value))
    table = read_table(folder.history)
    assert list(table) == [*HISTORY_COLUMNS, *PARTS]
    assert table["loss"].tolist() == values
    assert table["masked_genes"].isna().all()


def test_a_history_goes_on_with_the_rows_of_a_checkpoint(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path / "b")
    first.begin_history(PARTS)
    first.append(row(1, masked_genes=0.1))
    (tmp_path / "one" / "training").mkdir(parents=True)
    first.history.rename(tmp_path / "one" / "training" / "history.csv")
    second.begin_history(PARTS, tmp_path / "one")
    second.append(row(2, masked_cells=2.0))
    table = read_table(second.history)
    assert table["masked_genes"].tolist()[:1] == [0.1]
    assert table["masked_cells"].tolist()[1:] == [2.0]


def test_peak_memory_counts_what_was_given_back():
    device = torch.device("cpu")
    before = peak_memory(device)
    block = bytearray(before - psutil.Process().memory_info().rss + 50_000_000)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert peak_memory(device) > before + 40_000_000
