"""No public function changes what belongs to the user's whole program."""

from __future__ import annotations

import inspect
import random
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import lightning_fabric  # noqa: F401  (some libraries add filters when they are imported)
import matplotlib as mpl
import numpy as np
import pandas as pd
import plotly.offline  # noqa: F401  (as above)
import pytest
import torch

import stofm as st
from stofm._keys import Obs, Obsm
from stofm.train import OptimizerConfig, StageConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from anndata import AnnData

QUIET: dict[str, Any] = {"device": "cpu", "show_progress_bar": False}
SLICES: dict[str, Any] = {"library_key": "library", **QUIET}
#: Needs the network.
ELSEWHERE = {"datasets.load"}


def state() -> dict[str, Any]:
    """All global settings and random generators that a function could move."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    options = pd.get_option
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (kind, keys.tolist(), rest),
        "random": random.getstate(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filters": list(warnings.filters),
        "matplotlib": dict(mpl.rcParams),
        "errors": np.geterr(),
        "printing": np.get_printoptions(),
        "pandas": {name: options(name) for name in ("mode.chained_assignment", "display.max_rows")},
    }


mpl.use("Agg")


@pytest.fixture
def made(adata: AnnData, model: Any, few_epochs: None) -> AnnData:
    """Slices with all that functions write."""
    st.tl.embed(adata, model, **SLICES)
    adata.obsm["X_umap"] = adata.obsm["spatial"] / 100
    adata.obsm["truth"] = pd.get_dummies(adata.obs["kind"]).astype(float)
    adata.obs[Obs.ANNOTATION] = adata.obs["kind"]
    proba = adata.obsm["truth"].astype(np.float32)
    adata.obsm[Obsm.ANNOTATION_PROBA] = adata.obsm[Obsm.DECONVOLUTION] = proba
    adata.obs[Obs.ANNOTATION_CONFIDENCE] = np.float32(0.9)
    return adata


def _pp(adata: AnnData, model: Any, _folder: Path) -> dict[str, Callable[[], object]]:
    return {
        "pp.check": lambda: st.pp.check(adata, model, library_key="library", device="cpu"),
        "pp.map_genes": lambda: st.pp.map_genes(adata, vocabulary=model),
        "pp.tokenize": lambda: st.pp.tokenize(adata, model, show_progress_bar=False),
        "pp.subslice": lambda: st.pp.subslice(adata, library_key="library"),
    }


def _tl(adata: AnnData, model: Any, folder: Path) -> dict[str, Callable[[], object]]:
    rules = st.spatial.SpotRules(n_spots=100)
    own = st.tl.HeadOptions(n_components=3, spots=rules)
    heads: dict[str, Any] = {"options": own, **SLICES}
    known = st.datasets.simulate_slice(60, 120, seed=3)
    table = folder / "genes.tsv"
    numbers = np.arange(2.0 * known.n_vars).reshape(known.n_vars, 2)
    pd.DataFrame(numbers, index=known.var_names).to_csv(table, sep="\t")

    def annotate() -> None:
        head = st.tl.annotate(adata, label_key="kind", **heads)
        st.tl.annotate(adata, head=head, **SLICES)

    def deconvolve() -> None:
        st.tl.deconvolve(adata.copy(), reference=adata.copy(), label_key="kind", **heads)
        st.tl.deconvolve(adata, proportions_key="truth", **heads)

    def impute() -> None:
        query = adata[:, 4:].copy()
        st.tl.impute(query, reference=adata.copy(), model=model, **heads)

    return {
        "tl.pool_genes": lambda: st.tl.pool_genes(known, table, show_progress_bar=False),
        "tl.encode_cells": lambda: st.tl.encode_cells(adata, model, **QUIET),
        "tl.embed": lambda: st.tl.embed(adata, model, **SLICES),
        "tl.annotate": annotate,
        "tl.deconvolve": deconvolve,
        "tl.impute": impute,
        "tl.domains": lambda: st.tl.domains(adata, n_domains=3, coarser=[2], smooth=3),
        "tl.probe": lambda: st.tl.probe(
            adata, label_key="kind", library_key="library", left_out="left", seeds=1
        ),
    }


def _train(adata: AnnData, model: Any, folder: Path) -> dict[str, Callable[[], object]]:
    steps = OptimizerConfig(learning_rate=1e-3, warmup_steps=1, batch_size=16)
    stage = StageConfig(name="cell_encoder", max_steps=2, optimizer=steps)
    left = adata[adata.obs["library"] == "left"].copy()
    options: dict[str, Any] = {"stage": stage, "out_dir": folder / "run", **QUIET}

    def draw() -> None:
        st.pl.training(folder / "run", show=False)

    return {"tl.train": lambda: st.tl.train(left, model, **options), "pl.training": draw}


def _pl(adata: AnnData, _model: Any, folder: Path) -> dict[str, Callable[[], object]]:
    slices: dict[str, Any] = {"library_key": "library", "show": False}
    imputed = adata.copy()
    imputed.obsm[Obsm.IMPUTED] = adata.to_df().iloc[:, :3]
    gene = adata.var_names[0]
    scores = pd.DataFrame({"representation": ["PCs", "PCs + neighbours"], "macro_f1": [0.5, 0.6]})
    result = st.tl.ProbeResult(scores.assign(slice="left", seed=0))
    picture = np.full((40, 30, 3), 200, dtype=np.uint8)
    return {
        "pl.umap": lambda: st.pl.umap(adata, color="kind", show=False, save=folder / "umap.png"),
        "pl.spatial": lambda: st.pl.spatial(adata, color="kind", **slices),
        "pl.image": lambda: st.pl.image(adata, image=picture, **slices),
        "pl.subslices": lambda: st.pl.subslices(adata, show=False),
        "pl.virtual_cells": lambda: st.pl.virtual_cells(adata, show=False),
        "pl.annotation": lambda: st.pl.annotation(adata, truth_key="kind", **slices),
        "pl.deconvolution": lambda: st.pl.deconvolution(adata, kind="pies", **slices),
        "pl.imputation": lambda: st.pl.imputation(imputed, gene, **slices),
        "pl.probe": lambda: st.pl.probe(result, show=False),
    }


def _metrics(adata: AnnData, _model: Any, _folder: Path) -> dict[str, Callable[[], object]]:
    labels = adata.obs["kind"].to_numpy()
    counts = adata.to_df().to_numpy(dtype=float) + 0.1
    places = adata.obsm["spatial"]
    given: dict[str, tuple[Any, ...]] = dict.fromkeys(st.metrics.__all__, (counts, counts))
    named = ("accuracy", "ami", "ari", "macro_f1", "nmi", "weighted_f1")
    given |= dict.fromkeys(named, (labels, labels))
    given |= {"silhouette": (places, labels), "ssim": (counts, counts, places)}
    return {
        f"metrics.{name}": lambda name=name: getattr(st.metrics, name)(*given[name])
        for name in given
    }


def _im(adata: AnnData, _model: Any, _folder: Path) -> dict[str, Callable[[], object]]:
    width = int(adata.obsm["spatial"].max()) + 1
    options: dict[str, Any] = {"image": np.zeros((width, width), np.uint8), "microns_per_unit": 1.0}
    return {"im.embed": lambda: st.im.embed(adata, **options, **SLICES)}


def _datasets(_adata: AnnData, _model: Any, _folder: Path) -> dict[str, Callable[[], object]]:
    return {"datasets.simulate_slice": lambda: st.datasets.simulate_slice(60, 30, seed=3)}


def _interpret(adata: AnnData, model: Any, folder: Path) -> dict[str, Callable[[], object]]:
    adata.obs[Obs.DOMAIN] = adata.obs["kind"]
    slices: dict[str, Any] = {"library_key": "library"}
    gene = str(adata.var_names[0])
    kinds: dict[str, Any] = {"groupby": "kind", "model": model, "min_pairs": 1, **SLICES}
    pairs = pd.DataFrame({"ligand": [gene], "receptor": [str(adata.var_names[1])]})

    def perturb() -> None:
        effect = st.tl.perturb(
            adata, genes={gene: "delete"}, cells=adata.obs_names[:9], null=2, model=model, **SLICES
        )
        st.pl.perturbation(adata, effect, library_key="library", show=False)

    def influence() -> None:
        st.pl.influence(st.tl.influence(adata, **kinds), show=False)

    def attention() -> None:
        st.tl.attention(adata, model, top=5, **SLICES)
        st.pl.attention(adata, adata.obs_names[0], library_key="library", show=False)

    def novel() -> None:
        options = st.tl.HeadOptions(n_components=3)
        head = st.tl.annotate(adata, label_key="kind", options=options, **SLICES)
        st.tl.novel(adata, head, model=model, **SLICES)

    def describe() -> None:
        found = st.tl.describe(adata, "kind", **slices)
        st.pl.describe(adata, found, str(adata.obs["kind"].iloc[0]), show=False, **slices)

    return {
        "tl.perturb": perturb,
        "pl.perturbation": perturb,
        "tl.screen": lambda: st.tl.screen(
            adata, genes=[gene], cells=adata.obs_names[:9], null=2, model=model, **SLICES
        ),
        "tl.influence": influence,
        "pl.influence": influence,
        "tl.ligand_receptor": lambda: st.tl.ligand_receptor(adata, resource=pairs, **kinds),
        "tl.attention": attention,
        "pl.attention": attention,
        "tl.novel": novel,
        "tl.describe": describe,
        "pl.describe": describe,
        "pl.domains": lambda: st.pl.domains(adata, show=False, **slices),
        "pl.report": lambda: st.pl.report(adata, folder / "report.html", **slices),
    }


def _align(_adata: AnnData, _model: Any, _folder: Path) -> dict[str, Callable[[], object]]:
    slides = st.datasets.simulate_slice(
        150, 40, technology="visium", n_slices=2, image=True, seed=3
    )
    st.im.embed(slides, "statistics", library_key="slice_id", **QUIET)
    options = st.tl.AlignOptions(epochs=1)

    def align() -> None:
        aligner = st.tl.align(slides, options=options, library_key="slice_id", **QUIET)
        st.tl.predict_genes(slides, aligner, library_key="slice_id", device="cpu")
        gene = str(slides.obsm["stofm_predicted"].columns[0])
        st.pl.gene_prediction(slides, gene, library_key="slice_id", show=False)

    return dict.fromkeys(("tl.align", "tl.predict_genes", "pl.gene_prediction"), align)


AREAS = [_pp, _im, _tl, _train, _pl, _interpret, _align, _metrics, _datasets]


@pytest.mark.parametrize("calls", AREAS)
def test_nothing_global_is_changed(
    made: AnnData,
    model: Any,
    tmp_path: Path,
    calls: Callable[..., dict[str, Callable[[], object]]],
) -> None:
    for name, call in calls(made, model, tmp_path).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(5)
            np.random.seed(5)  # noqa: NPY002
            random.seed(5)
            before = state()
            call()
            after = state()
        changed = [part for part in before if before[part] != after[part]]
        assert not changed, f"{name} changes {changed}"


def test_every_public_function_is_called(made: AnnData, model: Any, tmp_path: Path) -> None:
    called = {name for calls in AREAS for name in calls(made, model, tmp_path)}
    public = {
        f"{area}.{name}"
        for area in ("pp", "im", "tl", "pl", "datasets", "metrics")
        for name in getattr(st, area).__all__
        if inspect.isfunction(getattr(getattr(st, area), name))
    }
    assert called | ELSEWHERE == public


def test_a_head_that_is_loaded_draws_nothing(made: AnnData, tmp_path: Path) -> None:
    options = st.tl.HeadOptions(n_components=0)
    head = st.tl.annotate(made, label_key="kind", options=options, **SLICES)
    head.save(tmp_path / "head")
    before = torch.get_rng_state()
    st.AnnotationHead.load(tmp_path / "head")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_calls_import_leaves_the_random_numbers_of_python() -> None:
    code = (
        "import random, stofm as st; state = random.getstate(); st.tl; import sklearn.neighbors; "
        "print(random.getstate() == state)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
