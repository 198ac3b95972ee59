from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

from stofm.nn import Stofm, StofmConfig
from stofm.train import LossWeights, Recipe

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
ablations = importlib.import_module("ablations")
probe_tasks = importlib.import_module("probe_tasks")
variants = importlib.import_module("variants")

RECIPE = """
[run]
seed = 4
n_threads = 0
log_every = 1

[data]
validation = ["held_out.h5ad"]
exclude = ["c.h5ad"]

[[data.options]]
library_key = "slice_id"

[model]
vocabulary = "VOCABULARY"
gene_embeddings = "coexpression"
max_tokens = 40
[model.cell_encoder]
n_layers = 1
d_hidden = 8
n_heads = 2
d_inner = 8
d_gene = 8
d_cell = 12
[model.se2_transformer]
d_cell = 12
n_passed = 4
n_layers = 1
d_model = 8
n_heads = 2
d_inner = 8
n_kernels = 3
[model.subslice]
n_cells = 40
n_neighbors = 7
n_components = 2

[[stage]]
name = "cell_encoder"
max_steps = 90
[stage.optimizer]
batch_size = 16
accumulation = 1
warmup_steps = 1

[[stage]]
name = "spatial"
vary_subslices = true
[stage.weights]
masked_cells = 0.9
visible_cells = 0.5
surroundings = 2.0
[stage.optimizer]
batch_size = 2
accumulation = 1
warmup_steps = 1

[[stage]]
name = "joint"
"""
TASKS = (probe_tasks.Task(name="kinds", fit=("a",), test="c", label="kind"),)


@pytest.fixture
def folder(adata, tmp_path):
    adata.obs["slice_id"] = adata.obs["library"]
    path = tmp_path / "slices"
    path.mkdir()
    left, right = (adata[adata.obs["library"] == name].copy() for name in ("left", "right"))
    left.write_h5ad(path / "a.h5ad")
    right.write_h5ad(path / "c.h5ad")
    left[:50].copy().write_h5ad(path / "held_out.h5ad")
    return path


@pytest.fixture
def recipe_file(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "genes.tsv")
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("VOCABULARY", str(tmp_path / "genes.tsv")))
    return path


@pytest.fixture
def recipe(recipe_file):
    return Recipe.from_toml(recipe_file)


@pytest.fixture
def base(recipe):
    return variants.shortened(recipe, steps=2, cell_steps=1)


@pytest.fixture
def trainer(folder, base, tmp_path):
    return ablations.Trainer(data=folder, base=base, work=tmp_path / "work", device="cpu")


@pytest.fixture
def tasks(folder):
    return probe_tasks.load_tasks(folder, TASKS)


def weights(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


def same(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    return all(np.array_equal(value, second[name]) for name, value in first.items())


def test_shortened_leaves_out_validation_and_the_joint_stage(recipe, base):
    assert [stage.name for stage in base.stages] == ["cell_encoder", "spatial"]
    assert [stage.max_steps for stage in base.stages] == [1, 2]
    assert base.stages[1].epochs == 2
    # Still not trained on.
    assert base.data.validation == ()
    assert base.data.exclude == ("c.h5ad", "held_out.h5ad")
    assert base.run == recipe.run
    assert base.model == recipe.model
    # The cell encoder's steps are the recipe's unless they are given.
    assert variants.shortened(recipe, steps=9, cell_steps=None).stages[0] == recipe.stages[0]


def test_recipes_that_variants_cannot_be_made_of_are_refused(recipe):
    joint_only = replace(recipe, stages=recipe.stages[2:])
    with pytest.raises(ValueError, match=r"stages cell_encoder and spatial, found \['joint'\]"):
        variants.shortened(joint_only, steps=2, cell_steps=None)
    goes_on = replace(recipe, model=type(recipe.model)(checkpoint="some/folder"))
    with pytest.raises(ValueError, match=r"goes on from the checkpoint 'some/folder'"):
        variants.shortened(goes_on, steps=2, cell_steps=None)


def test_each_variant_changes_one_thing(base):
    def model(**changes):
        return replace(base, model=replace(base.model, **changes))

    def rules(**changes):
        return model(subslice=base.model.subslice | changes)

    def spatial(**changes):
        return replace(base, stages=(base.stages[0], replace(base.stages[1], **changes)))

    def batches(batch_size):
        return {"optimizer": replace(base.stages[1].optimizer, batch_size=batch_size)}

    def of_size(n_cells, batch_size):
        return replace(rules(n_cells=n_cells), stages=spatial(**batches(batch_size)).stages)

    def masked_cells(weight):
        return spatial(weights=LossWeights(masked_cells=weight))

    sizes = base.model.se2_transformer
    expected = {
        "full": base,
        "no-virtual-cells": spatial(virtual_cells=False),
        "single-cells": of_size(1, 80),
        "no-distances": model(se2_transformer=sizes | {"pair_bias": False}),
        "no-domain-adaptation": replace(base, stages=base.stages[1:]),
        "random-genes": model(gene_embeddings="random"),
        "alpha-0": rules(position_weight=0.0),
        "alpha-0.5": rules(position_weight=0.5),
        "alpha-0.8": rules(position_weight=0.8),
        "lambda-0": masked_cells(0.0),
        "lambda-0.5": masked_cells(0.5),
        "lambda-1": masked_cells(1.0),
        # Two sub-slices of 40 cells in a batch; one is the least.
        "size-200": of_size(200, 1),
        "size-1000": of_size(1000, 1),
        "resolution-0.5": rules(leiden_resolution=0.5),
        "resolution-2": rules(leiden_resolution=2.0),
    }
    assert {name: one.change(base) for name, one in variants.VARIANTS.items()} == expected


def test_a_batch_has_as_many_cells_whatever_the_size_of_sub_slices(base):
    def batch_size(recipe, n_cells):
        changed = variants.with_subslices_of(n_cells)(recipe)
        return variants.spatial_stage(changed).optimizer.batch_size

    # The preset's 500 cells, where the recipe says nothing.
    plain = replace(base, model=replace(base.model, subslice={}))
    assert [batch_size(plain, n) for n in (100, 200, 400, 1000)] == [10, 5, 2, 1]
    # 800 are too many sub-slices.
    assert batch_size(plain, 1) == 256
    # The stage's own size, which then gives way.
    stage = replace(plain.stages[1], subslice_cells=1000)
    own = replace(plain, stages=(plain.stages[0], stage))
    assert batch_size(own, 100) == 20
    assert variants.spatial_stage(variants.with_subslices_of(100)(own)).subslice_cells is None


def test_variants_share_the_cell_encoder_unless_they_differ_in_it(trainer, monkeypatch):
    trained = []
    original = ablations.train_recipe

    def noted(data, recipe, **options):
        trained.append((options["out_dir"].name, [stage.name for stage in recipe.stages]))
        return original(data, recipe, **options)

    monkeypatch.setattr(ablations, "train_recipe", noted)
    full = trainer.train("full", seed=0)
    blind = trainer.train("no-distances", seed=1)
    assert same(full.cell_encoder, blind.cell_encoder)
    assert not same(full.se2_transformer, blind.se2_transformer)
    assert blind.config.se2_transformer.pair_bias is False
    assert blind.config.cell_encoder == full.config.cell_encoder
    random = trainer.train("random-genes", seed=0)
    assert not same(full.cell_encoder, random.cell_encoder)
    folders = [name for name, stages in trained if stages == ["cell_encoder"]]
    assert len(folders) == 3
    assert folders[0] == folders[1] != folders[2]
    assert len(list((trainer.work / "cell-encoders").iterdir())) == 2


def test_what_seed_and_rules_change(trainer):
    first = trainer.train("full", seed=0)
    other = trainer.train("full", seed=1)
    assert same(first.cell_encoder, other.cell_encoder)
    assert not same(first.se2_transformer, other.se2_transformer)
    wide = trainer.train("size-200", seed=0)
    assert wide.config.subslice == replace(first.config.subslice, n_cells=200)
    # Trained to the end already: nothing is done again, nothing changes.
    assert same(trainer.train("full", seed=0), first)


def test_without_domain_adaptation_cells_are_the_factors_of_co_expression(trainer):
    model = trainer.train("no-domain-adaptation", seed=1)
    encoder = model.cell_encoder
    start = Stofm(model.config, model.vocabulary, seed=5)
    # What is pooled by is set, and what training would have changed is not.
    assert not same(start.cell_encoder.gene_embeddings, encoder.gene_embeddings)
    assert encoder.gene_offset.any()
    assert same(start.cell_encoder.bert.encoder, encoder.bert.encoder)
    assert same(start.cell_encoder.projection, encoder.projection)
    assert not same(start.se2_transformer, model.se2_transformer)
    assert not (trainer.work / "cell-encoders").exists()
    full = trainer.train("full", seed=0).cell_encoder
    assert not same(start.cell_encoder.projection, full.projection)


def test_clean_deletes_one_variant_only(trainer):
    trainer.train("full", seed=0)
    trainer.train("lambda-1", seed=0)
    trainer.clean("full", seed=0)
    left = [path.name.rsplit("-", 1)[0] for path in (trainer.work / "variants").iterdir()]
    assert left == ["lambda-1-0"]


@pytest.mark.parametrize("name", ["no-virtual-cells", "single-cells"])
def test_measured_as_trained(name, trainer, tasks, monkeypatch):
    seen = {}
    original = ablations.embed_with

    def noted(model, tasks, **options):
        seen.update(options, n_cells=model.config.subslice.n_cells)
        return original(model, tasks, **options)

    monkeypatch.setattr(ablations, "embed_with", noted)
    row = ablations.measure(trainer, name, seed=0, tasks=tasks, probe_seeds=(0, 1))
    assert seen["virtual_cells"] is (name != "no-virtual-cells")
    assert seen["n_cells"] == (1 if name == "single-cells" else 40)
    assert (row["variant"], row["seed"]) == (name, 0)
    assert row["seconds"] > 0
    assert list(row["macro_f1"]) == ["cell", "spatial", "cell + spatial"]
    scores = [one["kinds"] for one in row["macro_f1"].values()]
    assert [len(one) for one in scores] == [2, 2, 2]
    assert 0 <= np.min(scores) <= np.max(scores) <= 1


def test_run_goes_on_where_it_stopped(trainer, tasks, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "table"
    measured = []

    def measure(trainer, name, *, seed, tasks, probe_seeds):
        if len(measured) == 3:
            raise KeyboardInterrupt
        (trainer.work / "variants").mkdir(parents=True, exist_ok=True)
        measured.append((name, seed))
        own = {"kinds": [0.5 + 0.1 * seed, 0.7 + 0.1 * seed]}
        return {
            "variant": name,
            "seed": seed,
            "seconds": 1.0,
            "macro_f1": dict.fromkeys(("cell", "spatial", "cell + spatial"), own),
        }

    def run():
        report = ablations.open_report(out, trainer.base, tasks, probe_seeds=2)
        ablations.run(trainer, report, out, names=["full", "lambda-1"], tasks=tasks, seeds=2)

    monkeypatch.setattr(ablations, "measure", measure)
    monkeypatch.setattr(ablations.Trainer, "clean", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(json.loads((out.parent / "table.json").read_text())["results"]) == 3
    monkeypatch.setattr(ablations, "measure", lambda *a, **k: measured.clear() or measure(*a, **k))
    run()
    assert measured == [("lambda-1", 1)]
    report = json.loads((out.parent / "table.json").read_text())
    assert [(row["variant"], row["seed"]) for row in report["results"]] == [
        ("full", 0),
        ("lambda-1", 0),
        ("full", 1),
        ("lambda-1", 1),
    ]
    text = (out.parent / "table.md").read_text()
    assert "after 2 steps of the spatial stage" in text
    # The mean of the heads' seeds counts, the spread is that of training seeds.
    assert "| as the recipe | 0.650 ± 0.071 | 0.650 ± 0.071 |" in text
    assert "training lambda-1, seed 1" in capsys.readouterr().err
    changed = replace(trainer.base, run=replace(trainer.base.run, seed=9))
    with pytest.raises(ValueError, match=r"table\.json was made with .* Give another --out"):
        ablations.open_report(out, changed, tasks, probe_seeds=2)


def test_a_trained_slice_is_not_tested(base, folder, tasks):
    ablations.refuse_trained_on(base, folder, tasks)
    careless = replace(base, data=replace(base.data, exclude=()))
    with pytest.raises(ValueError, match="trains on c, where probes test; name them in exclude"):
        ablations.refuse_trained_on(careless, folder, tasks)


def test_the_command_line(folder, recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "TASKS", TASKS)
    words = ["ablations.py", str(folder), "--recipe", str(recipe_file), "--steps", "1"]
    words += ["--cell-steps", "1", "--seeds", "1", "--probe-seeds", "1", "--only", "full"]
    words += ["--device", "cpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", words)
    ablations.main()
    assert "| as the recipe | 1.000 | 1.000 |" in capsys.readouterr().out
    row = json.loads((tmp_path / "out.json").read_text())["results"][0]
    assert list(row["macro_f1"]["spatial"]) == ["kinds"]
    # Of a variant that is done only what all share stays.
    assert list((tmp_path / "work" / "variants").iterdir()) == []
    for wrong, message in (
        (["--steps", "0"], "--steps must be at least 1, found 0"),
        (["--probe-seeds", "2"], "Give another --out"),
        (["--recipe", "nothing.toml"], "nothing.toml"),
    ):
        monkeypatch.setattr(sys, "argv", [*words, *wrong])
        with pytest.raises(SystemExit):
            ablations.main()
        assert message in capsys.readouterr().err


def test_each_change_is_an_entry_of_the_model(base):
    preset = StofmConfig.mini(10)
    for variant in variants.VARIANTS.values():
        model = variant.change(base).model
        replace(preset.se2_transformer, **model.se2_transformer)
        replace(preset.subslice, **model.subslice)


def test_tasks_leave_out_files_that_the_recipe_excludes():
    recipe = Recipe.from_toml(Path(__file__).parents[2] / "recipes" / "stofm-mini.toml")
    tasks = ablations.TASKS[: ablations._N_TASKS]
    for task in tasks:
        assert task.fit
        assert any(fnmatch(f"{task.test}.h5ad", one) for one in recipe.data.exclude)
