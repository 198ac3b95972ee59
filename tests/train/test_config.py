from __future__ import annotations

from dataclasses import fields

import pytest

from stofm._config import build_dataclass
from stofm.train import (
    FileConfig,
    ModelSource,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    paper_schedule,
)


def test_the_defaults_are_the_papers():
    config = OptimizerConfig()
    # Table A.8.
    assert (config.learning_rate, config.warmup_steps) == (1e-4, 500)
    assert (config.batch_size, config.accumulation) == (16, 4)
    stages = paper_schedule()
    assert [(s.name, s.epochs) for s in stages] == [
        ("cell_encoder", 1),
        ("spatial", 2),
        ("joint", 1),
    ]
    assert stages[2].sampled_cells == 12
    assert stages[1].weights.masked_cells == stages[1].weights.pair_distances == 0.5
    assert not stages[1].vary_subslices


@pytest.mark.parametrize(
    ("config", "entries", "message"),
    [
        (RunConfig, {"seed": -1}, "seed must be a whole number from 0 to 4294967295, found -1"),
        (RunConfig, {"keep": "worst"}, r"keep must be one of \['best', 'last'\]"),
        (RunConfig, {"log_every": 0}, "log_every must be at least 1, found 0"),
        (FileConfig, {"species": "rat"}, r"species must be one of \['auto', 'human', 'mouse'\]"),
        (ModelSource, {"preset": "huge"}, r"preset must be one of \['mini', 'base'\]"),
        (OptimizerConfig, {"batch_size": 0}, "batch_size must be at least 1, found 0"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate must be positive .*, found 0"),
        (OptimizerConfig, {"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps must be at least 0"),
        (OptimizerConfig, {"beta2": 1.0}, "beta2 must be at least 0 and below 1, found 1"),
        (OptimizerConfig, {"max_norm": 0.0}, "max_norm must be positive, or left out"),
        (StageConfig, {"name": "spatial", "sampled_cells": 0}, "sampled_cells must be at least 1"),
        (StageConfig, {"name": "spatial", "surrounding_cells": 0}, "surrounding_cells must be at"),
        (StageConfig, {"name": "joint", "cell_loss": "l1"}, "cell_loss must be one of"),
    ],
)
def test_values_that_can_not_be(config, entries, message):
    with pytest.raises(ValueError, match=message):
        build_dataclass(config, entries, "here")


def test_only_what_changes_the_weights_is_among_the_settings():
    run = RunConfig(mixture={"technology": {"Visium": 0.5}})
    left_out = {field.name for field in fields(run)} - set(run.settings())
    assert left_out == {"checkpoint_every", "log_every", "n_threads", "tensorboard"}
