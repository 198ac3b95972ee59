from __future__ import annotations

import pandas as pd
import pytest

import stofm as st

READING = {"library_key": "library", "show_progress_bar": False}


@pytest.fixture
def resource(adata) -> pd.DataFrame:
    genes = adata.var_names
    adata.var["symbol"] = [f"S{k}" for k in range(adata.n_vars)]
    return pd.DataFrame({"ligand": [*genes[:5], "none"], "receptor": [*genes[5:10], genes[0]]})


def test_a_row_for_each_pair_of_genes(adata, model, resource) -> None:
    before = adata.copy()
    table = st.tl.ligand_receptor(adata, resource=resource, model=model, min_pairs=1, **READING)
    columns = ["source", "target", "ligand_complex", "receptor_complex", "strength", "expected"]
    assert table.columns.tolist() == [*columns, "z", "FDR", "n_pairs"]
    assert set(table["source"]) == {"all"}
    assert 1 <= len(table) <= 5
    assert set(table["ligand_complex"]) <= set(resource["ligand"])
    assert adata.obs.equals(before.obs)
    again = st.tl.ligand_receptor(adata, resource=resource, model=model, min_pairs=1, **READING)
    pd.testing.assert_frame_equal(table, again)


def test_by_type_and_by_another_name(adata, model, resource) -> None:
    symbols = dict(zip(adata.var_names, adata.var["symbol"], strict=True))
    table = st.tl.ligand_receptor(
        adata,
        resource=resource.replace(symbols),
        gene_symbols="symbol",
        groupby="kind",
        model=model,
        min_pairs=1,
        **READING,
    )
    assert set(table["source"]) <= {"0", "1", "2"}
    assert table["ligand_complex"].str.startswith("S").all()
    plain = st.tl.ligand_receptor(
        adata, resource=resource, groupby="kind", model=model, min_pairs=1, **READING
    )
    assert table["n_pairs"].sum() == plain["n_pairs"].sum()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gene_symbols": "name"}, KeyError, r"no var\['name'\]"),
        ({"groupby": "types"}, KeyError, r"no obs\['types'\]"),
        ({"min_pairs": 10**6}, ValueError, "none is expressed by 1000000 pairs.*lower `min_pairs`"),
        ({"n_max": 0}, ValueError, "n_max must be a whole number"),
    ],
)
def test_messages(adata, model, resource, options, error, message) -> None:
    with pytest.raises(error, match=message):
        st.tl.ligand_receptor(adata, resource=resource, model=model, **options, **READING)


def test_a_table_of_spatialdata(adata, model, resource) -> None:
    SpatialData = pytest.importorskip("spatialdata").SpatialData
    sdata = SpatialData(tables={"table": adata.copy()})
    options = {"resource": resource, "model": model, "n_max": 40, "min_pairs": 1, **READING}
    expected, found = (st.tl.ligand_receptor(one, **options) for one in (adata, sdata))
    pd.testing.assert_frame_equal(found, expected)
