"""Tables of cells, and the slices in them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from stofm.heads.request import resolve_slices


@pytest.fixture
def pair(adata):
    """The left and the right slice as an AnnData each."""
    return [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]


def test_one_several_and_named(adata, pair):
    one = resolve_slices(adata, "library")
    assert one.as_given() is adata
    assert one.names == ["left", "right"]
    several = resolve_slices(pair, None)
    assert several.as_given() == pair
    assert several.names == ["0", "1"]
    assert several.n_obs == 184
    assert [rows[0] for rows in several.rows] == [0, 101]
    assert several.places == [slice(0, 101), slice(101, 184)]
    named = resolve_slices({"a": pair[0], "b": pair[1]}, "library")
    assert named.names == ["a:left", "b:right"]
    assert named.as_given()["b"] is pair[1]
    assert named.copied().as_given()["b"] is not pair[1]


def test_spatialdata(adata):
    data = SimpleNamespace(tables={"cells": adata})
    assert resolve_slices(data, "library").tables == (adata,)


def test_coordinates_tell_several_slices_apart(adata, pair):
    with pytest.raises(ValueError, match=r"Pass library_key='library'"):
        resolve_slices(adata[np.argsort(adata.obs["library"])].copy())
    with pytest.raises(ValueError, match="some are the same"):
        resolve_slices([adata, adata], "library")
    with pytest.raises(ValueError, match="list of AnnData is empty"):
        resolve_slices([])
    with pytest.raises(ValueError, match="has no cells"):
        resolve_slices([pair[0], pair[1][:0]])
    with pytest.raises(TypeError, match="Expected an AnnData"):
        resolve_slices([3])


def test_rows_and_their_tables(pair):
    sections = resolve_slices(pair)
    assert sections.tables_of(np.array([0, 100])) == [0]
    assert sections.tables_of(np.array([101, 100])) == [0, 1]
