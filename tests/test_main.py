from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from stofm.__main__ import main
from stofm._edge.slice_files import write_data

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def files(adata, model, tmp_path):
    adata.write_h5ad(tmp_path / "in.h5ad")
    model.save_pretrained(tmp_path / "model")
    return tmp_path


def embed(files, *more, out="out.h5ad"):
    words = ["embed", files / "in.h5ad", files / out, "--model", files / "model", *more]
    return main([str(word) for word in words])


@pytest.mark.parametrize("out", ["out.h5ad", "deeper/out.zarr"])
def test_embed_writes_the_result(files, adata, model, out):
    import stofm as st

    assert embed(files, "--library-key", "library", "--quiet", out=out) == 0
    read = ad.read_zarr if out.endswith("zarr") else ad.read_h5ad
    result = read(files / out)
    st.tl.embed(adata, model, library_key="library", show_progress_bar=False)
    np.testing.assert_array_equal(result.obsm["X_stofm"], adata.obsm["X_stofm"])
    assert [path.name for path in (files / out).parent.iterdir() if path.name.startswith(".")] == []


def test_user_errors_are_one_message_without_traceback(files, capsys):
    assert embed(files) == 1
    text = capsys.readouterr().err
    assert f"stofm: error: {files / 'in.h5ad'}: obs['library'] names 2 samples" in text
    assert "Pass --library-key library." in text
    assert "Traceback" not in text
    assert not (files / "out.h5ad").exists()


def test_traceback_when_asked_for(files):
    with pytest.raises(ValueError, match="names 2 samples"):
        embed(files, "--traceback")


def test_an_existing_output_is_kept(files, capsys):
    before = (files / "in.h5ad").read_bytes()
    words = ("--library-key", "library", "--quiet")
    assert embed(files, *words, out="in.h5ad") == 1
    assert "in.h5ad exists; pass --overwrite to replace it" in capsys.readouterr().err
    assert (files / "in.h5ad").read_bytes() == before
    assert embed(files, *words, "--overwrite", out="in.h5ad") == 0
    assert "X_stofm" in ad.read_h5ad(files / "in.h5ad").obsm


RECIPE = """
[run]
log_every = 1
[data]
train = ["slices/l*.h5ad"]
validation = ["slices/right.zarr"]
[model]
checkpoint = "MODEL"
name = "trained-further"
provenance = "Trained on two made-up slices."
[[stage]]
name = "spatial"
epochs = 2
subslice_cells = 23
[stage.optimizer]
batch_size = 2
warmup_steps = 1
"""


@pytest.fixture
def recipe(files, adata):
    (files / "slices").mkdir()
    for name, write in (("left", "write_h5ad"), ("right", "write_zarr")):
        own = adata[adata.obs["library"] == name].copy()
        getattr(own, write)(files / "slices" / f"{name}.{'h5ad' if name == 'left' else 'zarr'}")
    path = files / "recipe.toml"
    path.write_text(RECIPE.replace("MODEL", str(files / "model")))
    return path


def train(recipe, *more):
    folder = recipe.parent
    words = ["train", recipe, "--data", folder, "--out", folder / "run", "--device", "cpu", *more]
    return main([str(word) for word in words])


def test_train_follows_the_recipe(recipe, model, caplog):
    import stofm as st

    caplog.set_level("INFO", logger="stofm")
    assert train(recipe) == 0
    assert "trained-further is trained" in caplog.text
    trained = st.Stofm.from_pretrained(recipe.parent / "run" / "model")
    assert trained.name == "trained-further"
    assert trained.config.provenance == "Trained on two made-up slices."
    assert trained.fingerprint != model.fingerprint
    report = json.loads((recipe.parent / "run" / "run.json").read_text())
    names = [report["settings"][key][0].split()[0] for key in ("slices", "held_out_slices")]
    assert names == ["left", "right"]
    history = (recipe.parent / "run" / "history.csv").read_text()
    assert history.count("validation") == 2


def test_a_run_is_resumed_or_overwritten_only_if_asked(recipe, capsys):
    assert train(recipe, "--quiet") == 0
    assert train(recipe, "--quiet") == 1
    assert "holds a run (finished): pass --resume to continue" in capsys.readouterr().err
    assert train(recipe, "--quiet", "--resume") == 0
    recipe.write_text(recipe.read_text().replace("epochs = 2", "epochs = 1"))
    assert train(recipe, "--quiet", "--resume") == 1
    assert "stages[0].epochs was 2, now 1" in capsys.readouterr().err
    assert train(recipe, "--quiet", "--overwrite") == 0


def test_a_recipe_makes_a_new_model(recipe):
    import stofm as st

    text = recipe.read_text()
    start, end = text.index("[model]"), text.index("[[stage]]")
    model = """
[model]
preset = "mini"
vocabulary = "fit"
max_tokens = 30
[model.cell_encoder]
d_hidden = 16
d_gene = 8
d_cell = 12
n_layers = 1
d_inner = 8
[model.se2_transformer]
d_cell = 12
n_passed = 8
d_model = 12
n_heads = 4
n_layers = 1
[model.subslice]
n_cells = 60
"""
    recipe.write_text(text[:start] + model + text[end:])
    assert train(recipe, "--quiet") == 0
    config = st.Stofm.from_pretrained(recipe.parent / "run" / "model").config
    assert (config.name, config.max_tokens, config.subslice.n_cells) == ("stofm-mini", 30, 60)
    assert (config.cell_encoder.d_hidden, config.cell_encoder.n_heads) == (16, 4)
    # The vocabulary has the genes of the training slices, and three special tokens.
    assert 60 < config.cell_encoder.n_tokens < 75


def test_an_unknown_entry_of_a_recipe_is_named(recipe, capsys):
    recipe.write_text(recipe.read_text().replace("log_every", "log_evry"))
    assert train(recipe) == 1
    assert "Unknown entry 'log_evry' in [run] of recipe.toml; did you mean 'log_every'?" in (
        capsys.readouterr().err
    )
    recipe.write_text(RECIPE.replace('checkpoint = "MODEL"', "[model.subslice]\nn_cell = 3"))
    assert train(recipe) == 1
    assert (
        "'n_cell' in [model.subslice] of the recipe; did you mean 'n_cells'?"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "no.toml", "--data", ".", "--out", "run"], "There is no recipe no.toml"),
        (["embed", "nowhere.h5ad", "out.h5ad"], "There is no file nowhere.h5ad"),
        (["embed", "tiny.h5ad", "out.csv"], "must end in .h5ad or .zarr, found 'out.csv'"),
        (["convert", "nowhere", "out"], "nowhere/config.json is missing"),
    ],
)
def test_messages(words, message, tmp_path, monkeypatch, capsys, vocabulary):
    monkeypatch.chdir(tmp_path)
    ad.AnnData(np.ones((3, 2))).write_h5ad("tiny.h5ad")
    if words[0] == "convert":
        vocabulary.save("genes.tsv")
        words = [*words, "--vocabulary", "genes.tsv"]
    assert main(words) == 1
    assert message in capsys.readouterr().err


def test_an_interrupt_is_130(files, monkeypatch, capsys):
    from stofm import tl

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tl, "embed", interrupt)
    assert embed(files) == 130
    assert "stofm: interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("error", [IndexError("list index out of range"), RuntimeError("odd")])
def test_a_fault_of_the_software_is_said_to_be_one(error, files, monkeypatch, capsys):
    from stofm import tl

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tl, "embed", fail)
    assert embed(files) == 1
    text = capsys.readouterr().err
    assert f"in.h5ad: unexpected {type(error).__name__}: {error} (--traceback shows" in text


@pytest.mark.parametrize(
    ("words", "out", "message"),
    [
        ((), "taken/out.h5ad", "taken is a file, so nothing can be written into"),
        ((), "text.h5ad", "text.h5ad exists; pass --overwrite to replace it."),
        (("--overwrite",), "text.h5ad", "holds something other than an AnnData in an .h5ad file"),
        (("--overwrite",), "model", "must end in .h5ad or .zarr"),
        (("--model", "none"), "out.h5ad", "There is no checkpoint 'none'"),
    ],
)
def test_what_can_be_known_is_said_before_the_work(words, out, message, files, monkeypatch, capsys):
    from stofm._edge import slice_files

    monkeypatch.setattr(slice_files, "read_data", lambda _: pytest.fail("it was read"))
    for name in ("taken", "text.h5ad"):
        (files / name).write_text("mine")
    assert embed(files, *words, out=out) == 1
    assert message in capsys.readouterr().err
    assert (files / "text.h5ad").read_text() == "mine"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*SpatialData:UserWarning")
def test_a_spatialdata_store_is_embedded(files, adata, monkeypatch, capsys):
    spatialdata = pytest.importorskip("spatialdata")
    adata.obs["region"] = pd.Categorical(["a"] * adata.n_obs)
    adata.obs["cell"] = np.arange(adata.n_obs)
    keys = {"region": "a", "region_key": "region", "instance_key": "cell"}
    table = spatialdata.models.TableModel.parse(adata, **keys)
    tables = {"cells": table, "bins": table.copy()}
    write_data(spatialdata.SpatialData(tables=tables), files / "s.zarr")
    monkeypatch.chdir(files)
    words = ["embed", "s.zarr", "out.h5ad", "--model", "model", "--library-key", "library"]
    assert main([*words, "--quiet"]) == 1
    assert "tables ['bins', 'cells']; pass one of them as --table-key" in capsys.readouterr().err
    assert main([*words, "--quiet", "--table-key", "cells", "--key-added", "X_mine"]) == 0
    assert "X_mine" in ad.read_h5ad(files / "out.h5ad").obsm
    words[2] = "out.zarr"
    assert main([*words, "--quiet", "--table-key", "cells"]) == 0
    tables = spatialdata.read_zarr(files / "out.zarr").tables
    assert "X_stofm" in tables["cells"].obsm
    assert "X_stofm" not in tables["bins"].obsm


def test_messages_have_flags_for_arguments(files, capsys):
    assert embed(files, "--spatial-key", "place") == 1
    assert "(pass --spatial-key spatial)" in capsys.readouterr().err
    assert embed(files, "--library-key", "library", "--key-added", "X_stofm_cell") == 1
    assert "--key-added X_stofm_cell would replace" in capsys.readouterr().err


def test_wrong_usage_is_2(capsys):
    with pytest.raises(SystemExit) as error:
        main(["embed"])
    assert error.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_warnings_go_to_stderr_in_one_line(files, model, vocabulary, capsys):
    from dataclasses import replace

    from stofm.nn import Stofm

    untrained = Stofm(replace(model.config, trained=False), vocabulary)
    untrained.save_pretrained(files / "model", overwrite=True)
    assert embed(files, "--library-key", "library", "--quiet") == 0
    text = capsys.readouterr().err
    assert text.startswith("stofm: warning: The weights of 'tiny' are random")
    assert text.count("\n") == 1


def test_convert_writes_a_checkpoint(tmp_path, vocabulary):
    import shutil
    from dataclasses import replace

    from stofm.nn import Stofm

    published = tmp_path / "published"
    shutil.copytree(GOLDEN / "b_cell_encoder", published / "cell_encoder")
    shutil.copy(GOLDEN / "i_end_to_end.config.json", published / "config.json")
    shutil.copy(GOLDEN / "i_end_to_end.safetensors", published / "se2transformer.safetensors")
    replace(vocabulary, special={"pad": 0, "mask": 1, "cls": 409}).save(tmp_path / "genes.tsv")
    words = ["convert", published, tmp_path / "out", "--vocabulary", tmp_path / "genes.tsv"]
    assert main([*map(str, words), "--name", "mine"]) == 0
    assert Stofm.from_pretrained(tmp_path / "out").name == "mine"


def test_the_module_runs_as_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "stofm", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("stofm ")


def test_quiet_means_quiet(files):
    words = ["embed", "in.h5ad", "out.h5ad", "--model", "model", "--library-key", "library"]
    result = subprocess.run(
        [sys.executable, "-m", "stofm", *words, "--quiet"],
        capture_output=True,
        text=True,
        check=True,
        cwd=files,
    )
    assert result.stderr == ""
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, or left out, found 0"),
        (["--table-key", "t"], "--table-key names a table of a SpatialData, and"),
        (["--revision", "x"], "--revision is for models on the hub; "),
        (["--seed", "99999999999999999999"], "seed must be a whole number from 0 to"),
        (["--key-added", "a/b"], "can't be written to a file"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_any_work(files, capsys, words, message):
    assert embed(files, "--library-key", "library", "--quiet", *words) == 1
    assert message in capsys.readouterr().err
    assert not (files / "out.h5ad").exists()


def test_figures_are_not_replaced_unasked(tmp_path, capsys):
    (tmp_path / "umap.png").write_text("mine")
    assert main(["demo", "--out", str(tmp_path), "--quiet"]) == 1
    assert "has ['umap.png'] already; pass --overwrite to replace them" in capsys.readouterr().err
    assert (tmp_path / "umap.png").read_text() == "mine"


def test_check_prints_a_page_and_changes_nothing(files, capsys):
    before = (files / "in.h5ad").read_bytes()
    words = ["check", str(files / "in.h5ad"), "--model", str(files / "model"), "--device", "cpu"]
    assert main([*words, "--library-key", "library"]) == 0
    shown = capsys.readouterr().out
    assert "67 are known" in shown
    assert "left (101), right (83)" in shown
    assert main(words) == 1
    assert "To change first" in (shown := capsys.readouterr().out)
    assert "Pass --library-key library." in " ".join(shown.split())
    assert (files / "in.h5ad").read_bytes() == before


def test_check_and_embed_read_what_an_instrument_wrote(tmp_path, capsys):
    genes = ["Slc17a7", "Gad1", "Gad2", "Mbp", "Plp1"]
    cells = pd.DataFrame({"cell": range(9), "x": np.arange(9.0), "y": np.arange(9.0) ** 2})
    cells.to_csv(tmp_path / "places.csv", index=False)
    counts = pd.DataFrame(np.ones((9, 5), dtype=int), columns=genes)
    counts.to_csv(tmp_path / "a_counts.csv", index_label="cell")
    assert main(["check", str(tmp_path), "--device", "cpu", "--quiet"]) == 0
    assert "9 x 5" in (shown := capsys.readouterr().out)
    assert "species        mouse" in shown
    # An .h5ad beside the tables does not make the run a folder of slices.
    (tmp_path / "a.h5ad").write_bytes(b"")
    out = tmp_path / "out.h5ad"
    assert main(["embed", str(tmp_path), str(out), "--device", "cpu", "--quiet"]) == 0
    assert ad.read_h5ad(out).obsm["X_stofm"].shape[0] == 9


@pytest.mark.slow
@pytest.mark.parametrize("word", [None, "--simulate"])
def test_demo(tmp_path, word, caplog):
    caplog.set_level("INFO", "stofm")
    assert main(["demo", "--out", str(tmp_path), *([word] if word else [])]) == 0
    made = {file.name for file in tmp_path.iterdir()}
    figures = ("umap", "spatial", "subslices", "virtual_cells", "annotation")
    assert made == {"embedded.h5ad", *(f"{name}.png" for name in figures)}
    result = ad.read_h5ad(tmp_path / "embedded.h5ad")
    assert result.n_obs == (4000 if word else 4839)
    assert {"stofm_domain", "region"} <= set(result.obs)
    assert "Domains against obs['region']: adjusted Rand index 0." in caplog.text
    assert "learnt on the left" in caplog.text


@pytest.mark.parametrize("place", ["layer", "raw"])
def test_counts_that_are_not_in_x_are_found(files, adata, model, place, caplog):
    import stofm as st

    changed = adata.copy()
    if place == "layer":
        changed.layers["counts"] = changed.X.copy()
    else:
        changed.raw = changed.copy()
    changed.X = changed.X * 0.5
    changed.write_h5ad(files / "in.h5ad")
    assert embed(files, "--library-key", "library", "--quiet") == 0
    st.tl.embed(adata, model, library_key="library", show_progress_bar=False)
    result = ad.read_h5ad(files / "out.h5ad")
    np.testing.assert_array_equal(result.obsm["X_stofm"], adata.obsm["X_stofm"])
    if place == "layer":
        np.testing.assert_array_equal(result.X.toarray(), changed.X.toarray())


def test_the_background_of_open_st_is_no_cell(files, adata):
    adata.obs["cell_ID_mask"] = np.arange(adata.n_obs)
    adata.write_h5ad(files / "in.h5ad")
    assert embed(files, "--library-key", "library", "--quiet") == 0
    assert ad.read_h5ad(files / "out.h5ad").obs_names.tolist() == adata.obs_names[1:].tolist()


def test_several_files_go_to_a_folder(files, adata, capsys):
    adata.write_zarr(files / "other.zarr")
    more = [files / "other.zarr", files / "folder", "--model", files / "model"]
    words = ["embed", files / "in.h5ad", *more, "--library-key", "library", "--quiet"]
    assert main([str(word) for word in words]) == 0
    stores = sorted(path.name for path in (files / "folder").glob("*.zarr"))
    assert stores == ["in.zarr", "other.zarr"]
    assert main([str(word) for word in [*words, "--overwrite"]]) == 1
    assert "for a single file; leave it out for several slices" in capsys.readouterr().err


def test_check_has_no_options_that_do_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    assert not {"--overwrite", "--seed"} & {*capsys.readouterr().out.split()}
