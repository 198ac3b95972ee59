from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

import stofm as st


@pytest.fixture
def model(responsive_model):
    return responsive_model


@pytest.fixture
def screen(adata, model):
    def call(*args, data=adata, **options):
        given = {"model": model, "library_key": "library", "null": 5, **options}
        return st.tl.screen(data, *args, **given)

    return call


def test_a_screen_ranks_what_single_edits_give(adata, model, screen):
    names = adata.var_names[:6].tolist()
    options = {"cells": "kind == '1'"}
    table = screen(names, **options)
    assert sorted(table.index) == sorted(names)
    assert (np.diff(table["z"]) <= 0).all()
    one = st.tl.perturb(
        adata, genes={names[2]: "delete"}, model=model, library_key="library", null=0, **options
    )
    assert table.loc[names[2], "effect"] == pytest.approx(one.overall["effect"])
    assert table.loc[names[2], "n_cells"] == one.overall["n_edited"]


def test_few_genes_are_compared_with_others_too(adata, model, screen):
    name = adata.var_names[3]
    table = screen([name], null=7)
    one = st.tl.perturb(adata, genes={name: "delete"}, model=model, library_key="library", null=7)
    for column in ("effect", "null_mean", "null_std", "z", "p", "fdr", "n_null"):
        assert table.loc[name, column] == pytest.approx(one.genes.loc[name, column])


def test_expressed_genes_are_screened_by_default(adata, screen):
    table = screen(null=0)
    share = (adata.X.toarray() > 0).mean(axis=0)
    expected = {name for name, one in zip(adata.var_names[:67], share, strict=False) if one > 0.05}
    # The model of the tests reads the first forty genes of a cell.
    assert set(table.index) <= expected
    assert len(table) > 40
    assert table["p"].isna().all()
    assert (np.diff(table["effect"]) <= 0).all()


def test_a_table_of_spatialdata(adata, screen):
    SpatialData = pytest.importorskip("spatialdata").SpatialData
    sdata = SpatialData(tables={"table": adata.copy()})
    names = adata.var_names[:3].tolist()
    assert screen(names, data=sdata, null=2).equals(screen(names, null=2))


def test_genes_outside_the_input_have_no_rank(adata, screen):
    counts = adata.X.toarray()
    counts[:, 6] = 0
    adata.X = sparse.csr_matrix(counts)
    table = screen(adata.var_names[4:8].tolist())
    assert table.index[-1] == adata.var_names[6]
    assert table["status"].tolist() == ["tested"] * 3 + ["not_in_input"]
    assert table["fdr"].isna().tolist() == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("genes", "options", "message"),
    [
        ("all", {}, "genes must be 'expressed' or a list of names, found 'all'"),
        ([], {}, "There is no gene to screen"),
        ("expressed", {"edit": "silence"}, "edit must be one of"),
    ],
)
def test_messages(screen, genes, options, message):
    with pytest.raises(ValueError, match=message):
        screen(genes, **options)
