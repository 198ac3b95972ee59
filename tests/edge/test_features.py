from __future__ import annotations

import logging

import anndata
import numpy as np
import pandas as pd
import pytest

from stofm._edge.features import gene_name_sources, gene_names, read_features
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
        ("is_gene", [True, False]),
        ("is_control", [False, True]),
        ("control_probe", [False, True]),
    ],
)
@pytest.mark.parametrize("as_type", [None, "category"])
def test_columns_that_are_no_genes(
    column: str, kinds: list[str | bool], as_type: str | None
) -> None:
    values = pd.Series([kinds[0]] * 8 + [kinds[1]] * 4).to_numpy()
    if values.dtype == object:
        values = pd.array(values, dtype=as_type or object)
    features = read_features(make(**{column: values}))
    assert features.is_gene.tolist() == [True] * 8 + [False] * 4
    assert features.others == {column: {str(kinds[1]): 4}}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Gene", "CITE"),
        ("mRNA", "Ab"),
        ("expression", "surface"),
        ("Gene Expression", None),
        ("Gene Expression", np.nan),
        ("Gene Expression", ""),
        ("Gene Expression", "None"),
    ],
)
@pytest.mark.parametrize("as_type", [None, "category"])
def test_namesakes_of_genes_are_no_genes(first: str, second: object, as_type: str | None) -> None:
    kinds = pd.Series([second] * 4 + [first] * 8, dtype=object)
    adata = make(kind=kinds.astype(as_type or object).to_numpy())
    if as_type:
        adata.var["kind"] = adata.var["kind"].astype(as_type)
    assert read_features(adata).is_gene.all()
    # One of the four has a name of its own.
    adata.var_names = [*(f"ABC{k}" for k in (4, 5, 6, 3)), *(f"ABC{k}" for k in range(4, N))]
    features = read_features(adata)
    assert features.is_gene.tolist() == [False] * 4 + [True] * 8
    kind = str(second) if second in ("CITE", "Ab", "surface") else "(none)"
    assert features.others == {"kind": {kind: 4}}


@pytest.mark.parametrize("kinds", [["coding gene", "TEC"], ["GRCh38", "mm10"], ["yes", None]])
def test_features_of_one_name_that_may_be_genes(kinds: list[str | None]) -> None:
    adata = make(kind=np.array([kinds[0]] * 8 + [kinds[1]] * 4))
    adata.var_names = [*adata.var_names[:8], "ABC0", "ABC1", "ABC10", "ABC11"]
    assert read_features(adata).is_gene.all()


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
    assert read_features(make(**{column: np.resize(np.array(kinds), N)})).is_gene.all()


def test_kinds_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    kinds = ["Gene Expression"] * 7 + ["Antibody Capture"] * 3 + ["Custom"] * 2
    with caplog.at_level(logging.INFO, logger="stofm"):
        gene_names(make(feature_types=kinds))
    assert caplog.messages == [
        "5 of 12 columns are no genes and are left out (var['feature_types']: 3 Antibody Capture, "
        "2 Custom)."
    ]


def test_no_genes_at_all() -> None:
    with pytest.raises(ValueError, match=r"no genes.*\(var\['feature_types'\]: 12 Antibody Capt"):
        read_features(make(feature_types=["Antibody Capture"] * N))


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
    sources = gene_name_sources(adata)
    assert list(sources) == ["ids", "any_name", "coded", "var_names"]
    assert sources["coded"] == [*(f"s{k}" for k in range(11)), ""]
    assert sources["ids"][:2] == ["", "ENSG00000000000"]
    assert all(names[-1] == "" for names in sources.values())
    assert gene_names(adata) == (sources["ids"], sources["var_names"])
