from __future__ import annotations

import os

import numpy as np
import pytest

from stofm.genes import RankedTokens
from stofm.train.corpus import Corpus, open_slice, preparation_key, write_slice

FILES = ["tokens.int32", "values.float32", "offsets.npy", "coordinates.npy"]


@pytest.fixture
def ranked():
    lengths = np.array([3, 0, 5, 1, 2])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(2, 13, dtype=np.int32)
    return RankedTokens(tokens, offsets, np.linspace(0.5, 6, 11, dtype=np.float32))


@pytest.fixture
def places(rng):
    return rng.random((5, 2))


def rows(ranked, start, stop):
    first, last = ranked.offsets[start], ranked.offsets[stop]
    values = None if ranked.values is None else ranked.values[first:last]
    return RankedTokens(ranked.tokens[first:last], ranked.offsets[start : stop + 1] - first, values)


def base(array):
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    return array


def test_slice_comes_back_with_its_tokens_memory_mapped(tmp_path, ranked, places):
    written = write_slice(tmp_path, "k", name="left", blocks=[ranked], coordinates=places)
    found = open_slice(tmp_path, "k")
    assert found.ranked.equals(ranked)
    np.testing.assert_array_equal(found.coordinates, places)
    assert (found.name, found.n_cells) == ("left", 5)
    assert found.digest == written.digest
    # Each map keeps a file open.
    mapped, in_memory = (
        (found.ranked.tokens, found.ranked.values),
        (found.ranked.offsets, found.coordinates),
    )
    assert all(isinstance(base(array), np.memmap) for array in mapped)
    assert not any(isinstance(base(array), np.memmap) for array in in_memory)
    assert not any(array.flags.writeable for array in mapped + in_memory)


def test_blocks_give_the_same_slice(tmp_path, ranked, places):
    whole = write_slice(tmp_path, "a", name="s", blocks=[ranked], coordinates=places)
    blocks = (rows(ranked, i, j) for i, j in ((0, 2), (2, 2), (2, 5)))
    streamed = write_slice(tmp_path, "b", name="s", blocks=blocks, coordinates=places)
    assert streamed.ranked.equals(ranked)
    assert streamed.digest == whole.digest


@pytest.mark.parametrize("changed", ["tokens", "values", "coordinates"])
def test_digest_changes_with_the_content(tmp_path, ranked, places, changed):
    def write(key):
        return write_slice(tmp_path, key, name="s", blocks=[ranked], coordinates=places).digest

    before = write("a")
    target = places[0] if changed == "coordinates" else getattr(ranked, changed)
    target[1] += 1
    assert write("b") != before


def test_written_slice_is_not_prepared_again(tmp_path, ranked, places):
    write_slice(tmp_path, "k", name="s", blocks=[ranked], coordinates=places)

    def blocks():
        pytest.fail("read again")
        yield ranked

    again = write_slice(tmp_path, "k", name="s", blocks=blocks(), coordinates=places)
    assert again.ranked.equals(ranked)


def test_interrupted_writing_leaves_nothing(tmp_path, ranked, places):
    def blocks():
        yield rows(ranked, 0, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_slice(tmp_path, "k", name="s", blocks=blocks(), coordinates=places)
    assert list(tmp_path.iterdir()) == []
    write_slice(tmp_path, "k", name="s", blocks=[ranked], coordinates=places)
    assert open_slice(tmp_path, "k").ranked.equals(ranked)


def test_slices_without_values_and_without_cells(tmp_path, ranked, places):
    bare = write_slice(
        tmp_path, "a", name="s", blocks=[ranked.without_values()], coordinates=places
    )
    assert bare.ranked.values is None
    empty = write_slice(tmp_path, "b", name="s", blocks=[], coordinates=np.empty((0, 2)))
    assert empty.n_cells == 0


@pytest.mark.parametrize("name", FILES)
def test_a_slice_with_a_changed_bit_is_written_again(tmp_path, ranked, places, name):
    options = {"name": "s", "blocks": [ranked], "coordinates": places}
    expected = write_slice(tmp_path, "k", **options)
    path = tmp_path / "k" / name
    whole = path.read_bytes()
    content = bytearray(whole)
    # Of the middle of the numbers, their lowest bit.
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"k.* is (damaged|missing).* It is made again"):
        found = write_slice(tmp_path, "k", **options)
    assert path.read_bytes() == whole
    assert found.digest == expected.digest
    assert write_slice(tmp_path, "k", **options).digest == expected.digest


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}"])
@pytest.mark.parametrize("name", [*FILES, "slice.json"])
def test_a_slice_with_an_empty_or_missing_file_is_written_again(
    tmp_path, ranked, places, name, content
):
    options = {"name": "s", "blocks": [ranked], "coordinates": places}
    expected = write_slice(tmp_path, "k", **options)
    path = tmp_path / "k" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"k.* is (damaged|missing).* It is made again"):
        assert write_slice(tmp_path, "k", **options).digest == expected.digest


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


@pytest.mark.parametrize("values", [True, False])
def test_take_gathers_cells_of_all_slices_in_the_order_asked(write_corpus, rng, values):
    corpus = write_corpus([13, 1, 7], values=values)
    assert (corpus.n_cells, corpus.has_values) == (21, values)
    whole = RankedTokens.concatenate([s.ranked for s in corpus.slices])
    np.testing.assert_array_equal(corpus.cell_lengths, whole.n_tokens)
    cells = rng.permutation(21)[:17]
    expected = RankedTokens.concatenate([rows(whole, c, c + 1) for c in cells])
    assert corpus.take(cells).equals(expected)
    assert corpus.take(cells[:0]).n_cells == 0


def test_cells_are_numbered_through(corpus):
    number, row = corpus.locate(np.array([0, 112, 113, 143, 144, 202]))
    assert number.tolist() == [0, 0, 1, 1, 2, 2]
    assert row.tolist() == [0, 112, 0, 30, 0, 58]
    assert corpus.describe([2, 0, 2]) == "'slice-0', 'slice-2'"
    many = Corpus(corpus.slices * 4)
    assert many.describe(np.arange(12)).endswith("'slice-1' and 4 more")


def test_a_corpus_needs_a_slice():
    with pytest.raises(ValueError, match="needs at least one slice with cells, found none"):
        Corpus(())
