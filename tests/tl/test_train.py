from __future__ import annotations

import ast
import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from lightning_fabric.plugins import Precision

import stofm as st
from stofm._files import read_table
from stofm.corpus import writing
from stofm.nn import Stofm
from stofm.train import (
    LossWeights,
    OptimizerConfig,
    SpatialMasking,
    StageConfig,
)
from stofm.train.checkpoint import read_progress
from stofm.train.loop import TrainingLoop
from stofm.train.run import RunRecorder

FAST = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, batch_size=2, accumulation=2)
#: Six sub-slices and two steps an epoch; sub-slices differ from epoch to epoch.
SPATIAL = StageConfig(
    name="spatial", epochs=3, subslice_cells=17, vary_subslices=True, optimizer=FAST
)
JOINT = replace(SPATIAL, name="joint", sampled_cells=3, refresh_every=3, epochs=2)
CELLS = StageConfig(name="cell_encoder", max_steps=3, optimizer=replace(FAST, batch_size=16))


@pytest.fixture
def slices(adata):
    return [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]


@pytest.fixture
def train(slices, model, tmp_path):
    """Train on the first slice, quietly, with the second held out."""

    def run(data=None, trained=None, **options):
        return st.tl.train(
            slices[0] if data is None else data,
            model if trained is None else trained,
            **{
                "stage": SPATIAL,
                "out_dir": tmp_path / "run",
                "validation": slices[1],
                "log_every": 1,
                "n_threads": 1,
                "device": "cpu",
                "show_progress_bar": False,
                **options,
            },
        )

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished"), {}


@pytest.fixture
def whole(train, finished):
    """Train without a stop; once for all tests that ask for the same."""
    folder, runs = finished

    def run(**options):
        asked = repr(options)
        if asked not in runs:
            runs[asked] = train(out_dir=folder / str(len(runs)), **options)
        return runs[asked]

    return run


def weights(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def assert_same_weights(first, second):
    assert weights(first).keys() == weights(second).keys()
    for name, value in weights(first).items():
        np.testing.assert_array_equal(value, weights(second)[name])


def without_times(history):
    return history.drop(columns="seconds")


def test_pretraining_is_the_papers_three_stages(train, slices, model, tmp_path):
    before = copy.deepcopy(model)
    result = train(stage="pretrain", optimizer=replace(FAST, batch_size=4))
    stages = [(stage["stage"], stage["steps"]) for stage in result.run["stages"]]
    # 101 cells in batches of 4, two to a step; 2 sub-slices.
    assert stages == [("cell_encoder", 13), ("spatial", 2), ("joint", 1)]
    assert result.run["status"] == "finished"
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == result.run

    assert_same_weights(model, before)
    assert model.config == before.config
    assert result.model.config.trained
    assert not result.model.training
    own, trained = weights(model), weights(result.model)
    changed = {name.split(".")[0] for name in own if (own[name] != trained[name]).any()}
    assert changed == {"cell_encoder", "se2_transformer"}

    stored = Stofm.from_pretrained(tmp_path / "run" / "model")
    assert stored.fingerprint == result.model.fingerprint
    assert Stofm.from_pretrained(result.best).fingerprint == result.model.fingerprint
    st.tl.embed(slices[1], result.model, device="cpu", show_progress_bar=False)
    assert np.isfinite(slices[1].obsm["X_stofm"]).all()


def test_the_report_says_what_was_done(train, slices):
    result = train(stage=[CELLS, SPATIAL])
    cells, spatial = result.run["stages"]
    assert cells["steps"] == 3
    assert 3 * 2 * 10 < cells["cells"] <= 3 * 2 * 16
    assert spatial["steps"] == 6
    assert spatial["cells"] == 3 * slices[0].n_obs
    n_weights = sum(w.numel() for w in result.model.parameters())
    assert result.run["n_weights"] == n_weights
    encoder = sum(w.numel() for w in result.model.cell_encoder.parameters())
    assert cells["n_weights"] > encoder
    assert spatial["n_weights"] < n_weights
    assert 0 <= spatial["share_waiting"] <= 1
    assert 10**7 < spatial["peak_memory_bytes"] < 10**11
    assert result.run["settings"]["slices"][0].startswith("data ")


def test_history_has_a_row_for_each_step_and_validation(train, tmp_path):
    history = train(stage=[CELLS, SPATIAL]).history
    rows = list(zip(history["stage"], history["split"], history["step"], strict=True))
    of_cells = [("cell_encoder", "train", k) for k in (1, 2, 3)]
    of_spatial = [
        ("spatial", split, step)
        for end in (2, 4, 6)
        for split, step in (("train", end - 1), ("train", end), ("validation", end))
    ]
    assert rows == [*of_cells, ("cell_encoder", "validation", 3), *of_spatial]
    spatial = history[history["stage"] == "spatial"]
    mean = 0.5 * (spatial["masked_cells"] + spatial["pair_distances"])
    np.testing.assert_allclose(spatial["loss"], mean)
    assert spatial["contrastive"].isna().all()
    pd.testing.assert_frame_equal(read_table(tmp_path / "run" / "history.csv"), history)


def test_frozen_and_kept_parts(train, model):
    only_cells = train(stage=CELLS).model
    own, trained = weights(model), weights(only_cells)
    assert all((own[n] == trained[n]).all() for n in own if n.startswith("se2_transformer"))
    only_spatial = train(stage=SPATIAL, overwrite=True).model
    trained = weights(only_spatial)
    assert all((own[n] == trained[n]).all() for n in own if n.startswith("cell_encoder"))


@pytest.fixture
def held_out_losses(monkeypatch):
    """Make the loss on the held-out slices fall and rise, whatever is trained."""

    def evaluate(self):
        loss = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0, 10: 5.0}[self.progress.step]
        return np.array([[loss, loss], [1.0, 1.0]])

    monkeypatch.setattr(TrainingLoop, "evaluate", evaluate)


def test_best_weights_are_kept_unless_the_last_are_asked_for(train, held_out_losses):
    stage = replace(SPATIAL, epochs=5)
    best = train(stage=stage)
    assert best.best.name == "0-spatial-00000004"
    assert best.last.name == "0-spatial-00000010"
    assert best.run["stages"][0]["best_loss"] == 1.0
    assert Stofm.from_pretrained(best.best).fingerprint == best.model.fingerprint
    last = train(stage=stage, keep="last", overwrite=True)
    assert Stofm.from_pretrained(last.last).fingerprint == last.model.fingerprint
    assert last.model.fingerprint != best.model.fingerprint


def test_a_stage_stops_when_the_held_out_loss_no_longer_falls(train, held_out_losses):
    stage = replace(SPATIAL, epochs=5)
    best = train(stage=stage)
    stopped = train(stage=stage, patience=2, overwrite=True)
    assert stopped.run["stages"][0]["steps"] == 8
    assert stopped.last.name == "0-spatial-00000008"
    assert stopped.model.fingerprint == best.model.fingerprint


def test_without_held_out_slices_the_last_weights_are_the_best(train):
    result = train(validation=None)
    assert set(result.history["split"]) == {"train"}
    assert result.best == result.last
    assert Stofm.from_pretrained(result.last).fingerprint == result.model.fingerprint


def test_every_form_of_data_gives_the_same_model(train, adata, slices, tmp_path):
    folder = tmp_path / "slices"
    folder.mkdir()
    slices[0].write_h5ad(folder / "left.h5ad")
    slices[1].write_zarr(folder / "right.zarr")
    forms = {
        "list": (slices, None),
        "library": (adata, "library"),
        "folder": (folder, None),
        "files": ([folder / "left.h5ad", str(folder / "right.zarr")], None),
    }
    options = {"stage": [CELLS, SPATIAL], "validation": None}
    found = {
        name: train(data, library_key=key, out_dir=tmp_path / name, **options)
        for name, (data, key) in forms.items()
    }
    assert len({result.model.fingerprint for result in found.values()}) == 1
    names = found["folder"].run["settings"]["slices"]
    assert [name.split()[0] for name in names] == ["left", "right"]
    names = found["library"].run["settings"]["slices"]
    assert [name.split()[0] for name in names] == ["data/left", "data/right"]


def test_files_are_read_again_only_if_they_changed(train, slices, tmp_path, monkeypatch):
    file = tmp_path / "one.h5ad"
    slices[0].write_h5ad(file)
    read = []
    original = writing.find_columns
    monkeypatch.setattr(
        writing, "find_columns", lambda *a, **k: read.append(1) or original(*a, **k)
    )
    options = {"validation": None, "work_dir": tmp_path / "work", "overwrite": True}
    first = train(file, **options)
    again = train(file, **options)
    assert len(read) == 1
    assert_same_weights(first.model, again.model)
    slices[1].write_h5ad(file)
    other = train(file, **options)
    assert len(read) == 2
    assert other.run["n_cells"] == slices[1].n_obs
    train(file, layer=None, gene_key=None, species="human", **options)
    assert len(read) == 3


class KilledError(Exception):
    pass


@pytest.fixture
def kill_at(monkeypatch):
    """Stop training after the k-th optimiser step of all stages, before anything is written."""

    def kill(step):
        left = [step]
        original = RunRecorder.advance

        def advance(self):
            original(self)
            left[0] -= 1
            if not left[0]:
                raise KilledError

        monkeypatch.setattr(RunRecorder, "advance", advance)

    yield kill
    monkeypatch.undo()


STAGES = [CELLS, SPATIAL, JOINT]


@pytest.mark.parametrize("step", [1, 3, 6, 10, 12, 13])
def test_a_run_goes_on_as_if_it_had_not_been_stopped(train, whole, kill_at, monkeypatch, step):
    options = {"stage": STAGES, "checkpoint_every": 2, "seed": 3}
    whole = whole(**options)
    kill_at(step)
    with pytest.raises(KilledError):
        train(**options)
    monkeypatch.undo()
    rest = train(resume=True, **options)
    assert_same_weights(rest.model, whole.model)
    pd.testing.assert_frame_equal(without_times(rest.history), without_times(whole.history))
    for one, other in zip(rest.run["stages"], whole.run["stages"], strict=True):
        assert [one[k] for k in ("steps", "cells", "tokens", "best_loss")] == [
            other[k] for k in ("steps", "cells", "tokens", "best_loss")
        ]
    names, expected = ({p.name for p in one.last.parent.iterdir()} for one in (rest, whole))
    assert names == expected


@pytest.mark.parametrize("step", [2, 4])
def test_the_scale_of_gradients_goes_on_where_it_was(train, kill_at, monkeypatch, tmp_path, step):
    # Without CUDA there is none: one that every optimiser step changes stands in for it.
    scale = [1.0]

    def load(self, state):
        scale[0] = state.get("scale", scale[0])

    def start():
        scale[0] = 1.0
        original = RunRecorder.advance

        def advance(self):
            scale[0] *= 3
            original(self)

        monkeypatch.setattr(RunRecorder, "advance", advance)
        monkeypatch.setattr(Precision, "state_dict", lambda self: {"scale": scale[0]})
        monkeypatch.setattr(Precision, "load_state_dict", load)

    # The first stage has three steps: stopped within it, and before the next one's checkpoint.
    options = {"stage": [CELLS, SPATIAL], "checkpoint_every": 1}
    start()
    whole = train(out_dir=tmp_path / "whole", **options)
    monkeypatch.undo()
    kill_at(step)
    start()
    with pytest.raises(KilledError):
        train(**options)
    monkeypatch.undo()
    start()
    rest = train(resume=True, **options)
    assert read_progress(rest.last).scaler == read_progress(whole.last).scaler == {"scale": 3.0**9}


def test_a_loss_that_is_not_finite_says_how_to_go_on(train, monkeypatch, tmp_path):
    evaluate = TrainingLoop.evaluate
    losses = iter([1.0, np.nan])
    monkeypatch.setattr(TrainingLoop, "evaluate", lambda self: np.full((2, 2), next(losses)))
    with pytest.raises(FloatingPointError, match="The last checkpoint is good") as caught:
        train(checkpoint_every=2)
    monkeypatch.setattr(TrainingLoop, "evaluate", evaluate)
    (newest,) = re.findall(r"train\(data, ('.*?'), out_dir=<a new folder>\)", str(caught.value))
    newest = ast.literal_eval(newest)
    assert Path(newest).name == "0-spatial-00000002"
    calmer = replace(SPATIAL, optimizer=replace(FAST, learning_rate=1e-5))
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001, now 1e-05"):
        train(stage=calmer, resume=True)
    result = train(trained=newest, stage=calmer, out_dir=tmp_path / "new")
    assert np.isfinite(result.history["loss"]).all()


_KILLED = """
import os, signal, sys
import anndata, torch
import stofm as st
from stofm.train import StageConfig, OptimizerConfig
from stofm.train.run import RunRecorder

folder, threads, kill = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
original = RunRecorder.advance

def advance(self):
    original(self)
    if self._loop.progress.step == kill:
        os.kill(os.getpid(), signal.SIGKILL)

RunRecorder.advance = advance
st.tl.train(
    anndata.read_h5ad(f"{folder}/left.h5ad"),
    f"{folder}/model",
    stage=StageConfig(
        name="cell_encoder",
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=2, batch_size=8, accumulation=2
        ),
    ),
    out_dir=f"{folder}/run",
    checkpoint_every=2,
    log_every=3,
    device="cpu",
    show_progress_bar=False,
)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_run_killed_in_the_middle_of_an_epoch_ends_like_the_uninterrupted_one(
    train, slices, model, tmp_path
):
    slices[0].write_h5ad(tmp_path / "left.h5ad")
    model.save_pretrained(tmp_path / "model")
    stage = StageConfig(name="cell_encoder", optimizer=replace(FAST, batch_size=8))
    options = {"stage": stage, "checkpoint_every": 2, "log_every": 3, "validation": None}
    whole = train(out_dir=tmp_path / "whole", **options)
    assert whole.run["stages"][0]["steps"] == 7
    command = [sys.executable, "-c", _KILLED, str(tmp_path), str(torch.get_num_threads()), "5"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"0-cell_encoder-00000002", "0-cell_encoder-00000004"}
    rest = train(resume=True, **options)
    assert_same_weights(rest.model, whole.model)
    pd.testing.assert_frame_equal(without_times(rest.history), without_times(whole.history))


def cut_history(run):
    lines = (run / "history.csv").read_text().splitlines(keepends=True)
    (run / "history.csv").write_text("".join(lines[:-1]))


def empty_report(run):
    (run / "run.json").write_text("")


def lose_both(run):
    (run / "run.json").unlink()
    (run / "history.csv").unlink()


def damage_newest(run):
    path = run / "checkpoints" / "0-spatial-00000004" / "training" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose_config_of_newest(run):
    (run / "checkpoints" / "0-spatial-00000004" / "config.json").write_text("{")


@pytest.mark.parametrize(
    "harm", [cut_history, empty_report, lose_both, damage_newest, lose_config_of_newest]
)
def test_a_run_whose_files_were_harmed_goes_on_like_the_whole_one(
    train, whole, kill_at, monkeypatch, tmp_path, harm
):
    options = {"checkpoint_every": 2}
    whole = whole(**options)
    kill_at(5)
    with pytest.raises(KilledError):
        train(**options)
    monkeypatch.undo()
    harm(tmp_path / "run")
    damaged = r"0-spatial-00000004/\S+ is damaged.* goes on from the checkpoint before"
    is_newest = harm in (damage_newest, lose_config_of_newest)
    told = pytest.warns(UserWarning, match=damaged) if is_newest else nullcontext()
    with told:
        rest = train(resume=True, **options)
    assert_same_weights(rest.model, whole.model)
    pd.testing.assert_frame_equal(without_times(rest.history), without_times(whole.history))
    assert rest.run["settings"] == whole.run["settings"]
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == rest.run
    assert not (tmp_path / "run" / "run.lock").exists()


def test_without_steps_asked_for_a_short_stage_has_the_checkpoints_of_its_end(train, tmp_path):
    result = train(validation=None)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"0-spatial-00000006", "0-spatial-final"}
    assert result.last.name == "0-spatial-00000006"


def test_a_run_that_is_going_on_is_not_begun_again(train, monkeypatch):
    train()
    seen = []

    def advance(self):
        with pytest.raises(FileExistsError, match="another process trains into it"):
            train(resume=True)
        seen.append(1)

    monkeypatch.setattr(RunRecorder, "advance", advance)
    train(overwrite=True, stage=CELLS)
    assert seen == [1] * 3


def test_options_without_effect_are_told(train):
    with pytest.warns(UserWarning, match="patience=2: has no effect without held-out slices"):
        train(validation=None, patience=2)


def global_state():
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002 it must stay
        "python": random.getstate(),
        "filters": list(warnings.filters),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "signals": [signal.getsignal(k) for k in (signal.SIGINT, signal.SIGTERM)],
        "hook": sys.excepthook,
    }


def test_training_leaves_every_global_state_as_it_was(train):
    torch.manual_seed(3)
    before = global_state()
    train(stage=[CELLS, SPATIAL, JOINT])
    assert global_state() == before


def test_a_damaged_vocabulary_in_the_work_folder_is_fitted_again(train, slices, model, tmp_path):
    slices[0].write_h5ad(tmp_path / "left.h5ad")
    options = {"validation": None, "stage": CELLS, "work_dir": tmp_path / "work"}
    first = train(tmp_path / "left.h5ad", model.config, **options)
    (table,) = (tmp_path / "work").glob("vocabulary-*/vocabulary.tsv")
    whole = table.read_text()
    table.write_text(whole.replace("1", "2", 1))
    with pytest.warns(UserWarning, match=r"vocabulary.tsv is damaged: .* It is made again"):
        again = train(tmp_path / "left.h5ad", model.config, overwrite=True, **options)
    assert table.read_text() == whole
    assert_same_weights(again.model, first.model)


def test_a_folder_with_a_run_is_refused(train, tmp_path):
    result = train()
    with pytest.raises(
        FileExistsError, match=r"holds a run \(finished\): pass resume=True to continue"
    ):
        train()
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        train(resume=True, overwrite=True)
    # A finished run has nothing left to do.
    again = train(resume=True)
    assert_same_weights(again.model, result.model)
    pd.testing.assert_frame_equal(again.history, result.history)
    assert (again.best, again.last, again.run) == (result.best, result.last, result.run)
    other = train(overwrite=True, seed=1)
    assert other.model.fingerprint != result.model.fingerprint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="holds something other than a run of stofm"):
        train(out_dir=tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("work_dir", ["run/prepared", "elsewhere"])
def test_what_a_stage_computes_anew_goes_with_its_end(train, tmp_path, work_dir):
    result = train(stage=[JOINT, JOINT], work_dir=tmp_path / work_dir)
    assert [stage["steps"] for stage in result.run["stages"]] == [4, 4]
    left = [path.name.split("-")[0] for path in (tmp_path / work_dir / "cells").iterdir()]
    # The first result of each stage, of the slice to train on and of the one held out.
    assert sorted(left) == ["cells"] * 4 + ["virtual"] * 4
    assert not (tmp_path / "run" / "refreshed").exists()
    again = train(stage=[JOINT, JOINT], work_dir=tmp_path / work_dir, overwrite=True)
    assert_same_weights(again.model, result.model)


def test_work_folder_that_the_run_would_clear_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="or one that the run clears; choose another"):
        train(work_dir=tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run").exists()


def test_going_on_under_other_settings_is_refused(train, slices, model):
    train()
    faster = replace(SPATIAL, optimizer=replace(FAST, learning_rate=0.01))
    with pytest.raises(
        ValueError, match=r"stages\[0\].optimizer.learning_rate was 0.001, now 0.01"
    ):
        train(stage=faster, resume=True)
    with pytest.raises(ValueError, match=r"run.seed was 0, now 5"):
        train(seed=5, resume=True)
    with pytest.raises(
        ValueError, match=r"held_out_slices\[0\] was 'data .* slices\[0\] was 'data "
    ):
        train(slices[1], validation=slices[0], resume=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.cell_encoder.projection.bias += 1
    with pytest.raises(ValueError, match=r"model.weights was "):
        train(trained=other, resume=True)
    # What does not change the weights may change.
    train(resume=True, n_threads=0, log_every=7, checkpoint_every=None)


def test_resume_begins_where_there_is_no_run(train):
    assert train(resume=True).run["status"] == "finished"


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(train, tmp_path):
    broken = replace(
        SPATIAL, optimizer=replace(FAST, learning_rate=1e30, max_norm=None, warmup_steps=0)
    )
    with pytest.raises(FloatingPointError, match="is not finite at step 2 of stage 'spatial'") as e:
        train(stage=broken, checkpoint_every=1, validation=None)
    assert "in a batch from 'data'" in str(e.value)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "0-spatial-00000001"
    assert Stofm.from_pretrained(checkpoint).config.trained


def test_a_new_model_gets_a_fitted_vocabulary(train, slices, model):
    config = replace(model.config, name="new")
    result = train(trained=config, data=slices, validation=None)
    fitted = result.model.vocabulary
    assert fitted.n_tokens == result.model.config.cell_encoder.n_tokens
    assert set(fitted.gene_ids) <= set(slices[0].var_names)
    n_cells = sum(np.asarray((one.X > 0).sum(axis=0)).ravel() for one in slices)
    assert fitted.n_genes == (n_cells >= 10).sum()
    given = train(trained=config, vocabulary=model.vocabulary, overwrite=True)
    assert given.model.vocabulary is not model.vocabulary
    assert given.model.vocabulary.fingerprint == model.vocabulary.fingerprint
    assert given.model.name == "new"


def test_first_gene_embeddings_from_coexpression(train, model, slices):
    with pytest.raises(ValueError, match=r"set cell_encoder\.pooled to true"):
        train(gene_embeddings="coexpression")
    pooling = replace(model.config.cell_encoder, values="log", pooled=True, d_gene=8)
    config = replace(model.config, cell_encoder=pooling)
    options = {"vocabulary": model.vocabulary, "stage": replace(CELLS, max_steps=1)}
    found = [
        train(trained=config, gene_embeddings=kind, overwrite=True, **options).model
        for kind in ("random", "coexpression")
    ]
    words = [m.cell_encoder.bert.embeddings.word_embeddings.weight for m in found]
    assert not torch.allclose(*words, atol=1e-2)
    with pytest.raises(ValueError, match=r"must be 'random', 'coexpression' or a table .*'pca'"):
        train(gene_embeddings="pca", overwrite=True)


def test_first_gene_embeddings_from_a_table(train, model, rng, tmp_path):
    tables = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for table in tables:
        values = rng.standard_normal((67, 30))
        pd.DataFrame(values, index=model.vocabulary.gene_ids).add_prefix("d").to_parquet(table)
    options = {"stage": replace(CELLS, max_steps=2), "validation": None, "checkpoint_every": 1}
    first = train(gene_embeddings=tables[0], **options)
    words = first.model.cell_encoder.gene_embeddings.weight.detach().numpy()
    # Two steps have changed little of the start.
    start = pd.read_parquet(tables[0]).to_numpy(dtype=np.float32)
    start = start - start.mean(axis=0)
    scores = np.linalg.svd(start, full_matrices=False)
    scores = scores[0][:, :16] * scores[1][:16]
    close = np.corrcoef(np.abs(words[model.vocabulary.tokens]).ravel(), np.abs(scores).ravel())
    assert close[0, 1] > 0.9
    assert first.run["settings"]["gene_table"].startswith("a.parquet ")
    assert len(first.run["settings"]["gene_table"]) == len("a.parquet ") + 16

    with pytest.raises(ValueError, match=r"gene_table was 'a\.parquet .*', now 'b\.parquet"):
        train(gene_embeddings=tables[1], resume=True, **options)
    again = train(gene_embeddings=tables[0], resume=True, **options)
    assert_same_weights(again.model, first.model)
    with pytest.raises(FileNotFoundError, match="no table of genes"):
        train(gene_embeddings=tmp_path / "c.parquet", overwrite=True, **options)


def test_a_table_that_does_not_fit_is_refused_before_slices_are_prepared(train, tmp_path):
    path = tmp_path / "x.csv"
    pd.DataFrame({"a": [1.0, 2.0]}, index=["GENE1", "GENE2"]).to_csv(path)
    with pytest.raises(ValueError, match=r"x\.csv has 1 numbers for each gene"):
        train(gene_embeddings=path)
    assert not (tmp_path / "run" / "work" / "slices").exists()


def test_stages_with_and_without_a_learned_mask_have_heads_of_their_own(train):
    masking = SpatialMasking.reference()
    reference = replace(SPATIAL, spatial_masking=masking, cell_loss="cosine", virtual_cells=False)
    result = train(stage=[reference, JOINT])
    assert np.isfinite(result.history["loss"]).all()
    of_reference = result.history[result.history["stage"] == "spatial"]["masked_cells"]
    assert of_reference.between(0, 2).all()


def test_losses_at_cells_that_are_not_hidden(train, model):
    weights = LossWeights(visible_cells=0.5, surroundings=5.0)
    stages = [replace(stage, weights=weights, surrounding_cells=3) for stage in (SPATIAL, JOINT)]
    result = train(stage=stages)
    for name in ("visible_cells", "surroundings"):
        losses = result.history[result.history["split"] == "train"].groupby("stage")[name]
        assert (losses.count() > 0).all()
        # The joint stage goes on with the heads of the spatial stage.
        assert losses.first()["joint"] < losses.first()["spatial"]
    assert np.isfinite(result.history["loss"]).all()


@pytest.mark.parametrize("stage", [CELLS, SPATIAL, JOINT], ids=lambda stage: stage.name)
def test_bf16_mixed(train, stage):
    result = train(stage=stage, precision="bf16-mixed")
    assert {w.dtype for w in result.model.state_dict().values()} == {torch.float32}
    exact = train(stage=stage, overwrite=True)
    np.testing.assert_allclose(result.history["loss"], exact.history["loss"], rtol=0.02)
    assert result.model.fingerprint != exact.model.fingerprint


def test_tensorboard(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "0-spatial")).Reload()
    written = [(e.step, e.value) for e in events.Scalars("train/masked_cells")]
    rows = result.history[result.history["split"] == "train"]
    assert [step for step, _ in written] == rows["step"].tolist()
    np.testing.assert_allclose([value for _, value in written], rows["masked_cells"], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stage": "spatail"}, ValueError, r"stage must be one of \['pretrain', 'cell_encoder'"),
        ({"stage": []}, TypeError, "stage must be a name or one or more StageConfig"),
        ({"epochs": 2}, ValueError, "epochs and optimizer are entries of StageConfig"),
        ({"data": 3}, TypeError, "data must be an AnnData, a path, .* found int"),
        ({"data": []}, ValueError, "There is no data: the list is empty"),
        ({"data": "nowhere"}, FileNotFoundError, "no slice or folder of slices at .*nowhere"),
        ({"trained": 7}, TypeError, "model must be a Stofm, a StofmConfig, .* found int"),
        ({"precision": "8"}, ValueError, "precision must be one of .*found '8'"),
        ({"library_key": "slide"}, KeyError, r"Slice 'data': There is no obs\['slide'\]"),
        ({"spatial_key": "xy"}, KeyError, r"Slice 'data': There is no obsm\['xy'\]"),
        ({"patience": 0}, ValueError, "patience must be at least 1, found 0"),
    ],
)
def test_messages(train, options, error, message):
    with pytest.raises(error, match=message):
        train(**options)


def test_a_vocabulary_is_for_a_new_model(train, vocabulary):
    with pytest.raises(ValueError, match="A model has its vocabulary already"):
        train(vocabulary=vocabulary)


def test_counts_that_are_not_raw_name_the_slice(train, slices, tmp_path):
    slices[1].X = slices[1].X * 0.37
    slices[1].write_h5ad(tmp_path / "logged.h5ad")
    with pytest.raises(ValueError, match=r"File 'logged': adata\.X does not hold raw counts"):
        train([slices[0], tmp_path / "logged.h5ad"])
    # Nothing was begun: the same call with the right file goes ahead.
    assert train([slices[0]], validation=None).run["n_slices"] == 1


def test_a_slice_that_is_trained_on_is_not_held_out(train, slices):
    with pytest.raises(ValueError, match=r"Slice 'data' is held out and also trained on \(as 'da"):
        train(slices, validation=slices[0])


def test_an_empty_folder_is_refused(train, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"File 'empty': .* is empty"):
        train(tmp_path / "empty")


def test_slices_without_cells_are_left_out_by_library(train, adata):
    adata.obs["library"] = adata.obs["library"].cat.add_categories("empty")
    assert isinstance(adata, ad.AnnData)
    result = train(adata, library_key="library", validation=None)
    assert result.run["n_slices"] == 2
