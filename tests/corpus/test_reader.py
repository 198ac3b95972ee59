from __future__ import annotations

import os

import numpy as np
import pytest

from stofm.corpus.preparation import preparation_key
from stofm.corpus.reader import Corpus, CorpusSlice, Reading, take_cells
from stofm.corpus.shards import Shard, ShardWriter, join_shards
from stofm.corpus.sources import FileConfig, SliceSource
from stofm.corpus.writing import write_source
from stofm.genes import RankedTokens

ARRAYS = ["tokens", "counts", "offsets", "totals", "hashes", "rows", "places", "coordinates"]


@pytest.fixture
def write(tmp_path, vocabulary):
    """Write an AnnData to a shard, and open its slices."""

    def run(adata, name="s", **options):
        source = SliceSource(adata, name, FileConfig(**options))
        write_source(source, vocabulary, tmp_path / name)
        shard = Shard(tmp_path / name)
        how = Reading(vocabulary, 40, depth_power=0.5)
        return [CorpusSlice(shard, k, how) for k in range(len(shard.slices))]

    return run


@pytest.fixture
def left(adata):
    return adata[adata.obs["library"] == "left"].copy()


def base(array):
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    return array


def test_arrays_are_read_only_maps(write, left):
    (one,) = write(left)
    arrays = [one.shard[name] for name in ARRAYS]
    assert all(isinstance(base(array), np.memmap) for array in arrays)
    assert not any(array.flags.writeable for array in arrays)
    np.testing.assert_array_equal(one.part("places"), left.obsm["spatial"])
    assert one.part("rows").tolist() == list(range(101))


@pytest.mark.parametrize("changed", ["counts", "coordinates", "genes"])
def test_checksum_changes_with_the_content(write, left, changed):
    (before,) = write(left)
    if changed == "counts":
        left.X.data[1] += 1
    elif changed == "coordinates":
        left.obsm["spatial"][1] += 1
    else:
        left.var_names = np.roll(left.var_names, 1)
    assert write(left, "again")[0].digest != before.digest


def test_the_same_cells_are_known_in_another_order(write, left, rng):
    (before,) = write(left)
    other = left[rng.permutation(101), rng.permutation(71)].copy()
    other.obsm["spatial"] *= 3
    (after,) = write(other, "other")
    assert after.about["content"] == before.about["content"]
    assert after.digest != before.digest


def test_joined_shards_hold_the_same_slices(write, adata, left, tmp_path):
    left.X.data[0] = 70_000
    slices = [*write(left), *write(adata, "both", library_key="library")]
    assert [one.name for one in slices] == ["s", "both/left", "both/right"]
    join_shards(tmp_path / "joined", [tmp_path / "s", tmp_path / "both"])
    joined = Shard(tmp_path / "joined")
    assert (joined["counts"].dtype, joined.n_cells) == (np.uint32, 101 + 184)
    for number, one in enumerate(slices):
        found = CorpusSlice(joined, number, one.reading)
        assert found.ranked.equals(one.ranked)
        assert (found.name, found.digest) == (one.name, one.digest)
        np.testing.assert_array_equal(found.coordinates, one.coordinates)


def test_a_slice_becomes_an_anndata_again(write, adata, vocabulary):
    for one in write(adata, library_key="library"):
        name = one.about["slice"]
        own = adata[adata.obs["library"] == name]
        back = one.to_anndata()
        known = back[:, back.var_names != "(other genes)"]
        np.testing.assert_array_equal(known.X.toarray(), own[:, known.var_names].X.toarray())
        np.testing.assert_array_equal(back.X.sum(axis=1), own.X.sum(axis=1))
        np.testing.assert_array_equal(back.obsm["spatial"], own.obsm["spatial"])
        assert adata.obs_names[back.obs_names.astype(int)].tolist() == own.obs_names.tolist()
        assert known.var["symbol"].tolist() == [
            vocabulary.symbols[vocabulary.rows_by_id[gene]] for gene in known.var_names
        ]


@pytest.mark.parametrize("name", ARRAYS)
def test_a_truncated_array_is_named(write, left, name):
    (one,) = write(left)
    path = one.shard.folder / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{name}\.npy can't be read .* damaged"):
        Shard(one.shard.folder)[name]


def test_an_array_of_another_length_is_named(write, left):
    (one,) = write(left)
    np.save(one.shard.folder / "totals.npy", np.zeros(100))
    with pytest.raises(
        ValueError, match=r"totals\.npy is damaged: it has 100 entries, expected 101"
    ):
        Shard(one.shard.folder)["totals"]


def test_another_format_is_refused(write, left):
    (one,) = write(left)
    path = one.shard.folder / "shard.json"
    path.write_text(path.read_text().replace('"format": 3', '"format": 2'))
    with pytest.raises(ValueError, match="has the format 2, and this version of stofm reads 3"):
        Shard(one.shard.folder)


def test_interrupted_writing_leaves_nothing(write, left, tmp_path, monkeypatch):
    def append(self, lengths, **arrays):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", append)
        with pytest.raises(KeyboardInterrupt):
            write(left)
    assert list(tmp_path.iterdir()) == []
    assert write(left)[0].n_cells == 101


def test_key_follows_the_file_and_the_settings(tmp_path):
    path = tmp_path / "a.h5ad"
    path.write_bytes(b"one")
    key = preparation_key(path, {"layer": None})
    assert key == preparation_key(path, {"layer": None})
    assert key != preparation_key(path, {"layer": "counts"})
    os.utime(path, ns=(0, 0))
    assert preparation_key(path, {"layer": None}) != key
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*b\.h5ad"):
        preparation_key(tmp_path / "b.h5ad", {})


def test_key_follows_a_store_of_many_files(tmp_path):
    (tmp_path / "a.zarr" / "X").mkdir(parents=True)
    (tmp_path / "a.zarr" / "X" / "0").write_bytes(b"one")
    key = preparation_key(tmp_path / "a.zarr", {})
    assert key == preparation_key(tmp_path / "a.zarr", {})
    (tmp_path / "a.zarr" / "X" / "1").write_bytes(b"two")
    assert preparation_key(tmp_path / "a.zarr", {}) != key


@pytest.fixture
def corpus(write, adata):
    return Corpus(tuple(write(adata, library_key="library")))


def test_take_gathers_cells_of_all_slices_in_the_order_asked(corpus, rng):
    assert (corpus.n_cells, corpus.has_values) == (184, True)
    whole = RankedTokens.concatenate([one.ranked for one in corpus.slices])
    np.testing.assert_array_equal(corpus.lengths_of(np.arange(corpus.n_cells)), whole.n_tokens)
    cells = rng.permutation(184)[:17]
    assert corpus.take(cells).equals(take_cells(whole, cells))
    assert corpus.take(cells[:0]).n_cells == 0


def test_cells_are_numbered_through(corpus):
    number, row = corpus.locate(np.array([0, 100, 101, 183]))
    assert number.tolist() == [0, 0, 1, 1]
    assert row.tolist() == [0, 100, 0, 82]
    assert corpus.describe([1, 0, 1]) == "'s/left', 's/right'"
    many = Corpus(corpus.slices * 5)
    assert many.describe(np.arange(10)).endswith("'s/right' and 2 more")


def test_a_corpus_needs_a_slice():
    with pytest.raises(ValueError, match="needs at least one slice with cells, found none"):
        Corpus(())
