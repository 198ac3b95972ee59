from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anndata
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from stofm import pp
from stofm._edge.tables import read_record
from stofm._edge.tokens import (
    _depth_power_of_embedded_model,
    read_tokens,
    token_params,
)
from stofm._keys import Obs, Obsm, Var
from stofm.genes import GeneVocabulary, RankedTokens, rank_genes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

N_GENES = 19
SHAPE = (41, 23)


@pytest.fixture
def vocabulary() -> GeneVocabulary:
    rng = np.random.default_rng(7)
    return GeneVocabulary(
        gene_ids=np.array([f"ENSG{i:011d}" for i in range(N_GENES)]),
        symbols=np.array([f"ABC{i}" for i in range(N_GENES)]),
        tokens=rng.permutation(N_GENES).astype(np.int32) + 2,
        medians=rng.lognormal(0, 1, N_GENES),
        special={"pad": 0, "mask": 1, "cls": N_GENES + 2},
    )


@pytest.fixture
def counts(rng: np.random.Generator) -> np.ndarray:
    # Further columns of a gene have few counts; with many they could be no genes.
    rates = np.where(np.isin(np.arange(SHAPE[1]), [N_GENES, N_GENES + 1]), 0.2, 1.1)
    return rng.poisson(rates, size=SHAPE) + np.eye(*SHAPE, dtype=int)


def make(matrix: Any, **options: Any) -> anndata.AnnData:
    """Columns: every gene once, two of them again, two that are unknown."""
    ids = [*range(N_GENES), 3, 5]
    names = [*(f"ENSG{i:011d}.{k}" for k, i in enumerate(ids)), "UNKNOWN1", "UNKNOWN2"]
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(SHAPE[0])])
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=names), **options)


@pytest.fixture
def adata(counts: np.ndarray) -> anndata.AnnData:
    return make(sparse.csr_matrix(counts))


def in_blocks_of(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stofm._edge.counts._BLOCK_ENTRIES", n_rows * SHAPE[1])


def run(adata: anndata.AnnData, vocabulary: Any, **options: Any) -> np.ndarray:
    pp.tokenize(adata, vocabulary, show_progress_bar=False, **options)
    return np.asarray(adata.obsm[Obsm.TOKENS].toarray())


def expected_tokens(counts: np.ndarray, vocabulary: GeneVocabulary, **options: Any) -> RankedTokens:
    rows = np.array([*range(N_GENES), 3, 5, -1, -1])
    tokens = np.where(rows >= 0, vocabulary.tokens[rows], -1)
    return rank_genes(sparse.csr_matrix(counts), tokens, vocabulary.medians[rows], **options)


def test_what_is_written(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, counts: np.ndarray
) -> None:
    assert pp.tokenize(adata, vocabulary, show_progress_bar=False) is None
    tokens = adata.obsm[Obsm.TOKENS]
    assert isinstance(tokens, sparse.csr_matrix)
    assert (tokens.shape, tokens.dtype) == ((41, 2048), np.int32)
    ranked = expected_tokens(counts, vocabulary)
    assert np.array_equal(RankedTokens.from_csr(tokens).tokens, ranked.tokens)
    assert adata.obs[Obs.N_TOKENS].dtype == np.int32
    assert adata.obs[Obs.N_TOKENS].tolist() == ranked.n_tokens.tolist()
    assert adata.var[Var.TOKEN_ID].tolist()[-3:] == [vocabulary.tokens[5], -1, -1]
    for key in (Obsm.TOKENS, Obs.N_TOKENS):
        record = read_record(adata, key)
        assert record is not None
        assert record["params"] == {"layer": "", "max_tokens": 2048, "duplicates": "sum"}
        assert record["vocabulary"] == vocabulary.fingerprint
        assert len(record["columns"]) == 16


def test_input_stays_as_it_was(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> None:
    before = adata.copy()
    run(adata, vocabulary)
    assert (adata.X != before.X).nnz == 0
    assert adata.X.dtype == before.X.dtype
    assert adata.obs_names.equals(before.obs_names)
    assert adata.var_names.equals(before.var_names)


def test_copy(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> None:
    copied = pp.tokenize(adata, vocabulary, copy=True, show_progress_bar=False)
    assert copied is not None
    assert Obsm.TOKENS in copied.obsm
    assert not adata.obsm
    assert not adata.uns
    assert adata.var.columns.empty


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "dense": np.asarray,
    "float32": lambda counts: sparse.csr_matrix(counts.astype(np.float32)),
    "uint8": lambda counts: counts.astype(np.uint8),
    "dask": lambda counts: da.from_array(counts, chunks=(7, 5)),
    "dask_sparse": lambda counts: da.from_array(counts, chunks=(7, 23)).map_blocks(
        sparse.csr_matrix
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_matrix_gives_the_same(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    counts: np.ndarray,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run(adata, vocabulary)
    assert np.array_equal(run(make(KINDS[kind](counts)), vocabulary), expected)
    other = make(None, layers={"raw": KINDS[kind](counts)})
    in_blocks_of(11, monkeypatch)
    assert np.array_equal(run(other, vocabulary, layer="raw"), expected)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_backed(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    counts: np.ndarray,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = counts if kind == "dense" else sparse.csr_matrix(counts).asformat(kind)
    make(matrix).write_h5ad(tmp_path / "slice.h5ad")
    backed = anndata.read_h5ad(tmp_path / "slice.h5ad", backed="r")
    expected = run(adata, vocabulary)
    in_blocks_of(9, monkeypatch)
    assert np.array_equal(run(backed, vocabulary), expected)
    assert backed.isbacked


def test_a_view_becomes_an_anndata_of_its_own(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    view = adata[5:17]
    # Without a warning, which the tests would make an error.
    tokens = run(view, vocabulary)
    assert np.array_equal(tokens, run(adata, vocabulary)[5:17])
    assert read_record(view, Obsm.TOKENS) is not None
    copied = pp.tokenize(adata[5:17], vocabulary, copy=True, show_progress_bar=False)
    assert copied is not None
    assert np.array_equal(copied.obsm[Obsm.TOKENS].toarray(), tokens)


def test_order_of_cells_and_genes_and_blocks_do_not_matter(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run(adata, vocabulary)
    cells, genes = rng.permutation(SHAPE[0]), rng.permutation(SHAPE[1])
    shuffled = adata[cells][:, genes].copy()
    del shuffled.uns["stofm"]
    assert np.array_equal(run(shuffled, vocabulary), expected[cells])
    for n_rows in (1, 7, 40, 41, 1000):
        in_blocks_of(n_rows, monkeypatch)
        assert np.array_equal(run(adata, vocabulary), expected)


def test_max_tokens(adata: anndata.AnnData, vocabulary: GeneVocabulary, counts: np.ndarray) -> None:
    whole = run(adata, vocabulary)
    cut = run(adata, vocabulary, max_tokens=5)
    assert np.array_equal(cut, whole[:, :5])
    assert adata.obs[Obs.N_TOKENS].max() == 5
    model = reader(vocabulary, reads_values=False)
    model.config.max_tokens = 3
    assert np.array_equal(run(adata, model), whole[:, :3])
    assert run(adata, model, max_tokens=4).shape == (41, 4)


def test_duplicates_can_be_kept(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, counts: np.ndarray
) -> None:
    run(adata, vocabulary, duplicates="keep")
    own = RankedTokens.from_csr(adata.obsm[Obsm.TOKENS])
    kept = expected_tokens(counts, vocabulary, duplicates="keep")
    assert np.array_equal(own.tokens, kept.tokens)
    assert len(own.tokens) > len(expected_tokens(counts, vocabulary).tokens)


def test_cells_without_known_genes(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, counts: np.ndarray
) -> None:
    counts[3] = 0
    counts[7, :21] = 0
    adata = make(sparse.csr_matrix(counts))
    with pytest.warns(UserWarning, match="2 of 41 cells have no count in any known gene"):
        run(adata, vocabulary)
    assert np.flatnonzero(adata.obs[Obs.N_TOKENS] == 0).tolist() == [3, 7]


def test_a_mapping_made_before_is_used(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    names = adata.var_names
    adata.var["swapped"] = [*names[:N_GENES][::-1], *names[N_GENES:]]
    pp.map_genes(adata, vocabulary=vocabulary, gene_key="swapped")
    mapped = adata.var[Var.TOKEN_ID].tolist()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="stofm"):
        run(adata, vocabulary)
    assert adata.var[Var.TOKEN_ID].tolist() == mapped
    assert "matched" not in caplog.text
    run(adata, vocabulary, gene_key="swapped", species="auto")
    assert adata.var[Var.TOKEN_ID].tolist() == mapped


def change_vocabulary(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> dict[str, Any]:
    record = read_record(adata, Var.TOKEN_ID)
    assert record is not None
    record["vocabulary"] = "0" * 16
    adata.uns["stofm"][Var.TOKEN_ID] = record
    return {}


def drop_record(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> dict[str, Any]:
    del adata.uns["stofm"]
    return {}


def lose_entries(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> dict[str, Any]:
    adata.var[Var.GENE] = [np.nan, *adata.var[Var.GENE][1:]]
    return {}


def ask_for_a_column(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> dict[str, Any]:
    adata.var["names"] = adata.var_names
    return {"gene_key": "names"}


def ask_for_a_species(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> dict[str, Any]:
    return {"species": "human"}


def ask_for_orthologs(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> dict[str, Any]:
    return {"orthologs": {"ENSMUSG00000000001": str(vocabulary.gene_ids[0])}}


@pytest.mark.parametrize(
    "change",
    [
        change_vocabulary,
        drop_record,
        lose_entries,
        ask_for_a_column,
        ask_for_a_species,
        ask_for_orthologs,
    ],
)
def test_a_mapping_that_does_not_fit_is_made_again(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[anndata.AnnData, GeneVocabulary], dict[str, Any]],
) -> None:
    pp.map_genes(adata, vocabulary=vocabulary)
    expected = adata.var[Var.TOKEN_ID].tolist()
    options = change(adata, vocabulary)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="stofm"):
        run(adata, vocabulary, **options)
    assert "21 of 23 genes matched (19 different)" in caplog.text
    assert adata.var[Var.TOKEN_ID].tolist() == expected
    record = read_record(adata, Var.TOKEN_ID)
    assert record is not None
    assert record["vocabulary"] == vocabulary.fingerprint


def test_report_has_the_share_of_the_layer(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    counts: np.ndarray,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adata.layers["raw"] = adata.X.copy()
    adata.X = adata.X * 0.5
    with caplog.at_level(logging.INFO, logger="stofm"):
        run(adata, vocabulary, layer="raw")
    assert f"{counts[:, :21].sum() / counts.sum():.1%} of the counts" in caplog.text
    record = read_record(adata, Obsm.TOKENS)
    assert record is not None
    assert record["params"]["layer"] == "raw"


def test_nothing_is_half_written(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata.X = adata.X.astype(np.float64)
    adata.X.data[-1] = 0.5
    in_blocks_of(5, monkeypatch)
    with pytest.raises(ValueError, match="does not hold raw counts"):
        run(adata, vocabulary)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    adata.X.data[-1] = 1
    monkeypatch.setattr("stofm._edge.tokens.rank_genes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(adata, vocabulary)
    assert not adata.obsm
    assert not adata.uns
    assert adata.obs.columns.empty
    assert adata.var.columns.empty


def test_unusable_input(adata: anndata.AnnData, vocabulary: GeneVocabulary) -> None:
    with pytest.raises(KeyError, match="There is no layer 'counts'"):
        run(adata, vocabulary, layer="counts")
    with pytest.raises(ValueError, match="max_tokens must be at least 1, found 0"):
        run(adata, vocabulary, max_tokens=0)
    with pytest.raises(ValueError, match="duplicates must be"):
        run(adata, vocabulary, duplicates="drop")
    with pytest.raises(ValueError, match="species must be"):
        run(adata, vocabulary, species="rat")
    with pytest.raises(TypeError, match="Expected a GeneVocabulary or a model"):
        run(adata, {"A": 1})
    with pytest.raises(TypeError, match="Expected an AnnData or a SpatialData, found ndarray"):
        pp.tokenize(np.ones((2, 2)), vocabulary)
    for shape, what in (((0, 3), "cells"), ((3, 0), "genes")):
        with pytest.raises(ValueError, match=f"The AnnData has no {what}"):
            run(anndata.AnnData(np.ones(shape)), vocabulary)


def test_one_cell(vocabulary: GeneVocabulary, adata: anndata.AnnData) -> None:
    single = adata[:1].copy()
    assert np.array_equal(run(single, vocabulary), run(adata, vocabulary)[:1])


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_round_trip(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, tmp_path: Path, suffix: str
) -> None:
    expected = run(adata, vocabulary)
    path = tmp_path / f"slice{suffix}"
    if suffix == ".zarr":
        adata.write_zarr(path)
        back = anndata.read_zarr(path)
    else:
        adata.write_h5ad(path)
        back = anndata.read_h5ad(path)
    tokens = back.obsm[Obsm.TOKENS]
    assert tokens.dtype == np.int32
    assert np.array_equal(tokens.toarray(), expected)
    assert back.obs[Obs.N_TOKENS].tolist() == adata.obs[Obs.N_TOKENS].tolist()
    for key in (Obsm.TOKENS, Obs.N_TOKENS, Var.GENE, Var.TOKEN_ID):
        assert read_record(back, key) == read_record(adata, key)


# Values


def reader(
    vocabulary: GeneVocabulary, *, reads_values: bool = True, depth_power: float = 1.0
) -> Any:
    """What tokenizing needs of a model."""
    cell_encoder = SimpleNamespace(reads_values=reads_values, depth_power=depth_power)
    return SimpleNamespace(
        vocabulary=vocabulary, config=SimpleNamespace(max_tokens=2048, cell_encoder=cell_encoder)
    )


def test_values_are_written_for_a_model_that_reads_them(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    counts: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = expected_tokens(counts, vocabulary, values=True, depth_power=0.5)
    in_blocks_of(9, monkeypatch)
    run(adata, reader(vocabulary, depth_power=0.5))
    found = RankedTokens.from_csr(adata.obsm[Obsm.TOKENS])
    assert found.with_values(adata.obsm[Obsm.TOKEN_VALUES]).digest == expected.digest
    values = adata.obsm[Obsm.TOKEN_VALUES]
    assert isinstance(values, sparse.csr_matrix)
    assert (values.shape, values.dtype) == ((41, 2048), np.float32)
    # Of the total over all columns, those without a token too.
    row = values[11].toarray().ravel()
    first = vocabulary.tokens.tolist().index(adata.obsm[Obsm.TOKENS][11, 0])
    count = counts[11, [k for k, i in enumerate([*range(N_GENES), 3, 5]) if i == first]].sum()
    by_hand = count / np.sqrt(counts[11].sum() / 10_000) / vocabulary.medians[first]
    assert row[0] == pytest.approx(by_hand, rel=1e-6)
    for key in (Obsm.TOKENS, Obs.N_TOKENS, Obsm.TOKEN_VALUES):
        record = read_record(adata, key)
        assert record is not None
        assert record["params"] == {
            "layer": "",
            "max_tokens": 2048,
            "duplicates": "sum",
            "depth_power": 0.5,
        }
        assert record["vocabulary"] == vocabulary.fingerprint


def test_values_are_written_if_asked_for_and_only_then(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    run(adata, vocabulary)
    assert Obsm.TOKEN_VALUES not in adata.obsm
    run(adata, reader(vocabulary), values=False)
    assert Obsm.TOKEN_VALUES not in adata.obsm
    run(adata, vocabulary, values=True)
    assert Obsm.TOKEN_VALUES in adata.obsm


def test_values_of_former_tokens_are_replaced_or_removed(
    adata: anndata.AnnData, vocabulary: GeneVocabulary
) -> None:
    run(adata, vocabulary, values=True)
    run(adata, vocabulary, values=True, max_tokens=5)
    assert adata.obsm[Obsm.TOKEN_VALUES].shape == (41, 5)
    run(adata, vocabulary)
    assert Obsm.TOKEN_VALUES not in adata.obsm
    assert read_record(adata, Obsm.TOKEN_VALUES) is None
    assert read_record(adata, Obsm.TOKENS) is not None


def test_order_of_cells_and_genes_and_blocks_change_no_bit_of_values(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(adata, vocabulary, values=True)
    rows, columns = rng.permutation(SHAPE[0]), rng.permutation(SHAPE[1])
    shuffled = make(adata.X[rows])[:, columns].copy()
    in_blocks_of(7, monkeypatch)
    run(shuffled, vocabulary, values=True)
    assert np.array_equal(
        shuffled.obsm[Obsm.TOKEN_VALUES].toarray(), adata.obsm[Obsm.TOKEN_VALUES][rows].toarray()
    )


def test_values_for_the_embedded_model_as_its_config_says(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "weights" / "stofm-mini"
    folder.mkdir(parents=True)
    monkeypatch.setattr("stofm._edge.tokens.resources.files", lambda _: tmp_path)
    (folder / "config.json").write_text(json.dumps({"cell_encoder": {"depth_power": 0.3}}))
    _depth_power_of_embedded_model.cache_clear()
    assert token_params(None)["depth_power"] == 0.3
    _depth_power_of_embedded_model.cache_clear()


def test_progress_bar(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stofm._logging.bars_can_be_seen", lambda: True)
    pp.tokenize(adata, vocabulary)
    assert "tokenize" in capsys.readouterr().err
    run(adata, vocabulary)
    assert "tokenize" not in capsys.readouterr().err


def test_embedded_vocabulary_on_a_real_slice(shared: Path) -> None:
    adata = anndata.read_h5ad(shared / "data" / "starmap_mpfc_BZ9.h5ad")
    by_id = pp.tokenize(adata, copy=True, gene_key="ensembl_id", show_progress_bar=False)
    by_name = pp.tokenize(adata, copy=True, show_progress_bar=False)
    assert by_id is not None
    assert by_name is not None
    assert by_name.obs[Obs.N_TOKENS].median() > 20
    assert (by_name.obs[Obs.N_TOKENS] >= by_id.obs[Obs.N_TOKENS]).all()


@pytest.mark.parametrize("suffix", ["", "-1"])
def test_antibodies_of_the_same_names(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, rng: np.random.Generator, suffix: str
) -> None:
    proteins = sparse.csr_matrix(rng.poisson(300, size=(SHAPE[0], 8)))
    names = [*adata.var_names, *(name + suffix for name in adata.var_names[:8])]
    kinds = ["Gene Expression"] * SHAPE[1] + ["Antibody Capture"] * 8
    joined = anndata.AnnData(sparse.hstack([adata.X, proteins]).tocsr(), obs=adata.obs)
    joined.var_names = names
    joined.var["feature_types"] = kinds
    alone = run(adata, vocabulary, values=True)
    assert np.array_equal(run(joined, vocabulary, values=True), alone)
    values = [table.obsm[Obsm.TOKEN_VALUES].toarray() for table in (joined, adata)]
    assert np.array_equal(*values)


@pytest.mark.parametrize(
    ("key", "place", "value", "message"),
    [
        (Obsm.TOKENS, "data", 5000, "The token 5000 is not in the vocabulary"),
        (Obsm.TOKENS, "data", -4, "Tokens must be positive integers"),
        (Obsm.TOKENS, "indices", -4, "is damaged"),
        (Obsm.TOKEN_VALUES, "data", np.nan, "negative, NaN or infinite"),
    ],
)
def test_stored_tokens_are_checked(
    adata: anndata.AnnData,
    vocabulary: GeneVocabulary,
    key: str,
    place: str,
    value: Any,
    message: str,
) -> None:
    run(adata, vocabulary, values=True)
    getattr(adata.obsm[key], place)[7] = value
    with pytest.raises(ValueError, match=f"{message}.* Run st.pp.tokenize"):
        read_tokens(adata, SimpleNamespace(name="m", **vars(reader(vocabulary))))
