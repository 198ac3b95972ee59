"""Slices with the keys that sub-slices and an embedding leave behind."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp


@pytest.fixture
def adata(rng: np.random.Generator) -> ad.AnnData:
    """Two slices of 53 and 41 cells, in an order that mixes them."""
    n_obs, n_vars = 94, 7
    slide = np.array(["b"] * 53 + ["a"] * 41)
    order = rng.permutation(n_obs)
    counts = rng.poisson(0.8, (n_obs, n_vars)).astype(np.int32)
    adata = ad.AnnData(
        sp.csr_matrix(counts),
        obs=pd.DataFrame(
            {
                "slide": pd.Categorical(slide[order]),
                "kind": pd.Categorical.from_codes(np.arange(n_obs) % 3, ["z", "y", "x"]),
                "partial": pd.Categorical.from_codes(np.arange(n_obs) % 4 - 1, ["p", "q", "r"]),
                "score": np.where(np.arange(n_obs) % 9 == 0, np.nan, rng.random(n_obs)),
                "flag": np.arange(n_obs) % 2 == 0,
            },
            index=[f"cell{i}" for i in range(n_obs)],
        ),
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(n_vars)]),
        obsm={"spatial": rng.uniform(0, 100, (n_obs, 2)) * [2.0, 1.0]},
    )
    adata.layers["double"] = adata.X * 2
    return adata


@pytest.fixture
def laid_out(adata: ad.AnnData) -> ad.AnnData:
    """The same with sub-slices (quadrants of a slice) and virtual cells (its two halves)."""
    places = adata.obsm["spatial"] - [100.0, 50.0]
    is_b = (adata.obs["slide"] == "b").to_numpy()
    quadrant = (places[:, 0] > 0) + 2 * (places[:, 1] > 0) + 4 * is_b
    half = (places[:, 0] > 0) + 2 * is_b
    adata.obsm["stofm_spatial"] = places / np.hypot(200, 100) * 100
    adata.obs["stofm_subslice"] = pd.Categorical(quadrant.astype(str))
    adata.obs["stofm_virtual_cell"] = pd.Categorical(half.astype(str))
    means = [adata.obsm["stofm_spatial"][half == number].mean(axis=0) for number in range(4)]
    adata.uns["stofm"] = {
        "subslice": {
            "coordinates": np.array(means),
            "features": np.zeros((4, 3), dtype=np.float32),
            "slice": np.array(["a", "a", "b", "b"]),
            "n_cells": np.bincount(half),
            "params": {"library_key": "slide", "spatial_key": "spatial"},
            "version": "0.1.0",
        }
    }
    return adata
