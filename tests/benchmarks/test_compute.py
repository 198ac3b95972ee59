"""Counts of operations against torch's, and the recipes that they are made for."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stofm.datasets import simulate_slice
from stofm.genes import RankedTokens
from stofm.nn import CellEncoder, SE2Transformer, StofmConfig, SubSliceBatch, TokenBatch
from stofm.spatial import build_subslice, lay_out_slice
from stofm.train import Recipe, paper_schedule
from stofm.train.recipe import train_recipe

FOLDER = Path(__file__).parents[2]
sys.path.append(str(FOLDER / "benchmarks"))
compute = importlib.import_module("compute")


def counted(work):
    counter = FlopCounterMode(display=False)
    # Of the CPU's fused attention it counts nothing.
    with sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "options",
    [{}, {"values": "log", "pooled": True, "d_gene": 24, "d_cell": 36}, {"max_positions": 31}],
)
def test_operations_of_the_cell_encoder(model, vocabulary, rng, options):
    config = replace(model.config.cell_encoder, n_layers=3, d_hidden=64, d_inner=80, **options)
    encoder, n_cells, n_genes = CellEncoder(config).eval(), 17, 40
    lists = [rng.permutation(vocabulary.tokens)[:n_genes] for _ in range(n_cells)]
    ranked = RankedTokens(
        tokens=np.concatenate(lists),
        offsets=n_genes * np.arange(n_cells + 1),
        values=rng.uniform(0.5, 9.0, n_cells * n_genes).astype(np.float32),
    )
    length = min(n_genes + 1, config.max_positions)
    special = {"cls_token": vocabulary.cls, "pad_token": vocabulary.pad}
    batch = TokenBatch.from_ranked(ranked, np.arange(n_cells), length=length, **special)
    found = n_cells * compute.encoder_flops(config, n_genes + 1)
    assert found == pytest.approx(counted(lambda: encoder(batch)), rel=0.02)
    if not config.pooled:
        found = n_cells * compute.encoder_flops(config, n_genes + 1, everywhere=True)
        assert found == pytest.approx(counted(lambda: encoder.hidden_states(batch)), rel=0.02)


def test_operations_of_the_transformer(model, rng):
    config = replace(model.config.se2_transformer, n_layers=3, d_model=64, n_heads=4, d_inner=80)
    transformer, rules = SE2Transformer(config).eval(), model.config.subslice
    features = rng.normal(size=(53, 12)).astype(np.float32)
    layout = lay_out_slice(rng.random((53, 2)), features, rules)
    subslice = build_subslice(layout, features, np.arange(53), rules)
    batch = SubSliceBatch.from_subslices([subslice])
    found = compute.transformer_flops(config, batch.features.shape[1], len(batch.pairs.distances))
    assert found == pytest.approx(counted(lambda: transformer(batch)), rel=0.02)


def test_a_stage_that_is_cut_short_takes_less():
    config = StofmConfig.mini(100)
    work = compute.Work(n_cells=100_000, n_tokens=50)
    for stage in paper_schedule():
        whole, twice, few = (
            compute.stage_flops(s, config, work)
            for s in (stage, replace(stage, epochs=2 * stage.epochs), replace(stage, max_steps=1))
        )
        encoding = (
            0
            if stage.name == "cell_encoder"
            else 100_000 * compute.encoder_flops(config.cell_encoder, 50)
        )
        assert twice - encoding == pytest.approx(2 * (whole - encoding))
        assert 0 < few - encoding < whole - encoding


def test_the_base_recipe_is_the_papers():
    recipe = Recipe.from_toml(FOLDER / "recipes" / "stofm-base.toml")
    assert recipe.stages == paper_schedule()
    assert recipe.model.config(99) == StofmConfig.base(99)


def test_the_table_has_a_row_for_each_recipe(monkeypatch, capsys):
    paths = [str(FOLDER / "recipes" / f"stofm-{name}.toml") for name in ("small", "base")]
    monkeypatch.setattr(sys, "argv", ["compute.py", *paths, "--n-cells", "1e6"])
    compute.main()
    small, base = capsys.readouterr().out.splitlines()[2:]
    assert small.startswith("| `stofm-small` | 16.3 million |")
    assert base.startswith("| `stofm-base` | 38.7 million |")


@pytest.mark.parametrize("name", ["small", "base"])
def test_a_recipe_trains(name, tmp_path):
    recipe = Recipe.from_toml(FOLDER / "recipes" / f"stofm-{name}.toml")
    (tmp_path / "data").mkdir()
    simulate_slice(60, 120, seed=0).write_h5ad(tmp_path / "data" / "slice.h5ad")
    sizes = {"d_cell": 24, "n_layers": 1, "n_heads": 2, "d_inner": 8}
    genes = {"d_gene": 16} if name == "small" else {}
    passed = {"n_passed": 8} if name == "small" else {}
    model = replace(
        recipe.model,
        vocabulary="fit",
        cell_encoder=recipe.model.cell_encoder
        | sizes
        | genes
        | {"d_hidden": 8, "max_positions": 21},
        se2_transformer=recipe.model.se2_transformer
        | sizes
        | passed
        | {"d_model": 8, "n_kernels": 4},
    )
    stages = tuple(
        replace(s, epochs=9, max_steps=2, optimizer=replace(s.optimizer, batch_size=1))
        for s in recipe.stages
    )
    result = train_recipe(
        tmp_path / "data",
        replace(recipe, model=model, stages=stages),
        out_dir=tmp_path / "run",
        device="cpu",
        show_progress_bar=False,
    )
    assert result.model.name == f"stofm-{name}"
    assert [stage["steps"] for stage in result.run["stages"]] == [2, 2, 2]
