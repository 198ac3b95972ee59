from __future__ import annotations

import gc

import numpy as np
import pytest

import stofm as st
from stofm import _arrays
from stofm._arrays import SideBySide, count_not_finite, let_go, spacious, spans


@pytest.fixture
def in_files(monkeypatch):
    """All arrays of some size go to files, and are worked on in small pieces."""
    monkeypatch.setattr(_arrays, "MOST_IN_MEMORY", 1000)
    monkeypatch.setattr(_arrays, "_AT_ONCE", 1 << 16)


def test_a_large_array_is_in_a_file_that_goes_with_it(in_files, monkeypatch, tmp_path):
    monkeypatch.setattr(_arrays.tempfile, "tempdir", str(tmp_path))
    array = spacious((301, 7))
    assert isinstance(array.base, _arrays._InFile)
    assert type(array) is np.ndarray
    assert np.isnan(array).all()
    assert [*tmp_path.iterdir()] == []
    values = np.arange(301 * 7, dtype=np.float32).reshape(301, 7)
    array[::-1] = values[::-1]
    let_go(array)
    let_go(array[3:])
    np.testing.assert_array_equal(array, values)
    part = array[5:9]
    del array
    gc.collect()
    np.testing.assert_array_equal(part, values[5:9])


def test_a_small_array_or_one_without_room_is_in_memory(in_files, monkeypatch):
    assert spacious((2, 3)).base is None

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_arrays.tempfile, "TemporaryFile", full)
    array = spacious((301, 7))
    assert array.base is None
    assert np.isnan(array).all()


def test_what_others_have_mapped_is_left_alone(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(5000, dtype=np.float32))
    array = np.load(tmp_path / "a.npy", mmap_mode="c")
    array[:] = 3.0
    # Pages of a private copy would be lost.
    let_go(array)
    let_go(np.zeros(3))
    let_go(None)
    assert (array == 3.0).all()


def test_rows_that_are_not_finite_are_counted_piece_by_piece(in_files, rng):
    values = rng.normal(size=(70_000, 3)).astype(np.float32)
    values[[0, 30_000, 69_999], [0, 1, 2]] = np.nan, np.inf, -np.inf
    assert len(spans(*values.shape)) > 10
    assert count_not_finite(values) == 3
    assert count_not_finite(values[:0]) == 0


def test_arrays_side_by_side(in_files, rng):
    parts = [rng.normal(size=(301, width)).astype(np.float32) for width in (3, 5)]
    both, expected = SideBySide(tuple(parts)), np.concatenate(parts, axis=1)
    assert both.shape == expected.shape
    assert len(both) == 301
    rows = rng.permutation(301)[:9]
    np.testing.assert_array_equal(both[rows], expected[rows])
    np.testing.assert_array_equal(both[4:8], expected[4:8])
    np.testing.assert_array_equal(both.together(), expected)
    assert SideBySide((parts[0],)).together() is parts[0]
    turned = np.asfortranarray(parts[0])
    assert SideBySide((turned,)).together().flags.c_contiguous


@pytest.mark.slow
def test_files_change_no_result(in_files, monkeypatch):
    fitted = st.datasets.simulate_slice(200, 60, seed=5)
    head = st.tl.annotate(fitted, label_key="region", device="cpu")

    def results():
        adata = st.datasets.simulate_slice(300, 60, seed=1)
        st.tl.domains(adata, n_domains=4)
        st.tl.annotate(adata, head=head)
        return adata

    here = results()
    assert isinstance(here.obsm["X_stofm"].base, _arrays._InFile)
    monkeypatch.setattr(_arrays, "MOST_IN_MEMORY", 1 << 30)
    there = results()
    assert there.obsm["X_stofm"].base is None
    for key in ("X_stofm", "X_stofm_cell", "stofm_annotation_proba"):
        np.testing.assert_array_equal(here.obsm[key], there.obsm[key])
    assert (here.obs["stofm_domain"] == there.obs["stofm_domain"]).all()


def test_what_is_in_a_file_can_be_written_and_copied(in_files, tmp_path):
    import anndata as ad

    adata = st.datasets.simulate_slice(300, 60, seed=1)
    st.tl.embed(adata, device="cpu")
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
    copied = adata.copy()
    for one in (ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr"), copied):
        np.testing.assert_array_equal(one.obsm["X_stofm"], adata.obsm["X_stofm"])
    copied.obsm["X_stofm"][:] = 0.0
    assert adata.obsm["X_stofm"].any()
