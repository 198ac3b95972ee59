from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import stofm as st


@pytest.fixture
def tissue(rng):
    """Two slices of 14 x 10 spots; in the left third a first type and gene 0, and gene 1 by height."""
    y, x = np.mgrid[:10, :14].reshape(2, -1)
    counts = rng.poisson(3.0, (280, 7)).astype(np.float32)
    left = np.tile(x < 5, 2)
    counts[left, 0] += 9
    counts[:, 1] += np.tile(3 * y, 2)
    obs = pd.DataFrame(
        {
            "where": pd.Categorical(np.where(left, "west", "east")),
            "type": np.where(left, "A", np.where(rng.random(280) < 0.5, "B", "C")),
            "slice": np.repeat(["s1", "s2"], 140),
        },
        index=[f"cell{k}" for k in range(280)],
    )
    var = pd.DataFrame(index=[f"gene{k}" for k in range(7)])
    xy = np.tile(np.stack([x, y], axis=1), (2, 1)).astype(float)
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var, obsm={"spatial": xy})


def describe(adata, **options):
    usual = {"label_key": "type", "library_key": "slice"}
    return st.tl.describe(adata, "where", **(usual | options))


def test_facts(tissue):
    before = tissue.copy()
    found = describe(tissue, n_genes=3)
    west = found.regions["west"]
    assert list(found.regions) == ["east", "west"]
    assert west["n_cells"] == 100
    assert west["share"] == pytest.approx(100 / 280)
    assert [row["slice"] for row in west["slices"]] == ["s1", "s2"]
    assert all(row["n_pieces"] == 1 and row["n_cells"] == 50 for row in west["slices"])
    assert west["composition"] == [
        {"type": "A", "share": 1.0, "over_all": pytest.approx(2.8)},
    ]
    assert west["neighbors"] == [
        {"region": "east", "share": 1.0, "over_expected": pytest.approx(1.0)}
    ]
    assert west["markers"][0]["gene"] == "gene0"
    assert west["markers"][0]["log2_fold_change"] > 1
    assert west["spatially_variable_genes"][0]["gene"] == "gene1"
    assert west["spatially_variable_genes"][0]["morans_i"] > 0.3
    assert west["agreement"] > 0.8
    assert 0.7 < west["contiguity"] < 1
    assert (tissue.X != before.X).nnz == 0
    assert list(tissue.obs) == list(before.obs)
    assert not tissue.uns


def test_report(tissue):
    found = describe(tissue, gene_sets={"heights": ["gene0", "gene6"], "other": ["gene3"]})
    text = found.to_markdown()
    assert str(found) == found._repr_markdown_() == text
    assert "## Region west" in text
    assert "| gene0 |" in text
    assert "| heights | gene0 |" in text
    again = json.loads(found.to_json())
    assert again["regions"] == found.regions
    assert again["about"]["n_slices"] == 2
    assert "findings" in again["about"]["notes"][-1]


def test_order_of_cells_does_not_matter(tissue, rng):
    order = rng.permutation(280)
    first, second = (describe(one).to_json() for one in (tissue, tissue[order].copy()))
    flat = [pd.json_normalize(json.loads(one)["regions"]["west"]) for one in (first, second)]
    assert flat[0]["n_cells"].equals(flat[1]["n_cells"])
    for name in ("markers", "neighbors", "spatially_variable_genes"):
        left, right = (pd.DataFrame(one[name][0]) for one in flat)
        pd.testing.assert_frame_equal(left, right, rtol=1e-4)


def test_proportions_and_cells_without_a_region(tissue):
    shares = pd.DataFrame({"A": 0.25, "B": 0.75}, index=tissue.obs_names)
    tissue.obsm["stofm_deconvolution"] = shares
    tissue.obs.loc[tissue.obs_names[:7], "where"] = np.nan
    found = st.tl.describe(tissue[:140], "where")
    assert found.about["label_key"] == "stofm_deconvolution"
    assert found.regions["east"]["composition"][0]["share"] == 0.75
    assert found.regions["east"]["agreement"] is None
    assert sum(one["n_cells"] for one in found.regions.values()) == 133
    assert tissue.obs["where"].isna().sum() == 7


def test_a_region_of_one_cell(tissue):
    tissue.obs["where"] = np.where(np.arange(280) == 9, "alone", "rest")
    found = describe(tissue, label_key=None)
    alone = found.regions["alone"]
    assert (alone["n_cells"], alone["markers"], alone["composition"]) == (1, [], [])
    assert "## Region alone" in found.to_markdown()
    assert json.loads(found.to_json())


def test_a_table_of_gene_sets(tissue):
    sets = pd.DataFrame({"source": ["s", "s", "t"], "target": ["gene0", "gene2", "gene5"]})
    (found,) = describe(tissue, gene_sets=sets, n_genes=1).regions["west"]["gene_sets"]
    # One marker of 7 genes, of which 2 are in the set.
    assert (found["set"], found["genes"], found["n_measured"]) == ("s", ["gene0"], 2)
    assert found["p"] == pytest.approx(2 / 7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groupby": "stofm_domain"}, KeyError, r"no obs\['stofm_domain'\]: st.tl.domains"),
        ({"groupby": "empty"}, ValueError, "No cell has a region"),
        ({"label_key": "kind"}, KeyError, r"no obs\['kind'\] with cell types, nor an obsm"),
        ({"gene_sets": {"s": ["TP53"]}}, ValueError, r"such as \['TP53'\], is in var_names"),
        ({"gene_sets": ["TP53"]}, TypeError, "a dict of lists of genes"),
        ({"gene_sets": pd.DataFrame({"a": [1]})}, TypeError, "'source' and 'target'"),
        ({"n_genes": 0}, ValueError, "n_genes must be a whole number"),
    ],
)
def test_messages(tissue, options, error, message):
    tissue.obs["empty"] = np.nan
    usual = {"groupby": "where", "library_key": "slice"}
    with pytest.raises(error, match=message):
        st.tl.describe(tissue, **(usual | options))


def test_spatialdata(tissue):
    from spatialdata import SpatialData

    sdata = SpatialData(tables={"table": tissue})
    assert describe(sdata).to_json() == describe(tissue).to_json()
