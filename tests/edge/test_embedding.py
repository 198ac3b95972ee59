"""Whether there is memory for embedding is said before the work."""

from __future__ import annotations

import pytest
import torch

import stofm as st
from stofm._edge import embedding
from stofm._keys import Uns
from stofm.nn.device import Workload, free_memory


def embed(adata, model, **options):
    st.tl.embed(adata, model, library_key="library", show_progress_bar=False, **options)


def test_too_little_memory_is_said_before_the_work(adata, model, monkeypatch):
    monkeypatch.setattr(embedding, "free_memory", lambda _: 1000)
    monkeypatch.setattr(embedding, "compute_tokens", None)
    with pytest.raises(MemoryError, match=r"184 cells of \d+ genes takes .* 1 kB are free") as told:
        embed(adata, model)
    assert "What helps: fewer cells at a time" in str(told.value)
    assert "a lower batch_size" in str(told.value)
    assert list(adata.obsm) == ["spatial"]
    assert Uns.STOFM not in adata.uns


def test_what_is_needed_follows_the_genes_of_a_cell(adata, model, monkeypatch):
    found = []

    def note(**sizes):
        found.append(Workload(**sizes))
        return found[-1]

    monkeypatch.setattr(embedding, "Workload", note)
    embed(adata, model)
    few = adata[:, :9].copy()
    embed(few, model)
    assert found[0].n_cells == 184
    assert found[0].largest_slice == 101
    assert found[0].genes_per_cell > 4 * found[1].genes_per_cell > 0
    embed(adata, model, copy=True)
    assert found[2].n_copied > adata.X.data.nbytes


def test_a_limit_on_the_process_counts(monkeypatch):
    resource = pytest.importorskip("resource")
    free = free_memory(torch.device("cpu"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (0, 0))
    assert free_memory(torch.device("cpu")) == 0 < free
