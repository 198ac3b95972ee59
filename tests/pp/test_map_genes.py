from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from stofm import pp
from stofm._edge.tables import read_record
from stofm._keys import Var
from stofm.genes import GeneVocabulary, embedded_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

N_GENES = 11


@pytest.fixture
def vocabulary() -> GeneVocabulary:
    return GeneVocabulary(
        gene_ids=np.array([f"ENSG{i:011d}" for i in range(N_GENES)]),
        symbols=np.array([f"ABC{i}" for i in range(N_GENES)]),
        tokens=np.arange(2, N_GENES + 2, dtype=np.int32),
        medians=np.linspace(0.5, 3, N_GENES),
        special={"pad": 0, "mask": 1, "cls": N_GENES + 2},
    )


@pytest.fixture
def adata(rng: np.random.Generator) -> anndata.AnnData:
    counts = sparse.csr_matrix(rng.poisson(1.0, size=(17, 13)))
    names = [*(f"ABC{i}" for i in range(N_GENES)), "XYZ1", "XYZ2"]
    return anndata.AnnData(counts, var=pd.DataFrame(index=names))


def test_what_is_written(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> None:
    assert pp.map_genes(adata, vocabulary=vocabulary) is None
    assert adata.var[Var.GENE].tolist() == [*vocabulary.gene_ids, "", ""]
    assert adata.var[Var.TOKEN_ID].tolist() == [*range(2, N_GENES + 2), -1, -1]
    assert adata.var[Var.TOKEN_ID].dtype == np.int32
    for key in (Var.GENE, Var.TOKEN_ID):
        record = read_record(adata, key)
        assert record is not None
        assert record["vocabulary"] == vocabulary.fingerprint
        assert record["params"] == {
            "species": "auto",
            "gene_key": "",
            "orthologs": "",
            "source": "var_names",
            "fallback": "",
        }


def test_report_is_logged(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    kept = adata.X[:, :N_GENES].sum() / adata.X.sum()
    with caplog.at_level(logging.INFO, logger="stofm"):
        pp.map_genes(adata, vocabulary=vocabulary)
    assert f"11 of 13 genes matched, {kept:.1%} of the counts" in caplog.text
    assert "for example: XYZ" in caplog.text


def test_report_does_without_counts(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    adata.X = adata.X * 0.3
    with caplog.at_level(logging.INFO, logger="stofm"):
        pp.map_genes(adata, vocabulary=vocabulary)
    assert "11 of 13 genes matched; species" in caplog.text


def test_copy(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> None:
    copied = pp.map_genes(adata, vocabulary=vocabulary, copy=True)
    assert copied is not None
    assert Var.GENE in copied.var
    assert Var.GENE not in adata.var
    assert not adata.uns


def test_best_column_is_taken_and_filled_up(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    ids = [f"ENSG{i:011d}.3" for i in range(13)]
    adata.var["score"] = np.arange(13.0)
    adata.var["gene_ids"] = [*ids[:9], None, np.nan, *ids[11:]]
    adata.var["feature_name"] = pd.Categorical([f"ABC{i}" if i < 4 else None for i in range(13)])
    adata.var_names = [f"ABC{i}" if i in (9, 10, 2, 3) else f"N{i}" for i in range(13)]
    pp.map_genes(adata, vocabulary=vocabulary)
    # Neither column knows genes 9 and 10 of the best one; the second best is used for them.
    assert adata.var[Var.TOKEN_ID].tolist()[:9] == list(range(2, 11))
    record = read_record(adata, Var.GENE)
    assert record is not None
    assert record["params"]["source"] == "gene_ids"


def test_missing_ids_are_looked_up_by_name(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    adata.var["ensembl_id"] = [*vocabulary.gene_ids, "ENSG99999999998", None]
    adata.var.loc["ABC4", "ensembl_id"] = np.nan
    adata.var.loc["ABC5", "ensembl_id"] = "ENSG99999999999"
    adata.var_names = [*adata.var_names[:10], "N10", "N11", "N12"]
    pp.map_genes(adata, vocabulary=vocabulary)
    assert adata.var[Var.TOKEN_ID].tolist() == [*range(2, N_GENES + 2), -1, -1]
    record = read_record(adata, Var.GENE)
    assert record is not None
    assert record["params"]["fallback"] in ("var_names", "ensembl_id")


def test_gene_key_settles_the_column(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> None:
    adata.var["mine"] = vocabulary.gene_ids[[*range(10, -1, -1), 0, 0]]
    with pytest.warns(UserWarning, match="columns of genes that another column before them"):
        pp.map_genes(adata, vocabulary=vocabulary, gene_key="mine")
    assert adata.var[Var.GENE].tolist() == adata.var["mine"].tolist()
    with pytest.raises(KeyError, match=r"adata.var has no column 'yours'; it has \['mine'"):
        pp.map_genes(adata, vocabulary=vocabulary, gene_key="yours")


def test_species_and_orthologs(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> None:
    mouse = [f"ENSMUSG{i:011d}" for i in range(13)]
    adata.var_names = mouse
    pairs = dict(zip(mouse, vocabulary.gene_ids, strict=False))
    pp.map_genes(adata, vocabulary=vocabulary, orthologs=pairs)
    assert adata.var[Var.TOKEN_ID].tolist() == [*range(2, N_GENES + 2), -1, -1]
    record = read_record(adata, Var.GENE)
    assert record is not None
    assert record["params"]["orthologs"] == "mapping"
    with pytest.raises(ValueError, match=r"Found 13 mouse Ensembl ids \(species: mouse\)"):
        pp.map_genes(adata, vocabulary=vocabulary, orthologs=pairs, species="human")


def test_ortholog_table(adata: anndata.AnnData, vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    table = tmp_path / "pairs.tsv"
    rows = [f"ENSMUSG{i:011d}\t{gene}\n" for i, gene in enumerate(vocabulary.gene_ids)]
    table.write_text("mouse_ensembl_id\thuman_ensembl_id\n" + "".join(rows))
    adata.var_names = [f"ENSMUSG{i:011d}" for i in range(13)]
    pp.map_genes(adata, vocabulary=vocabulary, orthologs=table)
    record = read_record(adata, Var.GENE)
    assert record is not None
    assert record["params"]["orthologs"] == str(table)


def test_mouse_symbols_with_the_embedded_vocabulary(rng: np.random.Generator) -> None:
    names = ["Gfap", "Mbp", "Slc17a7", "Plp1", "Gad1", "ENSMUSG00000020932.3", "Nothing1"]
    adata = anndata.AnnData(rng.poisson(1.0, size=(5, 7)), var=pd.DataFrame(index=names))
    adata.X[:, 5] = 0
    pp.map_genes(adata)
    vocabulary = embedded_vocabulary()
    symbols = ["GFAP", "MBP", "SLC17A7", "PLP1", "GAD1", "GFAP"]
    rows = [vocabulary.rows_by_name[symbol] for symbol in symbols]
    assert adata.var[Var.GENE].tolist() == [*vocabulary.gene_ids[rows], ""]


def test_a_model_may_take_the_place_of_its_vocabulary(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    class Model:
        def __init__(self) -> None:
            self.vocabulary = vocabulary

    pp.map_genes(adata, vocabulary=Model())
    assert (adata.var[Var.TOKEN_ID] >= 0).sum() == N_GENES
    with pytest.raises(TypeError, match=r"Expected a GeneVocabulary or a model .* found str"):
        pp.map_genes(adata, vocabulary="stofm-mini")


def test_nothing_is_written_when_too_little_matches(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    adata.var_names = [f"zgene_{i}" for i in range(13)]
    with pytest.raises(ValueError, match=r"Only 0 of 13 genes .*'zgene_.*Pass `gene_key`"):
        pp.map_genes(adata, vocabulary=vocabulary)
    assert adata.var.columns.empty
    assert not adata.uns


def test_empty(vocabulary: GeneVocabulary) -> None:
    for shape, what in (((0, 3), "cells"), ((3, 0), "genes")):
        with pytest.raises(ValueError, match=f"The AnnData has no {what}"):
            pp.map_genes(anndata.AnnData(np.ones(shape)), vocabulary=vocabulary)


def test_table_of_a_spatialdata(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> None:
    class SpatialData:
        def __init__(self, **tables: Any) -> None:
            self.tables = tables

    pp.map_genes(SpatialData(table=adata), vocabulary=vocabulary)
    assert Var.GENE in adata.var
    with pytest.raises(KeyError, match="table_key"):
        pp.map_genes(SpatialData(a=adata, b=adata), vocabulary=vocabulary)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_round_trip(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, tmp_path: Path, suffix: str
) -> None:
    adata.obs_names = [f"cell{i}" for i in range(17)]
    pp.map_genes(adata, vocabulary=vocabulary)
    path = tmp_path / f"slice{suffix}"
    if suffix == ".zarr":
        adata.write_zarr(path)
        back = anndata.read_zarr(path)
    else:
        adata.write_h5ad(path)
        back = anndata.read_h5ad(path)
    assert back.var[Var.GENE].tolist() == adata.var[Var.GENE].tolist()
    assert back.var[Var.TOKEN_ID].dtype == np.int32
    assert read_record(back, Var.GENE) == read_record(adata, Var.GENE)


def test_real_slices_match_by_symbols_and_by_ids(shared: Path) -> None:
    least = {"starmap_mpfc_BZ5": 0.9, "her2st_C1": 0.97, "osmfish_sscortex": 1.0}
    for name, share in least.items():
        adata = anndata.read_h5ad(shared / "data" / f"{name}.h5ad")
        counts = np.asarray(adata.X.sum(axis=0)).ravel()
        for key in ("ensembl_id", "symbol"):
            adata.var["symbol"] = adata.var_names
            mapped = pp.map_genes(adata, gene_key=key, copy=True)
            assert mapped is not None
            known = (mapped.var[Var.TOKEN_ID] >= 0).to_numpy()
            assert counts[known].sum() / counts.sum() >= share


@pytest.mark.parametrize("column", ["features", "_index", "Gene name", "gene_ids-0", "x"])
def test_names_in_any_column(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    column: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adata.var[column] = pd.Categorical(adata.var_names)
    adata.var_names = [str(k) for k in range(13)]
    with caplog.at_level(logging.INFO, logger="stofm"):
        pp.map_genes(adata, vocabulary=vocabulary)
    assert adata.var[Var.GENE].tolist() == [*vocabulary.gene_ids, "", ""]
    assert f"names in {column} and var_names" in caplog.text


def test_columns_that_name_other_genes_are_not_read(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    adata.var["neighbour"] = [f"ABC{k}" for k in (*range(1, N_GENES), 0, 3, 5)]
    with caplog.at_level(logging.INFO, logger="stofm"):
        pp.map_genes(adata, vocabulary=vocabulary)
    assert adata.var[Var.GENE].tolist() == [*vocabulary.gene_ids, "", ""]
    assert "var['neighbour'] names other genes than var_names and is not used" in caplog.text


def test_mapping_stays_when_columns_are_added(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    pp.map_genes(adata, species="human", vocabulary=vocabulary)
    adata.var["note"] = [f"n{k}" for k in range(13)]
    pp.tokenize(adata, vocabulary, show_progress_bar=False)
    record = read_record(adata, Var.GENE)
    assert record is not None
    assert record["params"]["species"] == "human"


def test_columns_that_are_no_genes(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    adata.var["feature_types"] = ["Gene Expression"] * 6 + ["Antibody Capture"] * 7
    with caplog.at_level(logging.INFO, logger="stofm"):
        pp.map_genes(adata, vocabulary=vocabulary)
    assert adata.var[Var.GENE].tolist() == [*vocabulary.gene_ids[:6], *[""] * 7]
    assert "6 of 6 genes matched;" in caplog.text
    assert "7 of 13 columns are not genes and are left out" in caplog.text


def test_mapping_is_made_again_when_kinds_are_told(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    adata.X = np.ones(adata.shape)
    pp.map_genes(adata, vocabulary=vocabulary)
    adata.var["feature_types"] = ["Gene Expression"] * 6 + ["Antibody Capture"] * 7
    pp.tokenize(adata, vocabulary, show_progress_bar=False)
    assert adata.var[Var.GENE].tolist() == [*vocabulary.gene_ids[:6], *[""] * 7]


def test_few_counts_in_further_columns_are_paralogs(
    rng: np.random.Generator, vocabulary: GeneVocabulary
) -> None:
    counts = np.hstack([np.full((17, N_GENES), 100), np.full((17, 1), 20)])
    adata = anndata.AnnData(counts.astype(np.float32))
    adata.var_names = [*(f"ABC{k}" for k in range(N_GENES)), "Abc3"]
    pp.map_genes(adata, vocabulary=vocabulary)


def test_transposed(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> None:
    with pytest.raises(ValueError, match=r"11 of 13 obs_names are .*adata = adata.T.copy\(\)"):
        pp.map_genes(adata.T.copy(), vocabulary=vocabulary)


def test_names_with_a_prefix(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> None:
    names = adata.var_names
    adata.var_names = [f"hg38_{name}" for name in names]
    with pytest.raises(ValueError, match="11 of 13 names are found after") as caught:
        pp.map_genes(adata, vocabulary=vocabulary)
    assert "gene_key" not in str(caught.value)


def test_damaged_counts_are_not_passed_over(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    adata.X.indices[3] = -2
    with pytest.raises(ValueError, match=r"adata\.X is damaged"):
        pp.map_genes(adata, vocabulary=vocabulary)


STEPS = [
    lambda adata, vocabulary: pp.map_genes(adata, vocabulary=vocabulary),
    lambda adata, vocabulary: pp.tokenize(adata, vocabulary, show_progress_bar=False),
]


@pytest.mark.parametrize("step", STEPS)
def test_many_unknown_counts(
    rng: np.random.Generator, vocabulary: GeneVocabulary, step: Any
) -> None:
    counts = rng.poisson(1.0, size=(17, N_GENES + 5)) + 1
    counts[:, N_GENES:] += 6
    adata = anndata.AnnData(counts.astype(np.float32))
    adata.var_names = [*(f"ABC{i}" for i in range(N_GENES)), *(f"Unit_{k}" for k in range(5))]
    told = r"6\d\.\d% of the counts are in columns that no gene .*most of them in Unit_"
    with pytest.warns(UserWarning, match=told) as caught:
        step(adata, vocabulary)
    scope = {"adata": adata}
    exec(str(caught[0].message).partition("drop them: ")[2], scope)
    assert scope["adata"].n_vars == N_GENES


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_counts_of_several_columns_of_one_gene(
    rng: np.random.Generator, vocabulary: GeneVocabulary, step: Any, *, is_first: bool
) -> None:
    genes = [f"ABC{k}" for k in range(N_GENES)]
    counts = rng.poisson(1.0, size=(17, N_GENES)) + 1
    parts = [(counts, genes), (rng.poisson(20.0, size=(17, 4)), genes[:4])]
    parts = parts[::-1] if is_first else parts
    adata = anndata.AnnData(np.hstack([part for part, _ in parts]).astype(np.float32))
    adata.var_names = [name for _, names in parts for name in names]
    told = r"\d\.\d% of the counts are in columns of genes that another column before them has"
    with pytest.warns(UserWarning, match=told):
        step(adata, vocabulary)
