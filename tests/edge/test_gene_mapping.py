from __future__ import annotations

import logging

import anndata
import numpy as np
import pandas as pd
import pytest

from stofm._edge.gene_mapping import ids_and_symbols, kinds_of_others, names_by_source
from stofm._keys import Var

N = 12


def make(**columns: object) -> anndata.AnnData:
    names = [f"ABC{k}" for k in range(N)]
    return anndata.AnnData(np.ones((2, N)), var=pd.DataFrame(columns, index=names))


@pytest.mark.parametrize(
    ("column", "kinds"),
    [
        ("feature_types", ["Gene Expression", "Antibody Capture"]),
        ("feature_type", ["gene_expression", "Custom"]),
        ("what it is", ["Gene Expression", "Negative Control Probe"]),
        ("modality", ["rna", "prot"]),
        ("modality", ["rna", "atac"]),
        ("CodeClass", ["Endogenous", "Negative"]),
        ("kind", ["gene", "blank"]),
        ("kind", ["GEX", "ADT"]),
    ],
)
@pytest.mark.parametrize("as_type", [None, "category"])
def test_columns_that_are_no_genes(
    column: str, kinds: list[str | bool], as_type: str | None
) -> None:
    values = pd.Series([kinds[0]] * 8 + [kinds[1]] * 4).to_numpy()
    if values.dtype == object:
        values = pd.array(values, dtype=as_type or object)
    found = kinds_of_others(make(**{column: values}))
    assert found.tolist() == [""] * 8 + [kinds[1]] * 4


@pytest.mark.parametrize(
    ("column", "kinds"),
    [
        ("feature_types", ["Gene Expression"]),
        ("feature_types", ["Gene Expression", None]),
        ("gene_type", ["gene", "pseudogene"]),
        ("gene_biotype", ["protein_coding", "lncRNA", "TEC"]),
        ("biotype", ["mRNA", "Mt_rRNA", "IG_V_gene"]),
        ("kind", ["Endogenous", "Housekeeping"]),
        ("genome", ["GRCh38", "mm10"]),
        ("direction", ["positive", "negative"]),
        ("category", ["marker", "control"]),
        ("highly_variable", [True, False]),
        ("score", [0.5, 1.5]),
        ("gene", [f"ABC{k}" for k in range(N)]),
    ],
)
def test_columns_that_do_not_tell_genes_apart(column: str, kinds: list) -> None:
    assert not kinds_of_others(make(**{column: np.resize(np.array(kinds), N)})).any()


def test_kinds_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    kinds = ["Gene Expression"] * 7 + ["Antibody Capture"] * 3 + ["Custom"] * 2
    with caplog.at_level(logging.INFO, logger="stofm"):
        ids_and_symbols(make(feature_types=kinds))
    assert caplog.messages == [
        "5 of 12 columns are not genes and are left out (3 Antibody Capture, 2 Custom)."
    ]


def test_columns_that_may_hold_names() -> None:
    adata = make(
        any_name=[f"GENE{k}" for k in range(N)],
        coded=[f"s{k}".encode() for k in range(N)],
        ids=pd.Categorical([None, *(f"ENSG{k:011d}" for k in range(N - 1))]),
        few=["chr1", "chr2"] * 6,
        number=[str(k) for k in range(N)],
        text=[f"a gene that does {k}" for k in range(N)],
        length=np.arange(N),
        feature_types=["Gene Expression"] * 11 + ["Custom"],
    )
    adata.var[Var.GENE] = [f"ENSG{k:011d}" for k in range(N)]
    sources = names_by_source(adata)
    assert list(sources) == ["ids", "any_name", "coded", "var_names"]
    assert sources["coded"] == [*(f"s{k}" for k in range(11)), ""]
    assert sources["ids"][:2] == ["", "ENSG00000000000"]
    assert all(names[-1] == "" for names in sources.values())
    assert ids_and_symbols(adata) == (sources["ids"], sources["var_names"])
