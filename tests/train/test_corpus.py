from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from stofm.genes import RankedTokens
from stofm.train.corpus import Corpus, open_slice, preparation_key, write_slice


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
    written = write_slice(
        tmp_path, "k", name="left", ranked=ranked, coordinates=places, technology="Xenium"
    )
    found = open_slice(tmp_path, "k")
    assert found.ranked.equals(ranked)
    np.testing.assert_array_equal(found.coordinates, places)
    assert (found.name, found.technology, found.n_cells) == ("left", "Xenium", 5)
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
    whole = write_slice(tmp_path, "a", name="s", ranked=ranked, coordinates=places)
    blocks = (rows(ranked, i, j) for i, j in ((0, 2), (2, 2), (2, 5)))
    streamed = write_slice(tmp_path, "b", name="s", ranked=blocks, coordinates=places)
    assert streamed.ranked.equals(ranked)
    assert streamed.digest == whole.digest


@pytest.mark.parametrize("changed", ["tokens", "values", "coordinates"])
def test_digest_changes_with_the_content(tmp_path, ranked, places, changed):
    def write(key):
        return write_slice(tmp_path, key, name="s", ranked=ranked, coordinates=places).digest

    before = write("a")
    target = places[0] if changed == "coordinates" else getattr(ranked, changed)
    target[1] += 1
    assert write("b") != before


def test_written_slice_is_not_prepared_again(tmp_path, ranked, places):
    write_slice(tmp_path, "k", name="s", ranked=ranked, coordinates=places)

    def blocks():
        pytest.fail("read again")
        yield ranked

    again = write_slice(tmp_path, "k", name="s", ranked=blocks(), coordinates=places)
    assert again.ranked.equals(ranked)


def test_interrupted_writing_leaves_nothing(tmp_path, ranked, places):
    def blocks():
        yield rows(ranked, 0, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_slice(tmp_path, "k", name="s", ranked=blocks(), coordinates=places)
    assert list(tmp_path.iterdir()) == []
    assert open_slice(tmp_path, "k") is None
    write_slice(tmp_path, "k", name="s", ranked=ranked, coordinates=places)
    assert open_slice(tmp_path, "k").ranked.equals(ranked)


def test_slices_without_values_and_without_cells(tmp_path, ranked, places):
    bare = write_slice(tmp_path, "a", name="s", ranked=ranked.without_values(), coordinates=places)
    assert bare.ranked.values is None
    empty = write_slice(tmp_path, "b", name="s", ranked=[], coordinates=np.empty((0, 2)))
    assert empty.n_cells == 0


def test_unfit_input_is_refused(tmp_path, ranked, places):
    def write(**changed):
        given = {"name": "left", "ranked": ranked, "coordinates": places} | changed
        write_slice(tmp_path, "k", **given)

    with pytest.raises(ValueError, match=r"'left' has 5 cells with tokens and 4 coordinates"):
        write(coordinates=places[:4])
    with pytest.raises(ValueError, match=r"'left': coordinates must be finite"):
        write(coordinates=np.full((5, 2), np.nan))
    with pytest.raises(ValueError, match=r"coordinates must be finite and \(n_cells, 2\)"):
        write(coordinates=np.zeros((5, 3)))
    with pytest.raises(ValueError, match="some blocks have values and others have none"):
        write(ranked=[rows(ranked, 0, 3), rows(ranked.without_values(), 3, 5)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "coordinates.npy", "slice.json"])
def test_damaged_slice_says_what_to_do(tmp_path, ranked, places, name):
    write_slice(tmp_path, "k", name="s", ranked=ranked, coordinates=places)
    path = tmp_path / "k" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"damaged .* delete that folder and run again"):
        open_slice(tmp_path, "k")


def cast(path, dtype):
    np.save(path, np.load(path).astype(dtype))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("tokens", np.int64, r"tokens.npy is int64 .*, expected int32"),
        ("values", np.float64, r"values.npy is float64 .*, expected float32"),
        ("offsets", np.int32, r"offsets.npy is int32 .*, expected int64"),
        ("coordinates", np.float32, r"coordinates.npy is float32 .*, expected float64"),
    ],
)
def test_arrays_of_another_type_are_refused(tmp_path, ranked, places, name, dtype, message):
    write_slice(tmp_path, "k", name="s", ranked=ranked, coordinates=places)
    cast(tmp_path / "k" / f"{name}.npy", dtype)
    with pytest.raises(ValueError, match=f"damaged .*{message}"):
        open_slice(tmp_path, "k")


def test_places_that_are_not_finite_are_refused(tmp_path, ranked, places):
    write_slice(tmp_path, "k", name="s", ranked=ranked, coordinates=places)
    np.save(tmp_path / "k" / "coordinates.npy", np.full_like(places, np.nan))
    with pytest.raises(ValueError, match=r"coordinates.npy is not finite"):
        open_slice(tmp_path, "k")


@pytest.mark.parametrize("name", ["tokens", "values", "offsets", "coordinates"])
def test_a_slice_with_a_changed_bit_is_written_again(tmp_path, ranked, places, name):
    options = {"name": "s", "ranked": ranked, "coordinates": places}
    expected = write_slice(tmp_path, "k", **options)
    path = tmp_path / "k" / f"{name}.npy"
    whole = path.read_bytes()
    content = bytearray(whole)
    # Of the middle of the numbers, their lowest bit.
    content[128 + 8] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"The prepared slice .*k is .* It is prepared again"):
        found = write_slice(tmp_path, "k", **options)
    assert path.read_bytes() == whole
    assert found.digest == expected.digest
    assert write_slice(tmp_path, "k", **options).digest == expected.digest


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}"])
@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "coordinates.npy", "slice.json"])
def test_a_slice_with_an_empty_or_missing_file_is_written_again(
    tmp_path, ranked, places, name, content
):
    options = {"name": "s", "ranked": ranked, "coordinates": places}
    expected = write_slice(tmp_path, "k", **options)
    path = tmp_path / "k" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"The prepared slice .*k is .* It is prepared again"):
        assert write_slice(tmp_path, "k", **options).digest == expected.digest


def test_too_many_open_files_are_no_damage(tmp_path, ranked, places, monkeypatch):
    write_slice(tmp_path, "k", name="s", ranked=ranked, coordinates=places)

    def fail(path, *args, **options):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    for owner, name in ((np, "load"), (Path, "read_text"), (Path, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match=r"Too many files are open: .*Nothing is damaged"):
                open_slice(tmp_path, "k")
    assert open_slice(tmp_path, "k").ranked.equals(ranked)


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
    assert corpus.n_tokens == len(whole.tokens)
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


def test_corpus_needs_cells_and_slices_alike(write_corpus):
    with pytest.raises(ValueError, match="needs at least one slice, found none"):
        Corpus(())
    with pytest.raises(ValueError, match=r"1 slices have no cells, for example 'empty-1'"):
        write_corpus([3, 0], names="empty")
    mixed = (*write_corpus([5], values=True, names="a").slices, *write_corpus([5]).slices)
    with pytest.raises(ValueError, match=r"1 of 2 slices have no values, for example 'slice-0'"):
        Corpus(mixed)
