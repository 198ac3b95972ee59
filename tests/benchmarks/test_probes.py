from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import stofm as st
from stofm.heads.request import resolve_slices
from stofm.tl._probe_scores import plan_folds

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
probes = importlib.import_module("probes")
probe_tasks = importlib.import_module("probe_tasks")

TASKS = (
    probe_tasks.Task(name="kinds", fit=("a", "b"), test="c", label="kind", no_class=("2",)),
    probe_tasks.Task(name="right part", test="c", label="kind", fitted_share=0.6),
    probe_tasks.Task(name="each slice", test="c", label="kind"),
    probe_tasks.Task(name="one slice", test="c", label="kind", left_out=("left",)),
)


@pytest.fixture
def slices(adata):
    """Files a and b with a slice each, file c with both."""
    adata.obs["slice_id"] = adata.obs["library"]
    left, right = (adata[adata.obs["library"] == name].copy() for name in ("left", "right"))
    both = adata.copy()
    both.obs["kind"] = both.obs["kind"].cat.set_categories(["0", "1", "2"])
    both.obs.loc[both.obs_names[:5], "kind"] = np.nan
    return {"a": left, "b": right, "c": both}


@pytest.fixture
def folder(slices, tmp_path):
    for name, one in slices.items():
        one.write_h5ad(tmp_path / f"{name}.h5ad")
    return tmp_path


@pytest.fixture
def tasks(folder):
    return probes.load_tasks(folder, TASKS)


def test_tasks_share_slices_and_know_their_classes(tasks):
    kinds, parts, *others = tasks
    assert list(kinds.slices) == ["a", "b", "c"]
    assert all(kinds.slices["c"] is one.data for one in others)
    labels = kinds.labels
    assert [len(one) for one in labels] == [101, 83, 184]
    assert set(labels[0]) == {"", "0", "1"}
    assert_array_equal(labels[2][:5], "")
    assert [len(rows) for rows in probe_tasks.rows_by_slice(kinds.slices["c"])] == [101, 83]
    assert [one.left_out for one in tasks] == [("c",), ("right",), None, ("left",)]
    # 60 % of the cells with a class lie to the left of the others.
    left, right = parts.slices.values()
    assert left.obsm["spatial"][:, 0].max() < right.obsm["spatial"][:, 0].min()
    assert left.obs["kind"].notna().sum() == round(0.6 * 179)
    assert left.n_obs + right.n_obs == 184


def test_what_is_missing_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"lacks nothing\.h5ad, which probes need"):
        probes.load_tasks(folder, [replace(TASKS[0], test="nothing")])
    with pytest.raises(ValueError, match=r"a\.h5ad has no obs\['layer'\], which 'kinds' needs"):
        probes.load_tasks(folder, [replace(TASKS[0], label="layer")])


def test_what_is_left_out(tasks):
    """Numbers of cells to fit and to test, and their names in tables."""
    for one in {id(adata): adata for t in tasks for adata in t.slices.values()}.values():
        one.obsm["X_some"] = one.obsm["spatial"]
    found = {}
    for loaded in tasks:
        scores = loaded.probe({"some": "X_some"}, seeds=1)
        assert scores["representation"].iloc[0] == "some"
        found[loaded.task.name] = scores.drop_duplicates("slice").set_index("slice")
        seeds = loaded.head_scores({"some": "X_some"}, seeds=(0,))
        own = scores.loc[scores["representation"] == "some", "macro_f1"]
        assert seeds == {"some": [pytest.approx(own.mean())]}
    assert {name: table.index.tolist() for name, table in found.items()} == {
        "kinds": ["c"],
        "right part": ["right"],
        "each slice": ["left", "right"],
        "one slice": ["left"],
    }
    each = found["each slice"]
    assert each["n_fitted"].tolist() == each["n_tested"].tolist()[::-1]
    assert found["one slice"]["n_tested"].tolist() == each["n_tested"].tolist()[:1]
    assert found["right part"]["n_fitted"].tolist() == [round(0.6 * 179)]


def test_embeddings_are_those_of_tl_embed(tasks, slices, model):
    found = probes.embed_with(model, tasks, device="cpu")
    assert found == {
        "cell": "X_cell",
        "spatial": "X_spatial",
        "cell + spatial": ("X_cell", "X_spatial"),
    }
    own = tasks[0].slices["c"].obsm
    expected = slices["c"].copy()
    st.tl.embed(expected, model, library_key="slice_id", device="cpu", show_progress_bar=False)
    assert_allclose(own["X_spatial"], expected.obsm["X_stofm"], atol=1e-5)
    assert_array_equal(own["X_cell"], expected.obsm["X_stofm_cell"])
    assert "X_spatial" in tasks[1].slices["left"].obsm
    # Another model's are kept beside it.
    other = probes.untrained(model, seed=3)
    again = probes.embed_with(other, tasks[:1], prefix="other ", device="cpu")
    assert again["other cell + spatial"] == ("X_other cell", "X_other spatial")
    assert np.abs(own["X_other spatial"] - own["X_spatial"]).max() > 0.1


def test_embedding_without_virtual_cells(tasks, model):
    own = tasks[0].slices["c"]
    probes.embed_with(model, tasks[:1], device="cpu")
    probes.embed_with(model, tasks[:1], prefix="no ", virtual_cells=False, device="cpu")
    assert_array_equal(own.obsm["X_no cell"], own.obsm["X_cell"])
    assert np.abs(own.obsm["X_no spatial"] - own.obsm["X_spatial"]).max() > 1e-3
    # Nothing but the sub-slice is seen, and nothing crosses slices: another slice changes nothing.
    left = (own.obs["library"] == "left").to_numpy()
    alone = replace(tasks[0], slices={"c": own[left].copy()})
    probes.embed_with(model, [alone], virtual_cells=False, device="cpu")
    assert_allclose(alone.slices["c"].obsm["X_spatial"], own.obsm["X_no spatial"][left], atol=1e-5)


def test_a_sub_slice_of_one_cell_is_embedded_too(tasks, model):
    model.config = replace(model.config, subslice=replace(model.config.subslice, n_cells=1))
    task = replace(tasks[0], slices={"a": tasks[0].slices["a"]})
    probes.embed_with(model, [task], virtual_cells=False, device="cpu")
    found = task.slices["a"].obsm["X_spatial"].copy()
    assert np.isfinite(found).all()
    # Alone, a cell's embedding says what its genes say, whatever its place.
    task.slices["a"].obsm["spatial"] = task.slices["a"].obsm["spatial"][::-1].copy()
    probes.embed_with(model, [task], virtual_cells=False, device="cpu")
    assert_allclose(task.slices["a"].obsm["X_spatial"], found, atol=1e-5)


def test_run_writes_tables_and_numbers(tasks, model, tmp_path, capsys):
    out = tmp_path / "results" / "mini-0.1"
    report = probes.run({"": model}, tasks[:1], out, seeds=1, device="cpu")
    written = json.loads((tmp_path / "results" / "mini-0.1.json").read_text())
    assert written == report
    assert report["models"] == [{"prefix": "", "name": "tiny", "fingerprint": model.fingerprint}]
    rows = {row["representation"]: row for row in report["results"]}
    names = ["cell", "spatial", "cell + spatial"]
    baselines = ["PCs", "PCs + neighbours", "log counts"]
    assert list(rows) == [*names, *(f"untrained {name}" for name in names), *baselines]
    assert len(rows["PCs"]["macro_f1"]) == 1
    assert set(rows["PCs"]) == {"representation", "task", *probes.MEASURES}
    assert set(rows["PCs"]) - set(rows["log counts"]) == {"ari", "nmi"}
    # Three kinds of cells, of which two are classes, differ in their counts.
    assert min(rows["PCs"]["macro_f1"]) > 0.8
    assert (tmp_path / "results" / "mini-0.1.md").read_text() == probes.to_markdown(report)
    assert "embedding with untrained tiny" in capsys.readouterr().err


def test_numbers_are_means_over_what_is_left_out():
    rows = [
        {"slice": s, "representation": "r", "seed": k, "ari": np.nan}
        | dict.fromkeys(("macro_f1", "accuracy", "calibration_error", "nmi"), s + 10 * k)
        for s in (0, 1)
        for k in (0, 1)
    ]
    (found,) = probes.by_seed(pd.DataFrame(rows), "T")
    assert found["macro_f1"] == [0.5, 10.5]
    assert (found["task"], found["representation"]) == ("T", "r")
    assert "ari" not in found


def row(name, task, *scores):
    return {"representation": name, "task": task, "macro_f1": list(scores)}


def test_tables_say_who_wins():
    results = [
        row("cell", "A", 0.5, 0.7),
        row("cell + spatial", "A", 0.9, 0.9),
        row("untrained cell", "A", 0.95, 0.95),
        row("PCs", "A", 0.6, 0.6),
        row("PCs + neighbours", "A", 0.8, 0.8),
        row("cell", "B", 0.3, 0.3),
        row("cell + spatial", "B", 0.4, 0.4),
        row("PCs", "B", 0.41, 0.41),
        {"representation": "cell", "task": "C", "ari": [0.2]},
    ]
    table = probes.to_table(results, "macro_f1").splitlines()
    assert table[0] == "| representation | A | B |"
    assert table[2] == "| cell | 0.600 ± 0.141 | 0.300 ± 0.000 |"
    assert table[4] == "| untrained cell | 0.950 ± 0.000 |  |"
    assert "| better of the PCs | 0.800 | 0.410 |" in table
    assert "| winner | untrained cell | PCs |" in table
    assert [line for line in table if " is above " in line] == [
        "cell + spatial is above the better of the PCs in 1 of 2 tasks.",
        "cell + spatial is above the best of the untrained model in 0 of 1 tasks.",
        "cell + spatial is above the cell embedding alone in 2 of 2 tasks.",
    ]
    models = [{"prefix": "", "name": "m", "fingerprint": "f"}]
    text = probes.to_markdown({"models": models, "seeds": 2, "results": results})
    assert text.startswith("Model `m` (f), mean and spread of 2 seeds.")
    assert "macro-F1" in text
    assert "| cell | 0.200 |" in text
    assert "NMI" not in text


def test_several_models_stand_beside_each_other():
    results = [
        row(f"{model} {name}", "A", score)
        for model, score in (("x", 0.9), ("y", 0.5))
        for name in ("cell", "cell + spatial")
    ]
    results += [row("untrained cell", "A", 0.6), row("PCs", "A", 0.7)]
    models = [{"prefix": f"{m} ", "name": m, "fingerprint": m} for m in "xy"]
    text = probes.to_markdown({"models": models, "seeds": 1, "results": results})
    assert "Models `x` (x), `y` (y)" in text
    assert "\nx cell + spatial is above the better of the PCs in 1 of 1 tasks." in text
    assert "\ny cell + spatial is above the better of the PCs in 0 of 1 tasks." in text
    assert "\ny cell + spatial is above the best of the untrained model in 0 of 1 tasks." in text
    with pytest.raises(ValueError, match=r"--model names folders of the same name: a/m, b/m"):
        probes.read_models(["a/m", "b/m"])


def test_the_command_line(folder, model, monkeypatch, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    words = ["probes.py", str(folder), "--model", str(tmp_path / "model"), "--seeds", "1"]
    words += ["--device", "cpu", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        probes.main()
    assert "lacks starmap_mpfc_BZ5.h5ad" in capsys.readouterr().err
    monkeypatch.setattr(probes, "TASKS", TASKS)
    monkeypatch.setattr(sys, "argv", [*words, "--tasks", "one slice"])
    probes.main()
    assert "| cell + spatial |" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert {row["task"] for row in written["results"]} == {"one slice"}
    for wrong, message in (
        (["--seeds", "0"], "--seeds must be at least 1, found 0"),
        (["--tasks", "nothing"], "invalid choice: 'nothing'"),
    ):
        monkeypatch.setattr(sys, "argv", [*words, *wrong])
        with pytest.raises(SystemExit):
            probes.main()
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Rare classes are neither fitted")
@pytest.mark.filterwarnings("ignore:Classes that no cell outside")
def test_tasks_fit_the_development_slices(shared):
    """Files, columns and slices are there, and something is fitted and tested in each."""
    for loaded in probe_tasks.load_tasks(shared / "data"):
        sections = resolve_slices(loaded.data, loaded.task.library_key)
        labels = np.concatenate(loaded.labels)
        folds = plan_folds(sections, labels, left_out=loaded.left_out, spatial_key="spatial")
        assert folds, loaded.task.name
        assert all(len(one.classes) > 1 and len(one.tested) > 20 for one in folds)
    assert len(probe_tasks.TASKS) == len({task.name for task in probe_tasks.TASKS}) == 16


@pytest.mark.slow
def test_no_stage_made_the_embedded_model_worse_than_its_start(shared):
    # The pooled sums alone, and the transformer before its first step.
    names = ("STARmap layers", "STARmap types", "olfactory bulb layers")
    tasks = probes.load_tasks(
        shared / "data", [one for one in probe_tasks.TASKS if one.name in names]
    )
    trained, start = st.Stofm.from_pretrained(), st.Stofm.from_pretrained()
    start.se2_transformer.load_state_dict(probes.untrained(start).se2_transformer.state_dict())
    probe_tasks.embed_with(start, tasks, prefix="start ")
    probe_tasks.embed_with(trained, tasks)
    n_sums = trained.config.cell_encoder.d_gene
    for adata in {id(one): one for task in tasks for one in task.slices.values()}.values():
        adata.obsm["X_sums"] = adata.obsm["X_cell"][:, :n_sums]
        assert_array_equal(adata.obsm["X_start cell"], adata.obsm["X_cell"])
    use_rep = {"sums": "X_sums", "cell": "X_cell", "start": "X_start spatial", "end": "X_spatial"}
    scores = pd.DataFrame([task.head_scores(use_rep, seeds=(0, 1)) for task in tasks])
    mean = scores.map(np.mean).mean()
    assert mean["cell"] > mean["sums"] - 0.005
    assert mean["end"] > mean["start"] - 0.005
