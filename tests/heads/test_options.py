from __future__ import annotations

import sys

import numpy as np
import pytest

from stofm._keys import Obsm
from stofm.heads import options as module
from stofm.heads.options import FitOptions, Reading, check_whole_number
from stofm.heads.sections import resolve_slices

GOOD = {
    "strategy": "frozen",
    "use_rep": "X_pca",
    "split": "auto",
    "seed": np.int64(3),
    "reading": Reading(),
}


def check(adata, library_key="library", **options):
    FitOptions(**{**GOOD, **options}).check(resolve_slices(adata, library_key))


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
        ({"strategy": "some"}, "strategy must be one of"),
        ({"split": "slice"}, r"split must be one of \['auto', .*found 'slice'"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, found -1"),
        ({"seed": 1.0}, "seed must be a whole number from 0 to 4294967295, found 1.0"),
        ({"split": "slices", "library_key": "one"}, "there is a single one; use split='blocks'"),
        ({"strategy": "lora"}, r"tunes a model, and obsm\['X_pca'\] are not embeddings"),
        ({"strategy": "full", "use_rep": (Obsm.X, "X_pca")}, r"obsm\['X_pca'\]"),
    ],
)
def test_options_that_can_not_be(adata, options, message):
    adata.obs["one"] = "slice"
    with pytest.raises(ValueError, match=message):
        check(adata, **options)


@pytest.mark.parametrize("options", [{"split": "blocks"}, {"strategy": "full", "use_rep": Obsm.X}])
def test_places_are_asked_for_where_they_are_needed(adata, options):
    del adata.obsm[Obsm.SPATIAL]
    check(adata)
    with pytest.raises(KeyError, match=r"There is no obsm\['spatial'\]"):
        check(adata, **options)
    # Simulated spots have no place, and the split none of the slices.
    FitOptions(**{**GOOD, "split": "blocks"}).check(None)


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


def test_number_of_networks(monkeypatch):
    monkeypatch.setattr(module, "_MANY_CELLS", 700)
    assert FitOptions().heads_of(700) == 3
    assert FitOptions().heads_of(701) == 1
    assert FitOptions(n_heads=5).heads_of(10**6) == 5
