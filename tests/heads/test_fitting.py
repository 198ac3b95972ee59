from __future__ import annotations

import numpy as np
import pytest

from stofm.heads.fitting import plan_split
from stofm.heads.sections import resolve_slices


def plan(adata, known=None, library_key="library", **options):
    sections = resolve_slices(adata, library_key)
    known = np.ones(adata.n_obs, dtype=bool) if known is None else known
    features = np.random.default_rng(1).random((adata.n_obs, 3)).astype(np.float32)
    return plan_split(
        sections, known, features, **({"spatial_key": "spatial", "seed": 0} | options)
    )


def test_only_cells_with_a_target_are_split(adata, rng):
    known = rng.random(184) < 0.5
    for options in ({}, {"split": "blocks"}):
        split = plan(adata, known, **options)
        parts = (split.fitted, split.held_out, split.left_out)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.flatnonzero(known))


def test_split_by_slice_or_block(adata):
    assert plan(adata).how == "blocks"
    assert plan(adata, split="slices").how == "slices"
    adata.obs["quarter"] = np.arange(184) % 4
    assert plan(adata, library_key="quarter").how == "slices"
    # A slice without a target does not count.
    known = (adata.obs["quarter"] != 3).to_numpy()
    assert plan(adata, known, library_key="quarter").how == "blocks"


def test_without_coordinates(adata, caplog):
    caplog.set_level("INFO", logger="stofm")
    del adata.obsm["spatial"]
    assert plan(adata, library_key=None).how == "random"
    assert "the split is 'random'" in caplog.text
    assert plan(adata).how == "slices"
    with pytest.raises(KeyError, match="no obsm"):
        plan(adata, library_key=None, split="blocks")


def test_whole_slices_of_which_one_has_known_cells(adata):
    known = (adata.obs["library"] == "left").to_numpy()
    with pytest.raises(ValueError, match=r"split='slices' .* 1 of the 2 slices has cells to learn"):
        plan(adata, known, split="slices")


def test_unknown_rule(adata):
    with pytest.raises(ValueError, match="how must be one of"):
        plan(adata, split="rows")
