from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import stofm as st
from stofm._keys import Obsm, Uns
from stofm.genes import embedded_vocabulary

WIDTH = 5


@pytest.fixture
def genes():
    """Symbols of 60 genes of the embedded vocabulary."""
    symbols = embedded_vocabulary().symbols
    return [str(name) for name in symbols[symbols != ""][100:160]]


@pytest.fixture
def adata(rng, genes):
    """59 cells, of 55 genes, one of them twice; the last column is no gene."""
    names = [*genes[:55], f"{genes[54]}", "what"]
    counts = rng.poisson(0.7, (59, 57)).astype(np.float32)
    counts[:, :3] += 1
    table = ad.AnnData(sparse.csr_matrix(counts), obs=pd.DataFrame(index=map(str, range(59))))
    table.var_names = names
    return table


@pytest.fixture
def values(rng, genes):
    """Numbers of 50 genes, in another order."""
    chosen = rng.permutation(genes[10:60])
    return pd.DataFrame(rng.standard_normal((50, WIDTH)), index=chosen).add_prefix("d")


@pytest.fixture
def path(values, tmp_path):
    values.to_parquet(tmp_path / "genes.parquet")
    return tmp_path / "genes.parquet"


def expected(adata, values):
    """A plain loop over cells and genes."""
    counts = adata.X.toarray().astype(np.float64)
    found = np.zeros((len(counts), WIDTH))
    for cell, own in enumerate(counts):
        total, weight = np.zeros(WIDTH), 0.0
        for gene in dict.fromkeys(adata.var_names):
            if gene not in values.index or not own.sum():
                continue
            count = own[np.asarray(adata.var_names == gene)].sum()
            log = np.log1p(10_000 * count / own.sum())
            total += log * values.loc[gene].to_numpy()
            weight += log
        found[cell] = total / weight if weight else 0.0
    return found


def pool(adata, path, **options):
    return st.tl.pool_genes(adata, path, show_progress_bar=False, **options)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_it_is_the_weighted_mean(adata, values, path, monkeypatch):
    assert pool(adata, path) is None
    found = adata.obsm[Obsm.X_GENES]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(adata, values), atol=1e-5)
    record = adata.uns[Uns.STOFM][Obsm.X_GENES]
    assert record["params"] == {"layer": ""}
    assert record["model"] == "genes.parquet"
    assert len(record["model_fingerprint"]) == 16
    assert list(adata.var.columns) == []

    monkeypatch.setattr("stofm._edge.counts._BLOCK_ENTRIES", 7 * adata.n_vars)
    again = pool(adata, path, copy=True)
    np.testing.assert_array_equal(again.obsm[Obsm.X_GENES], found)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_layer_copy_and_key(adata, values, path):
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.multiply(0.5).tocsr()
    new = pool(adata, path, layer="counts", key_added="X_genept", copy=True)
    assert not len(adata.obsm)
    adata.X = adata.layers["counts"]
    np.testing.assert_allclose(new.obsm["X_genept"], expected(adata, values), atol=1e-5)
    with pytest.raises(ValueError, match="key_added='X_stofm' would replace"):
        pool(adata, path, key_added="X_stofm")


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_backed_file_gives_the_same(adata, path, tmp_path):
    adata.var_names_make_unique()
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    pool(backed, path)
    pool(adata, path)
    np.testing.assert_array_equal(backed.obsm[Obsm.X_GENES], adata.obsm[Obsm.X_GENES])
    backed.file.close()


def test_a_cell_without_counts_is_0_and_a_mapping_that_is_there_is_read(adata, values, path):
    adata = adata[:, :50].copy()
    adata.X = sparse.diags(np.arange(59) != 3, dtype=np.float32) @ adata.X
    wanted = expected(adata, values)
    adata.var["symbol"] = adata.var_names
    st.pp.map_genes(adata, gene_key="symbol")
    adata.var_names = [f"column{k}" for k in range(50)]
    pool(adata, path)
    np.testing.assert_allclose(adata.obsm[Obsm.X_GENES], wanted, atol=1e-5)
    assert not adata.obsm[Obsm.X_GENES][3].any()


def test_little_in_common_is_told(adata, values, path, genes, tmp_path):
    adata = adata[:, :50].copy()
    values.iloc[:4].to_csv(tmp_path / "few.csv")
    with pytest.warns(
        UserWarning, match=r"of 50 genes, with \d+\.\d% of the counts, are in few\.csv"
    ):
        pool(adata, tmp_path / "few.csv")
    with pytest.raises(
        ValueError, match=r"None of the 8 genes of the AnnData, .* of genes\.parquet"
    ):
        pool(adata[:, :8].copy(), path)


def test_a_head_notices_another_table(adata, values, path, tmp_path):
    adata = adata[:, :50].copy()
    adata.obs["kind"] = np.where(np.arange(59) % 2, "odd", "even")
    pool(adata, path)
    head = st.tl.annotate(
        adata,
        label_key="kind",
        use_rep=Obsm.X_GENES,
        options=st.tl.HeadOptions(split="random"),
        show_progress_bar=False,
    )
    (values + 1).to_csv(tmp_path / "other.csv")
    pool(adata, tmp_path / "other.csv")
    with pytest.raises(ValueError, match=r"is from other\.csv .* from genes\.parquet"):
        st.tl.annotate(adata, head=head, show_progress_bar=False)
