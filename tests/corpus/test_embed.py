from __future__ import annotations

import shutil
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import torch

import stofm as st
from stofm.corpus import _embed
from stofm.corpus.manifest import read_slices


@pytest.fixture
def embed(model, tmp_path):
    def run(data, out="out", **options):
        options = {"device": "cpu", "show_progress_bar": False, **options}
        return st.corpus.embed(data, tmp_path / out, options.pop("model", model), **options)

    return run


def test_slices_of_a_corpus_have_the_embeddings_of_their_files(
    embed, files, tmp_path, vocabulary, model
):
    quiet = {"show_progress_bar": False}
    st.corpus.build(files, tmp_path / "corpus", vocabulary=vocabulary, min_genes=0, **quiet)
    assert embed(tmp_path / "corpus") == []
    for one in read_slices(tmp_path / "corpus"):
        adata = ad.read_h5ad(files / f"{one.name}.h5ad")
        st.tl.embed(adata, model, device="cpu", **quiet)
        store = ad.read_zarr(tmp_path / "out" / f"{one.name}.zarr")
        np.testing.assert_array_equal(store.obsm["X_stofm"], adata.obsm["X_stofm"])
        assert store.obs_names.tolist() == [str(k) for k in range(adata.n_obs)]
        assert store.uns["stofm"]["X_stofm"]["model_fingerprint"] == model.fingerprint


def test_what_is_done_is_not_done_again(embed, files, monkeypatch, model, tmp_path):
    embed(files)
    done = []
    original = _embed._embed
    monkeypatch.setattr(
        _embed, "_embed", lambda job, **o: done.append(job[0].name) or original(job, **o)
    )
    embed(files)
    assert done == []
    shutil.rmtree(tmp_path / "out" / "b.zarr")
    embed(files)
    assert done == ["b"]
    embed(files, seed=1)
    assert done == ["b", *"abcde"]


def test_files_of_one_name_have_stores_of_their_own(embed, files, tmp_path):
    (tmp_path / "more").mkdir()
    shutil.copy(files / "b.h5ad", tmp_path / "more" / "a.h5ad")
    embed([files / "a.h5ad", tmp_path / "more"])
    sizes = {store.stem: ad.read_zarr(store).n_obs for store in (tmp_path / "out").glob("*.zarr")}
    assert sizes == {"a": 41, "a-2": 37}
    embed(tmp_path / "more")
    assert ad.read_zarr(tmp_path / "out" / "a.zarr").n_obs == 41


def test_failed_slices_are_reported(embed, files):
    (files / "c.h5ad").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=r"1 slices failed; .*again\. File 'c': .*can't be read"):
        (failed,) = embed(files)
    assert failed.startswith("File 'c': ")


def test_shares_are_embedded_apart(embed, files, tmp_path):
    embed(files, shard="2/2")
    assert sorted(p.stem for p in (tmp_path / "out").glob("*.zarr")) == ["b", "d"]


def test_each_worker_of_a_machine_has_a_gpu(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machines = {f"tcp://{k}": "one" if k < 6 else "two" for k in range(8)}
    turns = _embed._turns(machines)

    def chosen(k, device="auto", visible=""):
        monkeypatch.setattr(
            distributed, "get_worker", lambda: SimpleNamespace(address=f"tcp://{k}")
        )
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return _embed._own_device(device, turns)

    assert [chosen(k) for k in range(8)] == [f"cuda:{k}" for k in (0, 1, 2, 3, 0, 1, 0, 1)]
    # As dask-cuda starts them, its own first: each takes another.
    lists = ["4,5,6,7", "5,6,7,4", "6,7,4,5", "7,4,5,6"]
    taken = [int(chosen(k, visible=lists[k])[-1]) for k in range(4)]
    assert [lists[k].split(",")[taken[k]] for k in range(4)] == ["4", "5", "6", "7"]
    assert chosen(2, "cuda:3") == "cuda:3"
    assert chosen(2, "cpu") == "cpu"
    assert _embed._own_device("auto", {}) == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert chosen(2) == "auto"
