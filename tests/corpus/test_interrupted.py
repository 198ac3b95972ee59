"""Builds and embedding runs that are killed, and on workers."""

from __future__ import annotations

import multiprocessing
import time
from functools import partial

import anndata as ad
import numpy as np
import pytest

import stofm as st

pytestmark = pytest.mark.slow

#: Moments of a kill, as shares of the time that an undisturbed run takes.
MOMENTS = np.random.default_rng(7).uniform(0.05, 0.95, 5)


@pytest.fixture(scope="module")
def start():
    """Run a function in a process that has its libraries already."""
    context = multiprocessing.get_context("forkserver")
    libraries = ["anndata", "igraph", "leidenalg", "transformers.models.bert.modeling_bert", "zarr"]
    context.set_forkserver_preload(["stofm.corpus._build", "stofm.tl._embed", *libraries])

    def run(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    # The first one waits for the libraries.
    run(time.sleep, 0).join()
    return run


def finish(process):
    process.join(200)
    assert process.exitcode == 0


def kill_and_resume(start, run, whole, killed):
    """Let a run end once, kill it at several moments, and let it end again."""
    began = time.perf_counter()
    finish(start(run, whole))
    seconds = time.perf_counter() - began
    for moment in MOMENTS:
        process = start(run, killed)
        time.sleep(moment * seconds)
        process.kill()
        process.join(60)
    finish(start(run, killed))


def test_a_killed_build_ends_as_if_it_had_not_been(files, vocabulary, tmp_path, start, content):
    run = partial(
        st.corpus.build,
        files,
        vocabulary=vocabulary,
        shard_bytes=30_000,
        exclude=[str(files / "b.h5ad")],
        show_progress_bar=False,
    )
    kill_and_resume(start, run, tmp_path / "whole", tmp_path / "killed")
    found = content(tmp_path / "killed")
    assert len(found) > 30
    assert found == content(tmp_path / "whole")


def test_a_killed_embedding_ends_as_if_it_had_not_been(files, model, tmp_path, start, content):
    model.save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "device": "cpu", "show_progress_bar": False}
    for name in "de":
        (files / f"{name}.h5ad").unlink()
    run = partial(st.corpus.embed, files, **options)
    kill_and_resume(start, run, tmp_path / "whole", tmp_path / "killed")
    found = content(tmp_path / "killed")
    assert found == content(tmp_path / "whole")
    for name in "abc":
        expected = ad.read_h5ad(files / f"{name}.h5ad")
        st.tl.embed(expected, model, device="cpu", show_progress_bar=False)
        store = ad.read_zarr(tmp_path / "killed" / f"{name}.zarr")
        np.testing.assert_array_equal(store.obsm["X_stofm"], expected.obsm["X_stofm"])
        assert store.obs_names.tolist() == expected.obs_names.tolist()


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed", reason="needs Dask's scheduler")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.filterwarnings("ignore")
def test_workers_of_dask_give_the_same(files, vocabulary, model, tmp_path, client, content):
    (files / "c.h5ad").write_bytes(b"nothing")
    options = {"vocabulary": vocabulary, "show_progress_bar": False, "shard_bytes": 30_000}
    alone = st.corpus.build(files, tmp_path / "alone", **options)
    many = st.corpus.build(files, tmp_path / "many", client=client, **options)
    assert many.equals(alone)
    assert alone["status"].tolist() == ["ok", "ok", "failed", "ok", "ok"]
    assert content(tmp_path / "many") == content(tmp_path / "alone")
    quiet = {"device": "cpu", "show_progress_bar": False}
    assert st.corpus.embed(tmp_path / "many", tmp_path / "e", model, client=client, **quiet) == []
    st.corpus.embed(tmp_path / "alone", tmp_path / "f", model, **quiet)
    assert content(tmp_path / "e") == content(tmp_path / "f")
