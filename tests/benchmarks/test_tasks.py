from __future__ import annotations

import contextlib
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from scipy.spatial import cKDTree

import stofm as st

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
tasks = importlib.import_module("tasks")
task_sets = importlib.import_module("task_sets")
task_contenders = importlib.import_module("task_contenders")
task_baselines = importlib.import_module("task_baselines")
task_report = importlib.import_module("task_report")
heads_speed = importlib.import_module("heads_speed")
probe_tasks = importlib.import_module("probe_tasks")

ACROSS = probe_tasks.Task(name="kinds", fit=("a",), test="b", label="kind", no_class=("2", "rare"))
WITHIN = probe_tasks.Task(name="kinds within", test="c", label="kind")


@pytest.fixture
def folder(adata, tmp_path):
    """Files a and b with a slice each, file c with both."""
    adata.obs["slice_id"] = adata.obs["library"]
    adata.obs["kind"] = adata.obs["kind"].cat.add_categories(["rare"])
    adata.obs.loc[adata.obs_names[:1], "kind"] = "rare"
    adata.obs.loc[adata.obs_names[5:9], "kind"] = np.nan
    adata.write_h5ad(tmp_path / "c.h5ad")
    for name, library in {"a": "left", "b": "right"}.items():
        adata[adata.obs["library"] == library].copy().write_h5ad(tmp_path / f"{name}.h5ad")
    return task_sets.Folder(tmp_path)


@pytest.fixture
def setting(model):
    return task_contenders.Setting(model=model, device="cpu")


@pytest.fixture
def deconvolution(adata):
    """Spots of three cells each, and cells of the same kinds."""
    kinds = adata.obs["kind"].to_numpy(dtype=str)
    spot = np.arange(60) // 3
    member = sparse.csr_matrix((np.ones(60), (spot, np.arange(60))))
    spots = AnnData(
        (member @ adata.X[:60]).tocsr().astype(np.float32),
        obs=pd.DataFrame(index=[f"spot{k}" for k in range(20)]),
        var=adata.var,
        obsm={"spatial": np.stack([np.arange(20) % 5, np.arange(20) // 5], axis=1) * 10.0},
    )
    truth = pd.crosstab(spot, kinds[:60], normalize="index").set_axis(spots.obs_names)
    cells = adata[60:].copy()
    cells.obs["cell_type"] = cells.obs["kind"]
    return task_sets.Deconvolution(spots, cells, truth)


@pytest.fixture
def imputation(folder):
    return task_sets.load_imputation(folder, ACROSS)


def test_classes_to_learn_and_to_test_come_from_different_slices(folder):
    task = task_sets.load_annotation(folder, ACROSS)
    assert list(task.slices) == ["a", "b"]
    assert list(task.fitted) == ["a"]
    assert set(task.fitted["a"]) == set(task.truth) == {"", "0", "1"}
    expected = task.slices["b"].obs["kind"].isin(["0", "1"]).to_numpy()
    assert_array_equal(task.truth != "", expected)
    # One and the same object wherever a file is used.
    assert task.slices["a"] is folder.read("a")


def test_blocks_of_a_slice_are_tested_with_a_margin(folder):
    task = task_sets.load_annotation(folder, WITHIN)
    learnt, tested = task.fitted["c"] != "", task.truth != ""
    assert not (learnt & tested).any()
    assert 0.1 < tested.sum() / (learnt | tested).sum() < 0.5
    assert set(task.fitted["c"]) == set(task.truth) == {"", "0", "1", "2"}
    adata = task.slices["c"]
    assert adata.obs["kind"].isna().to_numpy()[~(learnt | tested)].sum() == 4
    for name in ("left", "right"):
        own = (adata.obs["slice_id"] == name).to_numpy()
        places = [adata.obsm["spatial"][own & part] for part in (tested, learnt)]
        own_spacing = np.median(cKDTree(places[1]).query(places[1], 2)[0][:, 1])
        assert cKDTree(places[0]).query(places[1])[0].min() > own_spacing


def test_regions_without_rare_ones(folder):
    task = task_sets.load_domains(folder, WITHIN)
    assert task.n_domains == 3
    assert set(task.truth) == {"", "0", "1", "2"}
    assert (task.truth == "").sum() == 5


def test_a_missing_file_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"lacks nothing\.h5ad, which this task needs"):
        folder.read("nothing")


def test_composition_counts_the_cells_in_a_spot():
    spots = np.array([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [30.0, 0.0]])
    near = [[0.0, 0.9], [0.5, 0.0], [0.0, 0.0], [0.3, 0.3], [0.1, 0.2]]
    cells = np.concatenate(
        [near, np.add(near, [10, 0]), np.add(near, [20, 0]), np.add(near[:4], [30, 0]), [[0, 1.1]]]
    )
    labels = np.array([*"xxxxy", *"xyyy", "", *"xyy", "", "", *"xxxx", "y"])
    found = task_sets.composition(spots, cells, labels, radius=1.0)
    assert found.columns.tolist() == ["x", "y"]
    # The third has too few cells with a type, the fourth too few at all, as has the second.
    assert_allclose(found.iloc[0], [0.8, 0.2])
    assert found.iloc[1:].isna().all(axis=None)
    six = np.vstack([cells, [[10.0, 0.1], [10.0, 0.2]]])
    found = task_sets.composition(spots, six, np.append(labels, ["x", "x"]), radius=1.0)
    assert_allclose(found.iloc[1], [0.5, 0.5])


def test_held_out_genes_are_chosen_without_the_tested_slice(folder):
    fit, test = folder.read("a"), folder.read("b")
    task = task_sets.hold_out([fit], test)
    assert len(task.genes) == 14
    assert not set(task.genes) & set(task.query.var_names)
    assert task.query.n_vars == test.n_vars - 14
    detected = np.asarray((fit[:, task.genes].X > 0).mean(axis=0))
    assert detected.min() >= 0.1
    assert_array_equal(task.counts, test[:, task.genes].X.toarray())
    blank = test.copy()
    blank.X = blank.X * 0
    assert task_sets.hold_out([fit], blank).genes == task.genes
    # A gene that a slice lacks is neither held out nor read.
    narrow = test[:, [name for name in test.var_names if name != task.genes[0]]].copy()
    other = task_sets.hold_out([fit], narrow)
    assert task.genes[0] not in other.genes
    assert all(task.genes[0] not in one.var_names for one in other.known_genes)


def test_expression_is_in_units_of_the_genes_that_may_be_read(imputation, folder):
    test = folder.read("b")
    others = test[:, ~test.var_names.isin(imputation.genes)].X.toarray().sum(axis=1, keepdims=True)
    expected = np.log1p(test[:, imputation.genes].X.toarray() / others * 1e4)
    assert_allclose(imputation.truth, expected, rtol=1e-5)
    assert imputation.values.shape == (101, 14)
    assert imputation.truth.columns.tolist() == imputation.genes


def test_imputation_in_blocks_of_one_slice(folder):
    task = task_sets.load_imputation(folder, WITHIN)
    (fit,) = task.fit
    assert not set(fit.obs_names) & set(task.query.obs_names)
    assert 100 < fit.n_obs + task.query.n_obs < 184


def mixtures(rng, *, noise):
    """Spots of three types of cells that differ in their size and genes."""
    profiles = rng.gamma(0.5, 2.0, (3, 40)) * np.array([[1.0], [3.0], [0.5]])
    kinds = np.arange(300) % 3
    names = [f"g{k}" for k in range(40)]
    cells = AnnData(
        sparse.csr_matrix(rng.poisson(profiles[kinds] * 4).astype(np.float32)),
        obs=pd.DataFrame({"cell_type": np.array(["x", "y", "z"])[kinds]}).rename(str),
        var=pd.DataFrame(index=names),
    )
    shares = rng.dirichlet(np.ones(3), 30)
    expected = shares @ np.stack([cells.X[kinds == k].toarray().mean(axis=0) for k in range(3)]) * 7
    counts = rng.poisson(expected) if noise else expected
    spots = AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(index=[f"s{k}" for k in range(30)]),
        var=pd.DataFrame(index=names),
    )
    return spots, cells, pd.DataFrame(shares, index=spots.obs_names, columns=["x", "y", "z"])


@pytest.mark.parametrize("weighted", [False, True])
def test_least_squares_finds_proportions_of_cells(rng, weighted):
    spots, cells, truth = mixtures(rng, noise=False)
    # Genes are matched by name, cells without type do not count.
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(object)
    strange = cells[:20].copy()
    strange.obs["cell_type"] = None
    strange.X = strange.X * 50
    reference = AnnData(
        sparse.vstack([cells.X, strange.X]).tocsr(),
        obs=pd.concat([cells.obs, strange.obs]).reset_index(drop=True).rename(str),
        var=cells.var,
    )[:, ::-1].copy()
    found = task_baselines.least_squares_proportions(
        spots, reference, "cell_type", weighted=weighted
    )
    assert_allclose(found[["x", "y", "z"]], truth, atol=1e-4)
    empty = spots[:1].copy()
    empty.X = empty.X * 0
    nothing = task_baselines.least_squares_proportions(empty, cells, "cell_type", weighted=weighted)
    assert_allclose(nothing, 1 / 3)


def test_weights_help_where_counts_vary(rng):
    spots, cells, truth = mixtures(rng, noise=True)
    errors = [
        np.abs(
            task_baselines.least_squares_proportions(spots, cells, "cell_type", weighted=w) - truth
        )
        .to_numpy()
        .mean()
        for w in (False, True)
    ]
    assert errors[1] < errors[0] < 0.2


def test_the_composition_of_the_reference(rng):
    spots, cells, _ = mixtures(rng, noise=False)
    found = task_baselines.reference_composition(spots, cells[:4].copy(), "cell_type")
    assert found.index.equals(spots.obs_names)
    assert_allclose(found[["x", "y", "z"]].to_numpy(), np.tile([0.5, 0.25, 0.25], (30, 1)))


def test_the_number_of_neighbors_is_that_which_fits_held_out_cells(rng):
    places = rng.normal(size=(300, 2))
    query = rng.normal(size=(50, 2))

    def smooth(xy):
        return np.stack([xy[:, 0], xy @ [1.0, -1.0]], axis=1)

    close = task_baselines.nearest_neighbor_values(places, smooth(places), query)
    assert np.abs(close - smooth(query)).mean() < 0.2
    # Where places say nothing, the more the better.
    places, noise = rng.normal(size=(3000, 2)), rng.normal(size=(3000, 2))
    far = task_baselines.nearest_neighbor_values(places, noise, query)
    distances = np.linalg.norm(query[:, None] - places, axis=-1)
    assert_allclose(far, noise[np.argsort(distances, axis=1)[:, :50]].mean(axis=1))
    mean = task_baselines.mean_values(noise, 4)
    assert_allclose(mean, np.tile(noise.mean(axis=0), (4, 1)))


def test_logistic_regression_chooses_its_strength(rng):
    labels = np.array(["x", "y"])[np.arange(200) % 2]
    counts = sparse.csr_matrix(rng.poisson(np.where(labels == "x", 1.0, 4.0)[:, None], (200, 3)))
    found = task_baselines.logistic_regression(counts[:100], labels[:100], counts[100:])
    assert np.mean(found == labels[100:]) > 0.85


def test_all_contenders_of_annotation_learn_the_same_cells(folder, setting, monkeypatch):
    task = task_sets.load_annotation(folder, ACROSS)
    before = [adata.obs.copy() for adata in task.slices.values()]
    calls = []
    annotate = st.tl.annotate

    def noted(data, **options):
        calls.append((data, options))
        return annotate(data, **options)

    monkeypatch.setattr(st.tl, "annotate", noted)
    for one in tasks.choose_contenders(["stofm frozen", "PCs*"], ["frozen"])["annotation"]:
        scores = one.score(task, setting, 3)
        assert list(scores) == ["macro_f1", "accuracy"]
        assert scores["accuracy"] > (0.7 if one.strategy is None else 0.2)
    fits, applied = calls[::2], calls[1::2]
    assert [options.pop("use_rep", None) for _, options in fits] == [
        None,
        ("X_pca",),
        ("X_pca", "X_pca_around"),
    ]
    # All else is the same, but for the model.
    assert fits[0][1].pop("model") is setting.model
    assert fits[0][1].pop("options") == st.tl.HeadOptions(strategy="frozen")
    for (learnt, options), (tested, _) in zip(fits, applied, strict=True):
        assert options == fits[0][1]
        assert options["seed"] == 3
        (only,) = learnt
        assert_array_equal(
            only.obs["cell_type"].astype(object).fillna("").to_numpy(), task.fitted["a"]
        )
        assert tested.obs["cell_type"].isna().all()
    # Nothing of it stays in slices that other tasks use.
    for adata, obs in zip(task.slices.values(), before, strict=True):
        assert "cell_type" not in adata.obs
        pd.testing.assert_frame_equal(adata.obs[obs.columns], obs)


def test_slices_are_embedded_once(folder, setting, monkeypatch):
    embedded = []
    embed = st.tl.embed
    monkeypatch.setattr(
        st.tl, "embed", lambda adata, *a, **k: embedded.append(adata.n_obs) or embed(adata, *a, **k)
    )
    setting.embed([folder.read("a"), folder.read("b")])
    setting.embed([folder.read("b")])
    assert embedded == [101, 83]


def test_logistic_regression_in_annotation(folder, setting):
    task = task_sets.load_annotation(folder, ACROSS)
    scores = task_contenders.annotate_with_regression(task, setting, 0)
    assert scores["macro_f1"] > 0.8


def test_the_same_clusterings_for_all(folder, setting):
    task = task_sets.load_domains(folder, WITHIN)
    found = {one.name: one.score(task, setting, 0) for one in tasks.CONTENDERS["domains"]}
    assert list(found) == ["stofm frozen", "PCs", "PCs + neighbours"]
    assert all(set(one) == {"ari", "nmi", "ari_kmeans", "nmi_kmeans"} for one in found.values())
    # Kinds differ in their genes, and lie anywhere.
    assert found["PCs"]["ari"] > 0.5
    assert found["PCs"]["nmi_kmeans"] > 0.5


def test_contenders_of_deconvolution(deconvolution, setting, monkeypatch):
    def deconvolve(data, **options):
        assert data is not deconvolution.query
        assert options["reference"] is deconvolution.reference
        assert options["label_key"] == "cell_type"
        assert options["model"] is setting.model
        assert options["seed"] == 3
        data.obsm["stofm_deconvolution"] = deconvolution.truth[["1", "0", "2"]]

    monkeypatch.setattr(st.tl, "deconvolve", deconvolve)
    found = {
        one.name: one.score(deconvolution, setting, 3)
        for one in tasks.choose_contenders(["*"], ["frozen"])["deconvolution"]
    }
    assert list(found) == [
        "stofm frozen",
        "least squares",
        "weighted least squares",
        "reference's composition",
    ]
    assert found["stofm frozen"]["pearson"] == pytest.approx(1.0)
    assert found["least squares"]["pearson"] > 0.8
    assert found["reference's composition"]["pearson"] == 0.0
    assert found["reference's composition"]["rmse"] > 0.2
    for scores in found.values():
        assert list(scores) == list(task_report.MEASURES["deconvolution"])


def test_tested_spots_have_no_known_proportions(deconvolution, tmp_path):
    spots = deconvolution.query
    spots.obsm["proportions"] = deconvolution.truth.to_numpy()
    spots.uns["proportion_names"] = deconvolution.truth.columns.to_numpy(dtype=str)
    many = [spots.copy() for _ in range(10)]
    for k, one in enumerate(many):
        one.obs_names = [f"{k}-{name}" for name in one.obs_names]
        one.obsm["spatial"] = one.obsm["spatial"] + [50.0 * k, 0]
    joined = AnnData(
        sparse.vstack([one.X for one in many]).tocsr(),
        obs=pd.concat([one.obs for one in many]),
        var=spots.var,
        obsm={
            key: np.concatenate([one.obsm[key] for one in many])
            for key in ("spatial", "proportions")
        },
        uns=dict(spots.uns),
    )
    joined.write_h5ad(tmp_path / "starmap_pseudospots.h5ad")
    deconvolution.reference.write_h5ad(tmp_path / "starmap_v1_cells_ref.h5ad")
    task = task_sets.load_known_spots(task_sets.Folder(tmp_path))
    known = task.query.obsm["known"].dropna()
    assert 30 <= len(task.truth) <= 70
    assert not set(known.index) & set(task.truth.index)
    assert len(known) + len(task.truth) < 200
    whole = pd.DataFrame(joined.obsm["proportions"], index=joined.obs_names)
    assert_array_equal(known, whole.loc[known.index])
    assert_array_equal(task.truth, whole.loc[task.truth.index])


def test_contenders_that_learn_proportions(deconvolution, setting, monkeypatch):
    calls = []
    known = deconvolution.truth.copy()
    known.iloc[:6] = np.nan
    deconvolution.query.obsm["known"] = known
    task = task_sets.Proportions(
        deconvolution.query, deconvolution.reference, deconvolution.truth.iloc[:6]
    )

    def deconvolve(data, *, head=None, **options):
        if "reference" in options:
            assert options["reference"] is task.reference
            data.obsm["stofm_deconvolution"] = deconvolution.truth
            return "a head"
        if head is None:
            calls.append((data.obsm["known"], options))
            return "a head"
        assert head == "a head"
        data.obsm["stofm_deconvolution"] = deconvolution.truth
        return None

    monkeypatch.setattr(st.tl, "deconvolve", deconvolve)
    contenders = tasks.choose_contenders(["*"], ["frozen", "lora"])["proportions"]
    found = {one.name: one.score(task, setting, 3) for one in contenders}
    ours = ["stofm frozen", "stofm lora", "stofm, reference"]
    assert list(found)[:5] == [*ours, "PCs", "PCs + neighbours"]
    assert found["PCs"]["pearson"] == pytest.approx(1.0)
    assert found["least squares"]["pearson"] > 0.7
    own = [options.pop("options", None) for _, options in calls]
    assert own == [*(st.tl.HeadOptions(strategy=one) for one in ("frozen", "lora")), None, None]
    assert [options.pop("model", None) is setting.model for _, options in calls[:2]] == [True, True]
    keys = [options.pop("use_rep", None) for _, options in calls]
    assert keys == [None, None, ("X_pca",), ("X_pca", "X_pca_around")]
    for learnt, options in calls:
        pd.testing.assert_frame_equal(learnt, known)
        assert options == calls[0][1]
        assert (options["seed"], options["proportions_key"]) == (3, "known")


def test_a_type_that_is_not_found_counts_as_absent(deconvolution):
    exact = task_contenders._score_proportions(deconvolution, deconvolution.truth[["2", "0", "1"]])
    assert exact == {
        "pearson": pytest.approx(1.0),
        "rmse": 0.0,
        "mae": 0.0,
        "jensen_shannon": pytest.approx(0.0, abs=1e-9),
    }
    lacking = task_contenders._score_proportions(deconvolution, deconvolution.truth[["0", "1"]])
    assert lacking["pearson"] == pytest.approx(2 / 3)


def test_contenders_of_imputation(imputation, setting, monkeypatch):
    calls = []

    def impute(query, *, reference, genes, **options):
        calls.append((query, reference, options))
        assert not set(genes) & set(query.var_names)
        query.obsm["stofm_imputed"] = imputation.truth.astype(np.float32)

    monkeypatch.setattr(st.tl, "impute", impute)
    found = {
        one.name: one.score(imputation, setting, 3)
        for one in tasks.choose_contenders(["*"], ["frozen"])["imputation"]
    }
    assert list(found) == [
        "stofm frozen",
        "PCs",
        "PCs + neighbours",
        "nearest neighbours",
        "gene's mean",
    ]
    assert found["stofm frozen"]["pearson"] == pytest.approx(1.0)
    assert found["gene's mean"]["pearson"] == 0.0
    assert found["nearest neighbours"]["pearson"] > 0.3
    assert found["nearest neighbours"]["rmse"] < found["gene's mean"]["rmse"]
    model, *components = calls
    assert model[2].pop("model") is setting.model
    assert model[2].pop("options") == st.tl.HeadOptions(strategy="frozen")
    for query, (fit,), options in components:
        keys = options.pop("use_rep")
        assert options == model[2]
        assert options["seed"] == 3
        # Made without the genes to impute, and of both slices together.
        known = imputation.known_genes
        task_contenders.add_components(known)
        for key in keys:
            assert_array_equal(fit.obsm[key], known[0].obsm[key])
            assert_array_equal(query.obsm[key], known[1].obsm[key])
    assert set(imputation.query.obsm) == {"spatial"}


def row(family, task, contender, scores, *, seed=0, strategy=None):
    return {
        "family": family,
        "task": task,
        "contender": contender,
        "strategy": strategy,
        "seed": seed,
        "scores": scores,
    }


@pytest.fixture
def report():
    results = [
        row("annotation", "A", "stofm frozen", {"macro_f1": 0.5}, strategy="frozen"),
        row("annotation", "A", "stofm frozen", {"macro_f1": 0.7}, strategy="frozen", seed=1),
        row("annotation", "A", "stofm lora", {"macro_f1": 0.9}, strategy="lora"),
        row("annotation", "A", "PCs", {"macro_f1": 0.55}),
        row("annotation", "A", "PCs + neighbours", {"macro_f1": 0.58}),
        row("annotation", "A", "logistic regression", {"macro_f1": 0.85}),
        row("annotation", "B", "stofm frozen", {"macro_f1": 0.4}, strategy="frozen"),
        row("annotation", "B", "PCs", {"macro_f1": 0.3}),
        row("annotation", "B", "PCs + neighbours", {"macro_f1": 0.4}),
        row("annotation", "C", "PCs", {"macro_f1": 0.3}),
        row("deconvolution", "D", "stofm full", {"pearson": 0.8, "rmse": 0.2}, strategy="full"),
        row("deconvolution", "D", "least squares", {"pearson": 0.7, "rmse": 0.1}),
    ]
    return {"model": "m", "fingerprint": "f", "results": results}


def test_the_verdict(report):
    found = task_report.verdicts(report["results"])
    short = [(r["task"], r["measure"], r["best"], r["baseline"], r["ahead"]) for r in found]
    assert short == [
        ("A", "macro_f1", "stofm lora", "logistic regression", True),
        # No better is not ahead.
        ("B", "macro_f1", "stofm frozen", "PCs + neighbours", False),
        ("D", "pearson", "stofm full", "least squares", True),
        ("D", "rmse", "stofm full", "least squares", False),
    ]
    assert [r["decides"] for r in found] == [True, True, True, False]
    assert task_report.above_components(report["results"]) == {"A": True, "B": False}


def test_tables(report):
    text = task_report.to_markdown(report)
    assert "| contender | A | B | C |" in text
    assert "| stofm frozen | 0.600 ± 0.141 | 0.400 |  |" in text
    assert "Deconvolution with a single-cell reference, RMSE (less is better):" in text
    assert "mean and spread of 2 seeds" in text
    # The verdict has the measures that decide.
    assert "| D | Pearson correlation | stofm full | 0.800 |" in text
    assert "| D | RMSE |" not in text
    assert "Imputation" not in text
    assert "above every baseline on 2 of 3 tasks; not on annotation/B." in text
    assert "above both PCA baselines in macro-F1 on 1 of 2 annotation tasks." in text
    assert "Verdict" not in task_report.to_markdown(report | {"results": report["results"][-1:]})


def stub(calls, name, *, stop_after=None, **options):
    def score(task, _setting, seed):
        if stop_after is not None and len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append((task, name, seed))
        return {"macro_f1": 0.5 + 0.1 * seed, "accuracy": 0.5}

    return task_contenders.Contender(name=name, score=score, **options)


def test_run_goes_on_where_it_stopped(setting, tmp_path, monkeypatch, capsys):
    loaded = []
    loaders = {
        name: lambda folder, name=name: loaded.append(name) or f"{folder.path.name}/{name}"
        for name in ("A", "B")
    }
    monkeypatch.setattr(tasks, "TASK_SETS", {"annotation": loaders})
    out = tmp_path / "results" / "mini-0.1"

    def run(stop_after=None, seeds=2):
        calls = []
        contenders = [
            stub(calls, "stofm frozen", strategy="frozen", stop_after=stop_after),
            stub(calls, "stofm full", strategy="full"),
            stub(calls, "PCs", draws=False),
        ]
        with contextlib.suppress(KeyboardInterrupt):
            tasks.run(
                Path("data"),
                setting,
                tasks.open_report(out, setting.model),
                out,
                tasks={"annotation": ["A", "B"]},
                contenders={"annotation": contenders},
                seeds=seeds,
                tuned_seeds=1,
            )
        return calls

    first = run(stop_after=4)
    assert first == [
        ("data/A", "stofm frozen", 0),
        ("data/A", "stofm frozen", 1),
        ("data/A", "stofm full", 0),
        ("data/A", "PCs", 0),
    ]
    second = run()
    assert [(task, name) for task, name, _ in second] == [
        ("data/B", "stofm frozen"),
        ("data/B", "stofm frozen"),
        ("data/B", "stofm full"),
        ("data/B", "PCs"),
    ]
    # More seeds later on; a task that is done is not read again.
    loaded.clear()
    assert run() == []
    assert loaded == []
    assert {seed for _, _, seed in run(seeds=3)} == {2}
    report = json.loads((tmp_path / "results" / "mini-0.1.json").read_text())
    assert len(report["results"]) == 10
    assert report["verdict"] == task_report.verdicts(report["results"])
    assert all(one["seconds"] >= 0 for one in report["results"])
    text = (tmp_path / "results" / "mini-0.1.md").read_text()
    assert "| stofm frozen | 0.600 ± 0.100 | 0.600 ± 0.100 |" in text
    assert "annotation/B: stofm full, seed 0" in capsys.readouterr().err
    other = replace(setting.model.config, name="another")
    with pytest.raises(ValueError, match=r"mini-0\.1\.json is of tiny .* Give another --out"):
        tasks.open_report(out, st.Stofm(other, setting.model.vocabulary, seed=4))


def test_reports_are_joined(report, tmp_path, monkeypatch):
    rows = [
        row("annotation", "STARmap types", "PCs", {"macro_f1": 0.5}),
        row("annotation", "STARmap types", "stofm frozen", {"macro_f1": 0.6}, strategy="frozen"),
        row("domains", "STARmap layers", "PCs", {"ari": 0.1}),
        row("annotation", "STARmap layers", "PCs", {"macro_f1": 0.3}),
        row("annotation", "STARmap types", "PCs", {"macro_f1": 0.55}, seed=1),
    ]
    again = row("annotation", "STARmap types", "PCs", {"macro_f1": 0.4})
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, own in zip(paths, (rows, [again]), strict=True):
        path.write_text(json.dumps(report | {"results": own}))
    words = ["tasks.py", "--join", *map(str, paths), "--out", str(tmp_path / "whole")]
    monkeypatch.setattr(sys, "argv", words)
    tasks.main()
    joined = json.loads((tmp_path / "whole.json").read_text())
    assert joined["results"] == [rows[1], rows[3], again, rows[4], rows[2]]
    assert joined["verdict"] == task_report.verdicts(joined["results"])
    assert "| PCs | 0.475 ± 0.106 | 0.300 |" in (tmp_path / "whole.md").read_text()
    paths[1].write_text(json.dumps(report | {"results": [again], "fingerprint": "g"}))
    with pytest.raises(ValueError, match=r"different models .*second\.json: m \(g\)"):
        tasks.join(paths)
    for words in (["tasks.py"], ["tasks.py", "folder", "--join", str(paths[0])]):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit):
            tasks.main()


def test_tasks_and_contenders_are_chosen_by_name():
    assert tasks.choose_tasks(["*STARmap*"]) == {
        "annotation": ["STARmap layers", "STARmap types"],
        "domains": ["STARmap layers"],
        "deconvolution": ["STARmap spots"],
        "proportions": ["STARmap spots"],
        "imputation": ["STARmap"],
    }
    found = tasks.choose_contenders(["PCs", "stofm*"], ["lora"])
    names = {family: [one.name for one in every] for family, every in found.items()}
    assert names == {
        "annotation": ["stofm lora", "PCs"],
        "domains": ["PCs"],
        "deconvolution": [],
        "proportions": ["stofm lora", "PCs"],
        "imputation": ["stofm lora", "PCs"],
    }
    with pytest.raises(ValueError, match="No task fits 'domains/nothing'; there are annotation/"):
        tasks.choose_tasks(["*", "domains/nothing"])
    with pytest.raises(ValueError, match="No contender fits 'PC'; there are stofm frozen, stofm"):
        tasks.choose_contenders(["PC"], ["frozen"])


def test_the_command_line(folder, model, monkeypatch, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    loader = {"kinds": lambda files: task_sets.load_annotation(files, ACROSS)}
    monkeypatch.setattr(tasks, "TASK_SETS", {"annotation": loader})
    words = ["tasks.py", str(folder.path), "--model", str(tmp_path / "model"), "--seeds", "1"]
    words += ["--strategies", "frozen", "--device", "cpu", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    tasks.main()
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    frozen, *components, _ = (one["scores"]["macro_f1"] for one in results)
    ahead = int(frozen > max(components))
    said = capsys.readouterr().out
    assert f"above both PCA baselines in macro-F1 on {ahead} of 1" in said
    names = [one["contender"] for one in results]
    assert names == ["stofm frozen", "PCs", "PCs + neighbours", "logistic regression"]
    for wrong, message in (
        (["--tuned-seeds", "0"], "--tuned-seeds must be at least 1, found 0"),
        (["--only-tasks", "domains/*"], "No task fits 'domains/*'; there are annotation/kinds."),
    ):
        monkeypatch.setattr(sys, "argv", [*words, *wrong])
        with pytest.raises(SystemExit):
            tasks.main()
        assert message in capsys.readouterr().err


def test_speed_is_that_of_stored_embeddings(model, monkeypatch, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(heads_speed, "_N_SIMULATED", 60)
    monkeypatch.setattr(heads_speed, "_N_GENES", 50)
    monkeypatch.setattr(
        heads_speed.st.datasets,
        "simulate_slice",
        lambda n_cells, n_genes, *, seed: _simulated(model, n_cells, n_genes, seed),
    )
    words = ["heads_speed.py", "--model", str(tmp_path / "model"), "--fit", "200"]
    words += ["--predict", "70", "--out", str(tmp_path / "out" / "speed-0.1")]
    monkeypatch.setattr(sys, "argv", words)
    embedded = []
    embed = st.tl.embed
    monkeypatch.setattr(
        st.tl, "embed", lambda adata, *a, **k: embedded.append(adata.n_obs) or embed(adata, *a, **k)
    )
    heads_speed.main()
    report = json.loads((tmp_path / "out" / "speed-0.1.json").read_text())
    assert embedded == [60]
    assert (report["fit"]["cells"], report["predict"]["cells"]) == (200, 70)
    assert report["columns"] == 12 + 14
    assert report["classes"] == 2
    assert report["accuracy"] > 0.6
    out = capsys.readouterr().out
    assert f"| fit | 200 | {report['fit']['seconds']:.2f} |" in out
    assert "| predict | 70 |" in out


def _simulated(model, n_cells, n_genes, seed):
    rng = np.random.default_rng(seed)
    kind = np.arange(n_cells) % 2
    profiles = rng.gamma(0.5, 4.0, (2, n_genes))
    return AnnData(
        sparse.csr_matrix(rng.poisson(profiles[kind]).astype(np.float32)),
        obs=pd.DataFrame({"cell_type": np.array(["x", "y"])[kind]}).rename(str),
        var=pd.DataFrame(index=model.vocabulary.gene_ids[:n_genes]),
        obsm={"spatial": rng.random((n_cells, 2)) * 100},
    )


def test_the_tasks_are_those_of_the_issue():
    assert {family: len(names) for family, names in task_sets.TASK_SETS.items()} == {
        "annotation": 7,
        "domains": 5,
        "deconvolution": 2,
        "proportions": 1,
        "imputation": 5,
    }
    assert set(task_sets.TASK_SETS) == set(tasks.CONTENDERS) == set(task_report.MEASURES)
