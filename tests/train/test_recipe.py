from __future__ import annotations

import tomllib

import pytest

from stofm.train import (
    ContrastiveConfig,
    DataConfig,
    FileConfig,
    LossWeights,
    ModelSource,
    OptimizerConfig,
    Recipe,
    RunConfig,
    SpatialMasking,
    StageConfig,
    TokenMasking,
)

RECIPE = """
[run]
seed = 3
precision = "bf16-mixed"
patience = 4

[data]
train = ["st/*.h5ad"]
validation = ["st/b*.h5ad"]
exclude = ["st/c.h5ad"]

[[data.options]]
files = "*.h5ad"
species = "mouse"

[[data.options]]
files = "st/a*.h5ad"
library_key = "slide"
technology = "ST"

[model]
preset = "mini"
gene_embeddings = "coexpression"
[model.cell_encoder]
pooled = true

[[stage]]
name = "cell_encoder"
max_steps = 50
[stage.masking]
share = 0.2
[stage.contrastive]
gene_dropout = 0.3
[stage.weights]
contrastive = 0.5

[[stage]]
name = "spatial"
epochs = 2
cell_loss = "cosine"
[stage.spatial_masking]
masked = 0.12
mask_value = -100
[stage.optimizer]
learning_rate = 3e-4
"""


def test_a_recipe_gives_dataclasses():
    recipe = Recipe.from_dict(tomllib.loads(RECIPE))
    assert recipe.run == RunConfig(seed=3, precision="bf16-mixed", patience=4)
    assert recipe.data == DataConfig(
        train=("st/*.h5ad",),
        validation=("st/b*.h5ad",),
        exclude=("st/c.h5ad",),
        options=(
            FileConfig(files="*.h5ad", species="mouse"),
            FileConfig(files="st/a*.h5ad", library_key="slide", technology="ST"),
        ),
    )
    assert recipe.model == ModelSource(
        preset="mini", gene_embeddings="coexpression", cell_encoder={"pooled": True}
    )
    cells, spatial = recipe.stages
    assert cells == StageConfig(
        name="cell_encoder",
        max_steps=50,
        masking=TokenMasking(share=0.2),
        contrastive=ContrastiveConfig(gene_dropout=0.3),
        weights=LossWeights(contrastive=0.5),
    )
    assert spatial == StageConfig(
        name="spatial",
        epochs=2,
        cell_loss="cosine",
        spatial_masking=SpatialMasking(masked=0.12, mask_value=-100),
        optimizer=OptimizerConfig(learning_rate=3e-4),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "seed = 3",
            "sed = 3",
            r"Unknown entry 'sed' in \[run\] of the recipe; did you mean 'seed'",
        ),
        ("[run]", "[runn]", "Unknown entry 'runn' in the recipe; did you mean 'run'"),
        ("epochs = 2", "epoch = 2", r"Unknown entry 'epoch' in \[\[stage\]\] of .*mean 'epochs'"),
        ("share = 0.2", "shares = 0.2", r"'shares' in \[stage.masking\] of .*mean 'share'"),
        ("learning_rate", "lr", r"Unknown entry 'lr' in \[stage.optimizer\] of the recipe"),
        ('preset = "mini"', 'present = "mini"', r"\[model\] of the recipe; did you mean 'preset'"),
        ("library_key", "libary_key", r"\[\[data.options\]\] of .*did you mean 'library_key'"),
        ("epochs = 2", 'epochs = "2"', r"\[\[stage\]\] of the recipe: epochs must be an integer"),
        ("epochs = 2", "epochs = true", "epochs must be an integer, found True"),
        ("epochs = 2", "epochs = 0", "epochs must be at least 1, found 0"),
        ("share = 0.2", "share = 1.2", r"share must lie between 0 and 1, found 1.2"),
        ("share = 0.2", 'share = "much"', r"share must be a finite number, found 'much'"),
        ("patience = 4", "patience = 4.5", "patience must be an integer, found 4.5"),
        ('"spatial"', '"spatail"', r"name must be one of \['cell_encoder', 'spatial', 'joint'\]"),
        ("[stage.masking]", "[stage.nothing]", "Unknown entry 'nothing'"),
        ('train = ["st/*.h5ad"]', 'train = "st"', r"\[data\].*: train must be a list of strings"),
        ('train = ["st/*.h5ad"]', "train = [1]", "train must be a list of strings"),
        ("masked = 0.12", "masked = 0.95", "must add up to at most 1"),
        ("pooled = true", "pooled = true\n[model.what]", "Unknown entry 'what'"),
        ("[stage.masking]\nshare = 0.2", "masking = 3", r"\[stage.masking\] .*must be a table"),
        (
            '[[data.options]]\nfiles = "*.h5ad"\nspecies = "mouse"\n\n[[data.options]]',
            "[data.options]",
            r"options must be a list of tables: write \[\[data\.options\]\],",
        ),
        ('name = "spatial"', "", r"Missing from \[\[stage\]\] of the recipe: \['name'\]"),
        ('precision = "bf16-mixed"', 'precision = "bf16"', "precision must be one of"),
        ('preset = "mini"', 'checkpoint = "stofm-mini"', "A checkpoint's sizes can't be changed"),
        ('"coexpression"', '"x.pkl"', "'random', 'coexpression' or a table that ends in .parquet"),
    ],
)
def test_what_a_recipe_must_not_hold(old, new, message):
    assert old in RECIPE
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(tomllib.loads(RECIPE.replace(old, new)))


def test_a_recipe_needs_a_stage():
    with pytest.raises(ValueError, match=r"has no \[\[stage\]\]; add one"):
        Recipe.from_dict({"stage": []})
    with pytest.raises(ValueError, match=r"Missing from the recipe: \['stage'\]"):
        Recipe.from_dict({})


def test_a_stage_in_single_brackets_says_how_to_write_it():
    entries = tomllib.loads('[stage]\nname = "spatial"')
    with pytest.raises(
        ValueError,
        match=r"^mini\.toml: stage must be a list of tables: write \[\[stage\]\], with two brack",
    ):
        Recipe.from_dict(entries, "mini.toml")
    stage = [{"name": "spatial"}]
    for name in ("run", "data", "model"):
        with pytest.raises(ValueError, match=rf"\[{name}\] of the recipe must be a table, found"):
            Recipe.from_dict({"stage": stage, name: [{}]})


def test_a_file_that_is_no_toml_is_named(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[run\nseed = 1")
    with pytest.raises(ValueError, match=r"recipe\.toml is not valid TOML: .*line 1"):
        Recipe.from_toml(path)
    path.write_text(RECIPE)
    assert Recipe.from_toml(path) == Recipe.from_dict(tomllib.loads(RECIPE))


@pytest.fixture
def folder(tmp_path):
    for name in ("a1", "a2", "b1", "c"):
        (tmp_path / "st").mkdir(exist_ok=True)
        (tmp_path / "st" / f"{name}.h5ad").touch()
    (tmp_path / "other.h5ad").touch()
    (tmp_path / "store.zarr").mkdir()
    return tmp_path


def test_files_that_are_held_out_or_excluded_are_not_trained_on(folder):
    data = Recipe.from_dict(tomllib.loads(RECIPE)).data
    train, held_out = data.find(folder)
    assert [path.name for path in train] == ["a1.h5ad", "a2.h5ad"]
    assert [path.name for path in held_out] == ["b1.h5ad"]
    # What is excluded is not validated on either.
    both = DataConfig(train=("st/*",), validation=("st/*",), exclude=("st/b1*",))
    with pytest.raises(FileNotFoundError, match="No file is left to train on"):
        both.find(folder)
    train, _ = DataConfig().find(folder)
    assert [path.name for path in train] == ["other.h5ad", "store.zarr"]


def test_the_last_table_that_names_a_file_counts(folder):
    data = Recipe.from_dict(tomllib.loads(RECIPE)).data
    (first, _), (held_out,) = data.find(folder)
    assert data.options_of(first, folder).library_key == "slide"
    assert data.options_of(held_out, folder) == FileConfig(files="*.h5ad", species="mouse")
    assert data.options_of(folder / "store.zarr", folder) == FileConfig()


@pytest.mark.parametrize("entry", ["train", "validation"])
def test_a_pattern_that_names_nothing_is_refused(folder, entry):
    with pytest.raises(FileNotFoundError, match=r"'nothing\*' names no file in "):
        DataConfig(**{entry: ("nothing*",)}).find(folder)
    with pytest.raises(FileNotFoundError, match="There is no data folder"):
        DataConfig().find(folder / "nowhere")


def test_what_is_excluded_and_not_there_is_told(folder):
    patterns = ("st/c.h5ad", "st/d.h5ad", "nothing*")
    expected = r"exclude = \['st/d.h5ad', 'nothing\*'\] names no file in"
    with pytest.warns(UserWarning, match=expected):
        train, _ = DataConfig(train=("st/*.h5ad",), exclude=patterns).find(folder)
    assert [path.stem for path in train] == ["a1", "a2", "b1"]
    DataConfig(train=("st/*.h5ad",), exclude=("st/c.h5ad",)).find(folder)


@pytest.mark.parametrize("name", ["genes.npz", "../genes.csv.gz"])
def test_a_table_of_gene_embeddings_is_found_from_the_recipe(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.replace('"coexpression"', f'"{name}"'))
    assert Recipe.from_toml(file).model.gene_embeddings == str(tmp_path / name)
    file.write_text(RECIPE.replace('"coexpression"', f'"{tmp_path / "other" / "genes.npz"}"'))
    assert Recipe.from_toml(file).model.gene_embeddings == str(tmp_path / "other" / "genes.npz")
    file.write_text(RECIPE)
    assert Recipe.from_toml(file).model.gene_embeddings == "coexpression"
