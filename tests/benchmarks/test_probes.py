from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse

import stofm as st

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
probes = importlib.import_module("probes")
probe_tasks = importlib.import_module("probe_tasks")
probing = importlib.import_module("probing")

TASKS = (
    probe_tasks.Task(name="kinds", fit=("a", "b"), test="c", label="kind", no_class=("2",)),
    probe_tasks.Task(name="libraries", test="c", label="library"),
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


def blobs(rng, n, *, shift=0.0):
    """Cells of three classes that lie apart."""
    labels = np.array(["x", "y", "z"])[np.arange(n) % 3]
    centers = {"x": (0, 9), "y": (9, 0), "z": (-9, -9)}
    places = np.array([centers[label] for label in labels])
    return rng.normal(size=(n, 2)) + places + shift, labels


def test_a_head_learns_classes_that_lie_apart_and_nothing_else(rng):
    features, labels = blobs(rng, 90)
    tested, truth = blobs(rng, 60)
    assert probing.probe(features, labels, tested, truth, seeds=(0, 1)) == [1.0, 1.0]
    noise = probing.probe(rng.normal(size=(90, 2)), labels, tested, truth, seeds=(0,))
    assert noise[0] < 0.7


def test_scores_depend_on_the_seed_alone(rng):
    features, labels = blobs(rng, 60)
    tested, truth = blobs(rng, 60)
    tested += rng.normal(scale=9, size=tested.shape)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = probing.probe(features, labels, tested, truth, seeds=(0, 1, 2))
    assert_array_equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    assert probing.probe(features, labels, tested, truth, seeds=(0, 1, 2)) == first
    assert len(set(first)) > 1


def test_inputs_are_standardised_by_the_fitted_cells(rng):
    features, labels = blobs(rng, 150)
    tested, truth = blobs(rng, 60)
    scale, shift = np.array([1e6, 1e-4]), np.array([1e8, 3.0])
    scores = probing.probe(
        features * scale + shift, labels, tested * scale + shift, truth, seeds=(0,)
    )
    assert scores == [1.0]


def test_rare_classes_and_cells_without_class_are_left_out(rng):
    labels = np.array(["x"] * 100 + ["y"] * 98 + ["z"] * 2 + ["w"] + [""] * 500)
    assert probing.common_classes(labels[:200]).tolist() == ["x", "y", "z"]
    assert probing.common_classes(labels).tolist() == ["x", "y"]
    features = np.concatenate([np.repeat([[0.0, 9.0], [9.0, 0.0]], [100, 98], axis=0)])
    features = np.vstack([features, rng.normal(size=(503, 2))])
    # Cells of w are not tested: there is no class that they could be found in.
    tested = np.array([[0.0, 9.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    truth = np.array(["x", "y", "w", ""])
    assert probing.probe(features, labels, tested, truth, seeds=(0,)) == [1.0]


def test_f1_is_a_mean_over_the_tested_classes(rng):
    features, labels = blobs(rng, 150)
    tested, truth = blobs(rng, 60)
    # All x are found as x, half of the true y too; z does not occur.
    half = truth.copy()
    half[truth == "x"] = np.where(np.arange(20) < 10, "x", "y")
    kept = truth == "x"
    found = probing.probe(features, labels, tested[kept], half[kept], seeds=(0,))
    assert_allclose(found, [(2 / 3 + 0) / 2])


@pytest.mark.parametrize(
    ("fitted", "tested"), [(["x"] * 50, ["x"] * 9), (["x", "y"] * 25, ["z"] * 9)]
)
def test_nothing_to_probe_is_said(rng, fitted, tested):
    with pytest.raises(ValueError, match=r"needs two classes or more, and cells of them to test"):
        probing.probe(
            rng.normal(size=(50, 2)),
            np.array(fitted),
            rng.normal(size=(9, 2)),
            np.array(tested),
            seeds=(0,),
        )


def test_clusters_are_compared_with_the_classes(rng):
    features, labels = blobs(rng, 90)
    labels = labels.copy()
    features[:9], labels[:9] = rng.normal(scale=50, size=(9, 2)), ""
    found = probing.cluster(features, labels, seeds=(0, 1))
    assert found == {"ari": [1.0, 1.0], "nmi": pytest.approx([1.0, 1.0])}
    noise = probing.cluster(rng.normal(size=(90, 2)), labels, seeds=(0,))
    assert abs(noise["ari"][0]) < 0.2


def test_side_by_side_neither_part_drowns_the_other(rng):
    small = [rng.normal(scale=1e-3, size=(20, 3)) + 5, rng.normal(scale=1e-3, size=(30, 3)) + 5]
    large = [rng.normal(scale=100, size=(20, 2)), rng.normal(scale=100, size=(30, 2))]
    found = probing.side_by_side(small, large)
    assert [one.shape for one in found] == [(20, 5), (30, 5)]
    together = np.concatenate(found)
    assert_allclose(together[:, :3].var(axis=0).mean(), 1.0)
    assert_allclose(together[:, 3:].var(axis=0).mean(), 1.0)
    # One scale for all slices.
    assert_allclose(found[0][:, 3:] / large[0], np.full((20, 2), found[1][0, 3] / large[1][0, 0]))
    still = probing.side_by_side([np.ones((4, 2))], [np.ones((4, 1))])
    assert_array_equal(still[0], np.ones((4, 3)))


def test_principal_components_are_those_of_shared_genes(slices):
    from sklearn.decomposition import PCA

    first, second = slices["a"], slices["b"][:, ::-1][:, 5:].copy()
    found = probing.principal_components([first, second])
    assert [one.shape for one in found] == [(101, 50), (83, 50)]
    shared = [name for name in first.var_names if name in set(second.var_names)]

    def expected(adata):
        counts = adata.X.toarray().astype(float)
        # All genes of a cell count, those that other slices lack too.
        scaled = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
        return scaled[:, [adata.var_names.get_loc(name) for name in shared]]

    stacked = np.vstack([expected(first), expected(second)])
    scores = PCA(50, svd_solver="full").fit_transform(stacked)
    assert_allclose(np.abs(np.vstack(found))[:, :40], np.abs(scores)[:, :40], atol=1e-3)
    second.var_names = [f"other{k}" for k in range(second.n_vars)]
    with pytest.raises(ValueError, match="have 0 genes in common"):
        probing.principal_components([first, second])


def test_of_many_genes_the_most_variable_are_taken(slices, monkeypatch):
    monkeypatch.setattr(probing, "_MOST_GENES", 6)
    one = slices["a"]
    counts = one.X.toarray()
    scaled = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    best = np.argsort(-scaled.var(axis=0))[:6]
    (found,) = probing.principal_components([one])
    assert found.shape == (101, 5)
    centred = scaled[:, best] - scaled[:, best].mean(axis=0)
    variances = np.sort(np.linalg.eigvalsh(centred.T @ centred / 101))[::-1]
    assert_allclose(found.var(axis=0), variances[:5], rtol=1e-4)


def test_neighbor_means_stay_in_the_slice_and_leave_the_cell_out(rng):
    xy = rng.random((60, 2))
    # A cell at the same place as another one is its neighbour all the same.
    xy[1] = xy[0]
    features = rng.normal(size=(60, 3))
    slices = [np.arange(0, 60, 2), np.arange(1, 59, 2), np.array([59])]
    found = probing.neighbor_means(features, xy, slices)
    for rows in slices[:2]:
        for cell in rows:
            others = rows[rows != cell]
            nearest = np.argsort(np.linalg.norm(xy[others] - xy[cell], axis=1), kind="stable")[:10]
            assert_allclose(found[cell], features[others[nearest]].mean(axis=0))
    assert_array_equal(found[59], 0)


def test_tasks_share_slices_and_know_their_classes(tasks):
    kinds, libraries = tasks
    assert list(kinds.slices) == ["a", "b", "c"]
    assert kinds.slices["c"] is libraries.slices["c"]
    labels = kinds.labels
    assert [len(one) for one in labels] == [101, 83, 184]
    assert set(labels[0]) == {"", "0", "1"}
    assert_array_equal(labels[2][:5], "")
    assert [len(rows) for rows in probe_tasks.rows_by_slice(kinds.slices["c"])] == [101, 83]


def test_what_is_missing_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"lacks nothing\.h5ad, which probes need"):
        probes.load_tasks(folder, [replace(TASKS[0], test="nothing")])
    with pytest.raises(ValueError, match=r"a\.h5ad has no obs\['layer'\], which 'kinds' needs"):
        probes.load_tasks(folder, [replace(TASKS[0], label="layer")])


def test_embeddings_are_those_of_tl_embed(tasks, slices, model):
    found = probes.embed_with(model, tasks, device="cpu")
    assert list(found) == ["a", "b", "c"]
    expected = slices["c"].copy()
    st.tl.embed(expected, model, library_key="slice_id", device="cpu", show_progress_bar=False)
    assert_allclose(found["c"].spatial, expected.obsm["X_stofm"], atol=1e-5)
    assert_array_equal(found["c"].cell, expected.obsm["X_stofm_cell"])
    # Another model's are not taken for it.
    other = probes.untrained(model, seed=3)
    again = probes.embed_with(other, tasks, device="cpu")["c"]
    assert np.abs(again.spatial - found["c"].spatial).max() > 0.1


def test_embedding_without_virtual_cells(tasks, model):
    whole = probes.embed_with(model, tasks, device="cpu")
    found = probes.embed_with(model, tasks, virtual_cells=False, device="cpu")
    assert_array_equal(found["c"].cell, whole["c"].cell)
    assert np.abs(found["c"].spatial - whole["c"].spatial).max() > 1e-3
    # Nothing but the sub-slice is seen, and nothing crosses slices: another slice changes nothing.
    alone = replace(tasks[0], slices={"c": tasks[0].slices["c"][5:].copy()})
    left = alone.slices["c"].obs["library"] == "left"
    only_left = replace(tasks[0], slices={"c": alone.slices["c"][left].copy()})
    both, one = (
        probes.embed_with(model, [t], virtual_cells=False, device="cpu")["c"].spatial
        for t in (alone, only_left)
    )
    assert_allclose(both[left.to_numpy()], one, atol=1e-5)


def test_a_sub_slice_of_one_cell_is_embedded_too(tasks, model):
    model.config = replace(model.config, subslice=replace(model.config.subslice, n_cells=1))
    (task,) = [replace(tasks[0], slices={"a": tasks[0].slices["a"]})]
    found = probes.embed_with(model, [task], virtual_cells=False, device="cpu")["a"]
    assert np.isfinite(found.spatial).all()
    # Alone, a cell's embedding says what its genes say, whatever its place.
    task.slices["a"].obsm["spatial"] = task.slices["a"].obsm["spatial"][::-1].copy()
    moved = probes.embed_with(model, [task], virtual_cells=False, device="cpu")["a"]
    assert_allclose(moved.spatial, found.spatial, atol=1e-5)


def test_run_writes_tables_and_numbers(tasks, model, tmp_path, capsys):
    out = tmp_path / "results" / "mini-0.1"
    report = probes.run(model, tasks, out, seeds=(0,), device="cpu")
    written = json.loads((tmp_path / "results" / "mini-0.1.json").read_text())
    assert written == report
    rows = {(row["representation"], row["task"]): row for row in report["results"]}
    names = ["cell", "spatial", "cell + spatial"]
    expected = [*names, *(f"untrained {name}" for name in names), "PCs", "PCs + neighbours"]
    assert [name for name, task in rows if task == "kinds"] == expected
    assert len(rows["PCs", "kinds"]["macro_f1"]) == 1
    assert set(rows["cell", "libraries"]) == {"representation", "task", "ari", "nmi"}
    # Three kinds of cells, of which two are classes, differ in their counts.
    assert min(rows["PCs", "kinds"]["macro_f1"]) > 0.8
    assert (tmp_path / "results" / "mini-0.1.md").read_text() == probes.to_markdown(report)
    assert "embedding with untrained tiny" in capsys.readouterr().err


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
    report = {"model": "m", "fingerprint": "f", "seeds": 2, "results": results}
    text = probes.to_markdown(report)
    assert "macro-F1" in text
    assert "| cell | 0.200 |" in text
    assert "NMI" not in text


def test_the_command_line(folder, model, monkeypatch, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    words = ["probes.py", str(folder), "--model", str(tmp_path / "model"), "--seeds", "1"]
    words += ["--device", "cpu", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        probes.main()
    assert "lacks starmap_mpfc_BZ5.h5ad" in capsys.readouterr().err
    monkeypatch.setattr(probes, "load_tasks", lambda path: probe_tasks.load_tasks(path, TASKS[1:]))
    probes.main()
    assert "| cell + spatial |" in capsys.readouterr().out
    assert (tmp_path / "out.json").is_file()
    monkeypatch.setattr(sys, "argv", [*words, "--seeds", "0"])
    with pytest.raises(SystemExit):
        probes.main()
    assert "--seeds must be at least 1, found 0" in capsys.readouterr().err


def test_the_tasks_are_those_of_the_issue():
    assert [(t.name, len(t.fit)) for t in probe_tasks.TASKS] == [
        ("STARmap layers", 1),
        ("STARmap types", 1),
        ("seqFISH types", 1),
        ("MERFISH types", 1),
        ("DLPFC layers", 2),
        ("HER2+ regions", 4),
        ("olfactory bulb layers", 0),
    ]
    assert all(t.test not in t.fit for t in probe_tasks.TASKS)


def test_counts_may_be_dense(slices):
    dense = slices["a"].copy()
    dense.X = dense.X.toarray()
    assert sparse.issparse(slices["a"].X)
    first, second = (probing.principal_components([one])[0] for one in (slices["a"], dense))
    assert_allclose(first, second, atol=1e-5)
