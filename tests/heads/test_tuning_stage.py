from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from stofm.heads.tuning_samples import FineTuningConfig, KnownCells
from stofm.heads.tuning_stage import FineTuningObjective, FineTuningStage, tune

from stofm.heads.targets import Targets
from stofm.heads.tuning_lora import LowRankModel
from stofm.nn import HeadConfig, PredictionHead
from stofm.train.processes import Processes
from stofm.train.samples import Draws
from stofm.train.stages import StageSetup

BOTH = ("X_stofm_cell", "X_stofm")
WIDTHS = {"X_stofm_cell": 12, "X_stofm": 14}
SHORT = FineTuningConfig(
    learning_rate=1e-2,
    warmup_steps=1,
    epochs=1,
    min_steps=6,
    validate_every=2,
    sampled_cells=5,
    batch_size=2,
)


@pytest.fixture(scope="module")
def processes():
    return Processes.start("cpu")


@pytest.fixture
def targets(corpus, rng):
    return Targets("classes", rng.integers(0, 4, corpus.n_cells).astype(np.int64), 4)


@pytest.fixture
def make(model, corpus, targets, processes, tmp_path):
    """A stage on the corpus, of whose cells two in three are fitted; and its objective."""

    def build(use_rep=BOTH, *, low_rank=None, targets=targets, held_out=True, config=SHORT):
        torch.manual_seed(0)
        head = PredictionHead(HeadConfig(d_input=sum(WIDTHS[r] for r in use_rep), d_output=4))
        objective = FineTuningObjective(
            model, head, use_rep=use_rep, targets=targets, low_rank=low_rank
        )
        setup = StageSetup(
            model=model,
            corpus=corpus,
            draws=Draws(seed=3, stage=0, batch_size=config.batch_size),
            folder=tmp_path / "cells",
            own_folder=tmp_path / "cells",
            processes=processes,
            device=torch.device("cpu"),
        )
        rows = [np.arange(a, b) for a, b in pairwise(corpus.first_cell)]
        is_fitted = np.arange(corpus.n_cells) % 3 > 0
        known = [KnownCells(targets, rows, part) for part in (is_fitted, ~is_fitted)]
        return FineTuningStage(
            objective,
            setup,
            config,
            fitted=known[0],
            held_out=known[1] if held_out else None,
            low_rank=low_rank,
        )

    return build


def first_loss(stage):
    stage.refresh()
    part = stage.objective(stage.samples.load(stage.samples.epoch(0)[0], 0))["head"]
    return part.total / part.count


def moved(module):
    return {n for n, w in module.named_parameters() if w.grad is not None and (w.grad != 0).any()}


def test_gradients_reach_encoder_transformer_and_head(make, model):
    stage = make()
    first_loss(stage).backward()
    found = moved(stage.objective)
    assert {
        "model.cell_encoder.bert.encoder.layer.0.attention.self.query.weight",
        "model.cell_encoder.projection.weight",
        "model.se2_transformer.layers.0.qkv.weight",
        "head.last.weight",
    } <= found


def test_gradients_reach_the_changes_of_low_rank_only(make, model):
    low_rank = LowRankModel(model, rank=2, alpha=4.0, seed=0)
    stage = make(low_rank=low_rank)
    first_loss(stage).backward()
    found = moved(stage.objective)
    assert any(n.startswith("model.cell_encoder") and ".lora_B." in n for n in found)
    assert any(n.startswith("model.se2_transformer") and ".lora_B." in n for n in found)
    assert all(".lora_" in n for n in found if n.startswith("model."))


def test_a_head_on_the_cell_encoder_alone_leaves_the_transformer_out(make, monkeypatch, model):
    monkeypatch.setattr(model.se2_transformer, "forward", None)
    stage = make(("X_stofm_cell",))
    first_loss(stage).backward()
    assert any(n.startswith("model.cell_encoder") for n in moved(stage.objective))
    assert not list(stage._setup.folder.glob("virtual-*"))


def test_the_heads_columns_follow_use_rep(make):
    """Heads whose first layers have their columns exchanged say the same."""
    first, second = make(BOTH), make(BOTH[::-1])
    head = copy.deepcopy(first.objective.head)
    weight = head.hidden[0].weight.data
    head.hidden[0].weight.data = torch.cat([weight[:, 12:], weight[:, :12]], dim=1)
    second.objective.head = head
    losses = []
    for stage in (first, second):
        stage.objective.eval()
        losses.append(first_loss(stage).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_class_weights_count(make, corpus, targets):
    weights = np.array([1.0, 0.0, 0.0, 0.0], dtype=np.float32)
    weighted = Targets("classes", targets.values, 4, class_weights=weights)
    stage = make(targets=weighted)
    stage.refresh()
    inputs = stage.samples.load(stage.samples.epoch(0)[0], 0)
    assert stage.objective(inputs)["head"].count == (inputs.targets == 0).sum()


@pytest.mark.parametrize("is_low_rank", [False, True])
def test_tuning_ends_with_the_best_weights_and_with_what_belongs_to_them(
    make, model, processes, is_low_rank
):
    low_rank = LowRankModel(model, rank=2, alpha=4.0, seed=0) if is_low_rank else None
    stage = make(low_rank=low_rank)
    found = tune(stage, SHORT, processes=processes, seed=1, show_progress_bar=False)
    validations = {r["step"]: r["loss"] for r in found.rows if r["split"] == "validation"}
    assert list(validations) == [0, 3, 6]
    del validations[0]
    assert found.best_step == min(validations, key=validations.__getitem__)
    stage.objective.eval()
    batches = stage.validation.epoch(0)
    with torch.no_grad():
        parts = [stage.objective(stage.validation.load(b, 0))["head"] for b in batches]
    loss = sum(p.total.item() for p in parts) / sum(p.count for p in parts)
    assert loss == pytest.approx(validations[found.best_step], rel=1e-4)
    # Of the older results nothing stays.
    assert len(list(stage._setup.folder.glob("cells-*"))) == len(stage._setup.corpus.slices)


def test_the_last_step_counts_without_validation(make, processes):
    stage = make(held_out=False)
    found = tune(stage, SHORT, processes=processes, seed=1, show_progress_bar=False)
    assert found.best_step == 6
    assert {row["split"] for row in found.rows} == {"train"}


@pytest.mark.parametrize(("min_steps", "n_steps"), [(1, 6), (7, 9)])
def test_tuning_is_as_long_as_epochs_and_fewest_steps_need(make, processes, min_steps, n_steps):
    stage = make()
    assert len(stage.samples.epoch(0)) == 3
    config = replace(SHORT, epochs=2, min_steps=min_steps, validate_every=3)
    found = tune(stage, config, processes=processes, seed=1, show_progress_bar=False)
    assert found.rows[-1]["split"] == "validation"
    assert found.rows[-1]["step"] == n_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, found 0"),
        ({"sampled_cells": 0}, "sampled_cells must be at least 1"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_alpha": -1.0}, "lora_alpha must be positive and finite, found -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        FineTuningConfig(**options)
