from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from stofm.train.cell_samples import Draws
from stofm.train.stage_setup import KeptResults, StageSetup


@pytest.fixture
def removed():
    return []


def test_results_stay_while_checkpoints_refer_to_them(removed):
    results = KeptResults(removed.append)
    assert results.state() == {}
    results.replace("first")
    results.state()
    for key in "abcd":
        results.replace(key)
        results.state()
    # When d came, the checkpoints on disk referred to c and b.
    assert removed == ["a"]
    results.replace("e")
    assert removed == ["a", "b"]


def test_results_without_a_checkpoint_go_at_once(removed):
    results = KeptResults(removed.append)
    for key in ("first", "a", "a", "b"):
        results.replace(key)
    assert removed == ["a"]


def test_first_result_is_never_removed(removed):
    results = KeptResults(removed.append)
    for key in ("first", "a", "first", "b", "c"):
        results.replace(key)
    assert "first" not in removed
    assert results.first("d") == "first"
    assert KeptResults(removed.append).first("d") == "d"


def test_results_go_on_after_an_interruption(removed):
    before = KeptResults([].append)
    for key in ("first", "a"):
        before.replace(key)
    state = before.state()
    results = KeptResults(removed.append)
    assert results.restore(state) == "a"
    results.replace("b")
    assert removed == []
    results.state()
    results.replace("c")
    results.state()
    results.replace("d")
    assert removed == ["a"]
    assert KeptResults(removed.append).restore({}) is None


@pytest.mark.parametrize(("device", "multiple"), [("cpu", 1), ("cuda", 8)])
def test_nodes_are_padded_for_the_device(tmp_path, model, corpus, device, multiple):
    setup = StageSetup(
        model=model,
        corpus=corpus,
        draws=Draws(seed=0, stage=0, batch_size=1),
        folder=tmp_path / "cells",
        own_folder=tmp_path / "own",
        processes=SimpleNamespace(rank=0, count=1),
        device=torch.device(device),
    )
    assert setup.node_multiple == multiple
    assert setup.reader(corpus).max_length == 41
