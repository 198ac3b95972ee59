from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

import stofm as st
from stofm._edge import memory_plan
from stofm._edge.layouts import lay_out
from stofm._edge.memory_plan import MemoryPlan, genes_per_cell
from stofm._edge.slices import read_places
from stofm._keys import Uns
from stofm.nn.device import Nodes, Workload, free_memory
from stofm.spatial import SubSliceConfig


def embed(adata, model, **options):
    st.tl.embed(adata, model, library_key="library", show_progress_bar=False, **options)


@pytest.fixture
def plan(model):
    return MemoryPlan(
        config=model.config,
        rules=model.config.subslice,
        work=Workload(n_cells=50_000, largest_slice=50_000, genes_per_cell=30),
        nodes=Nodes(53, 20),
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_size=1,
        token_budget=8192,
        is_backed=False,
    )


@pytest.fixture
def little(monkeypatch):
    """Say that so many bytes are free."""
    return lambda n: monkeypatch.setattr(memory_plan, "free_memory", lambda _: n)


def test_too_little_memory_is_said_before_the_work(adata, model, little, monkeypatch):
    little(1000)
    monkeypatch.setattr("stofm._edge.tokens.compute_tokens", None)
    with pytest.raises(
        MemoryError, match=r"184 cells of \d+ genes takes about .* and 1 kB are free"
    ):
        embed(adata, model)
    assert list(adata.obsm) == ["spatial"]
    assert Uns.STOFM not in adata.uns


def test_genes_of_a_cell_are_counted_among_those_known(adata):
    is_known = np.arange(71) < 30
    expected = (adata.X[:, :30] > 0).sum() / 184
    counts = sparse.lil_matrix(adata.X)
    counts[:, 40] = 0  # entries that are no counts
    adata.X = sparse.csr_matrix(counts)
    for matrix in (adata.X, sparse.csc_matrix(adata.X), adata.X.toarray()):
        adata.X = matrix
        assert genes_per_cell(adata, None, is_known) == pytest.approx(expected, rel=0.05)


def test_what_is_needed_follows_the_genes_of_a_cell(adata, model, monkeypatch):
    found = []
    monkeypatch.setattr(MemoryPlan, "require", lambda plan: found.append(plan.work))
    embed(adata, model)
    few = adata[:, :9].copy()
    embed(few, model)
    assert found[0].n_cells == 184
    assert found[0].largest_slice == 101
    assert found[0].genes_per_cell > 4 * found[1].genes_per_cell > 0
    embed(adata, model, copy=True)
    assert found[2].n_copied > adata.X.data.nbytes


def test_only_what_helps_is_named(plan):
    text = plan.advice("main memory")
    assert "backed='r'" in text
    for useless in ("slice by slice", "copy=True", "batch_size", "n_cells", "device="):
        assert useless not in text
    many = replace(plan, work=replace(plan.work, largest_slice=9000, n_copied=10**10))
    assert "leave out copy=True" in many.advice("main memory")
    several = replace(plan, work=replace(plan.work, n_cells=10**7), is_backed=True)
    assert several.advice("main memory") == (
        "What helps: embed slice by slice; fewer cells at a time."
    )
    large = replace(plan, nodes=Nodes(20_000, 20), batch_size=4)
    assert "a lower batch_size (now 4); subslice= with fewer n_cells (now 53)" in large.advice(
        "main memory"
    )
    wide = replace(plan, device=torch.device("cuda"), token_budget=10**8)
    wide.work = replace(plan.work, n_cells=10**8, largest_slice=10**8)
    assert wide.advice("cuda").startswith("What helps: a lower token_budget (now 100000000);")


def test_an_apple_gpu_computes_in_main_memory(plan):
    plan.device = torch.device("mps")
    assert list(plan.needed()) == ["main memory"]
    on_cuda = replace(plan, device=torch.device("cuda"))
    assert list(on_cuda.needed()) == ["cuda", "main memory"]
    assert plan.needed()["main memory"] > on_cuda.needed()["main memory"]


@pytest.fixture
def layouts(adata, model):
    places = read_places(adata, spatial_key="spatial", library_key="library")
    features = np.random.default_rng(0).normal(size=(184, 12)).astype(np.float32)
    return lay_out(features, places, model.config.subslice, use_rep="X", seed=0)


def test_a_batch_is_fitted_to_the_sub_slices_that_were_found(plan, layouts, little):
    plan.fit_batch(layouts.layouts, 1, is_fixed=False)
    assert plan.nodes.n_cells == max(np.bincount(one.subslice).max() for one in layouts.layouts)
    assert plan.nodes.n_virtual in {one.virtual.n_virtual for one in layouts.layouts}
    one = plan.in_transformer
    little(3 * one)
    assert plan.fit_batch(layouts.layouts, 16, is_fixed=False) == 2
    with pytest.raises(MemoryError, match=r"virtual cells take about .* a lower batch_size"):
        plan.fit_batch(layouts.layouts, 16, is_fixed=True)
    little(one // 2)
    with pytest.raises(MemoryError, match=r"Sub-slices of \d+ cells and \d+ virtual cells take"):
        plan.fit_batch(layouts.layouts, 16, is_fixed=False)


@pytest.mark.parametrize(
    "error",
    [
        np._core._exceptions._ArrayMemoryError((10**9,), np.dtype(float)),
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_shortage_while_it_runs_says_what_helps(adata, model, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("stofm._edge.embedding.encode_ranked", fail)
    with pytest.raises(MemoryError, match=r"Memory ran out while 184 cells were .* What helps: "):
        embed(adata, model)
    assert Uns.STOFM not in adata.uns


@pytest.mark.parametrize(
    "error",
    [MemoryError("The device ran out of memory"), RuntimeError("shapes"), OSError(28, "No space")],
)
def test_other_errors_pass(adata, model, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("stofm._edge.embedding.encode_ranked", fail)
    with pytest.raises(type(error)) as caught:
        embed(adata, model)
    assert caught.value is error


def test_rules_without_a_limit_are_checked_again(adata, model, monkeypatch):
    checked = []
    monkeypatch.setattr(MemoryPlan, "fit_batch", lambda plan, *_, **__: checked.append(plan) or 1)
    embed(adata, model, subslice=SubSliceConfig.reference())
    assert checked[0].rules.max_virtual_cells is None


def test_a_limit_on_the_process_counts(monkeypatch):
    resource = pytest.importorskip("resource")
    free = free_memory(torch.device("cpu"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (0, 0))
    assert free_memory(torch.device("cpu")) == 0 < free
