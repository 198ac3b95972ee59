"""What a call asks of a head: slices and options."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import stofm as st
from stofm._keys import Obsm
from stofm.heads.request import (
    HeadOptions,
    Request,
    check_whole_number,
    resolve_slices,
)


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


def check(adata, library_key="library", use_rep="X_pca", **options):
    request = Request(use_rep=use_rep, seed=np.int64(3), options=HeadOptions(**options))
    request.check(resolve_slices(adata, library_key))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split": "slices"},
        {"split": "blocks"},
        {"strategy": "full", "use_rep": (Obsm.X_CELL, Obsm.X)},
        {"strategy": "lora", "use_rep": Obsm.X},
    ],
)
def test_usable_options(adata, options):
    check(adata, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "slices", "library_key": "one"}, "there is a single one; use split='blocks'"),
        ({"strategy": "lora"}, r"tunes a model, and obsm\['X_pca'\] are not embeddings"),
        ({"strategy": "full", "use_rep": (Obsm.X, "X_pca")}, r"obsm\['X_pca'\]"),
    ],
)
def test_what_does_not_go_together(adata, options, message):
    adata.obs["one"] = "slice"
    with pytest.raises(ValueError, match=message):
        check(adata, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strategy": "some"},
            r"strategy must be one of \['frozen', 'lora', 'full'\], found 'some",
        ),
        ({"split": "slice"}, r"split must be one of \['auto', .*found 'slice'"),
        ({"class_weights": "equal"}, r"class_weights must be one of \[None, 'balanced'\]"),
        ({"reject_rate": 1.0}, "reject_rate must be from 0 to below 1, found 1.0"),
        ({"min_share": -0.1}, "min_share must be from 0 to below 1, found -0.1"),
        ({"n_neighbors": -1}, "n_neighbors must be a whole number of at least 0, found -1"),
        ({"n_neighbors": 2.5}, "n_neighbors must be a whole number"),
        ({"n_components": -1}, "n_components must be a whole number of at least 0, found -1"),
        ({"n_components": "5"}, "n_components must be a whole number"),
    ],
)
def test_options_that_can_not_be(options, message):
    with pytest.raises(ValueError, match=message):
        st.tl.HeadOptions(**options)


@pytest.mark.parametrize("seed", [-1, 1.0])
def test_seeds_that_can_not_be(seed):
    with pytest.raises(ValueError, match=f"seed must be a whole number from 0 to .* found {seed}"):
        Request(seed=seed)


def test_options_are_of_their_kind():
    with pytest.raises(TypeError, match=r"options must be st\.tl\.HeadOptions\(.* found dict"):
        Request(options={"split": "blocks"})


@pytest.mark.parametrize("options", [{"split": "blocks"}, {"strategy": "full", "use_rep": Obsm.X}])
def test_places_are_asked_for_where_they_are_needed(adata, options):
    del adata.obsm[Obsm.SPATIAL]
    check(adata)
    with pytest.raises(KeyError, match=r"There is no obsm\['spatial'\]"):
        check(adata, **options)


def test_low_rank_needs_peft(adata, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    check(adata, strategy="full", use_rep=Obsm.X)
    with pytest.raises(ImportError, match=r"pip install 'stofm\[lora\]'"):
        check(adata, strategy="lora", use_rep=Obsm.X)


@pytest.mark.parametrize("value", [0, -2, 1.5, 2.0, "3", None])
def test_whole_numbers(value):
    check_whole_number("n", 1, least=1)
    check_whole_number("n", np.int32(7), least=1)
    with pytest.raises(ValueError, match="n must be a whole number of at least 1, found"):
        check_whole_number("n", value, least=1)


def test_representations():
    assert Request(use_rep="X").reps == ("X",)
    assert Request(use_rep=["X", "Y"]).reps == ("X", "Y")
    for reps in ((), ("X", "X")):
        with pytest.raises(ValueError, match="each once"):
            Request(use_rep=reps)
